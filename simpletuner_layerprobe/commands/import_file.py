"""`layerprobe import`: a run folder from the article's records."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add
from simpletuner_layerprobe.commands.imports import named_model
from simpletuner_layerprobe.commands.output import OK, say
from simpletuner_layerprobe.targets import require_new_folder


def add_parser(add: Add) -> None:
    added = add(
        "import",
        command,
        "make a run folder from a file of the article's records",
        "One JSON object per line:\n"
        '  {"timestep": sigma, "encoder_hidden_states": [...], "hidden_states": [...]}\n'
        "and, if they are there, image, caption_words, width, height, backend, dropped, loss. Plain, gzip or bz2.\n"
        "All of it is imported, or nothing.",
        "layerprobe import sd3_hidden_state_similarity.jsonl.bz2 runs/article --model sd35-large",
    )
    added.add_argument("file", metavar="FILE", help="file of records")
    added.add_argument("run", metavar="RUN", help="run folder to make")
    added.add_argument(
        "--model",
        metavar="MODEL",
        help=f"the model recorded: {KNOWN_MODELS}; without it lokr cannot prove a config",
    )
    added.add_argument(
        "--tokens",
        choices=("last", "mean"),
        default="last",
        help="the reading that the records hold: last token, as in the article, or mean over tokens; default last",
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api.records import import_records

    require_new_folder(arguments.run)
    model = None if arguments.model is None else named_model(arguments)
    run = import_records(arguments.file, arguments.run, model=model, tokens=arguments.tokens)
    arguments.written = [arguments.run]
    say(f"{run.counted} imported into {arguments.run}")
    return OK
