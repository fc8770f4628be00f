"""`layerprobe import`: a run folder from the article's records."""

from __future__ import annotations

import argparse
from typing import Any

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add, add_tokens
from simpletuner_layerprobe.commands.imports import diffusers_for_tables
from simpletuner_layerprobe.commands.output import OK, quiet
from simpletuner_layerprobe.errors import ProbeError


def add_parser(add: Add) -> None:
    added = add(
        "import",
        command,
        "make a run folder from a file of the article's records",
        "One JSON object per line:\n"
        '  {"timestep": sigma, "encoder_hidden_states": [...], "hidden_states": [...]}\n'
        "Plain, gzip or bz2. All of it is imported, or nothing.",
        "layerprobe import sd3_hidden_state_similarity.jsonl.gz runs/article --model sd35-large",
    )
    added.add_argument("file", metavar="FILE", help="file of records")
    added.add_argument("run", metavar="RUN", help="run folder to make")
    added.add_argument(
        "--model",
        metavar="MODEL",
        help=f"the model recorded: {KNOWN_MODELS}; without it lokr cannot prove a config",
    )
    add_tokens(added, "that the records hold")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.article import import_jsonl

    known: dict[str, Any] = {}
    if arguments.model is not None:
        from simpletuner_layerprobe.models import architecture

        with quiet(), diffusers_for_tables(arguments):
            model = architecture(arguments.model)
        if not model.streams:
            raise ProbeError(f"{arguments.model} is a {model.model_class}; the layer probe does not know its blocks")
        known = {
            "modules": model.modules,
            "family": model.family,
            "flavour": model.flavour,
            "model_class": model.model_class,
            "block_paths": {stream.name: stream.blocks for stream in model.streams},
        }
    run = import_jsonl(arguments.file, arguments.run, tokens=arguments.tokens, **known)
    print(f"{run.sample_count():,} samples imported into {arguments.run}")
    return OK
