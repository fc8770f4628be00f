"""`layerprobe check-config`: what LyCORIS makes of a config."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add
from simpletuner_layerprobe.commands.imports import diffusers_for_tables, lycoris_for_proofs
from simpletuner_layerprobe.commands.output import OK, quiet
from simpletuner_layerprobe.errors import ProbeError


def add_parser(add: Add) -> None:
    added = add(
        "check-config",
        command,
        "show what each module was meant to get from a LyCORIS config and what it gets",
        "Exits with 1 if a module gets something else.",
        "layerprobe check-config lycoris_config.json --model sd35-large --differences",
    )
    added.add_argument("config", metavar="LYCORIS_CONFIG", help="the LyCORIS config, a JSON file")
    source = added.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="the model is the one of this run folder")
    source.add_argument(
        "--model",
        metavar="MODEL",
        help=KNOWN_MODELS,
    )
    added.add_argument("--differences", action="store_true", help="list only the modules that differ")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.proof import check_config
    from simpletuner_layerprobe.run.manifest import read_manifest

    config = read_config(arguments.config)
    if arguments.run is not None:
        manifest = read_manifest(arguments.run)
        modules, model_class = manifest.modules, manifest.model_class
        if not modules:
            raise ProbeError(
                f"{arguments.run} has no module table (imported without --model); name the model with --model"
            )
    else:
        from simpletuner_layerprobe.models import architecture

        with quiet(), diffusers_for_tables(arguments):
            model = architecture(arguments.model)
        modules, model_class = model.modules, model.model_class
    with quiet(), lycoris_for_proofs(arguments):
        check = check_config(config, modules, model_class=model_class, where=arguments.config)
    for row in check.rows:
        if not row.ok:
            print(f"WRONG  {row}")
        elif not arguments.differences:
            print(f"ok     {row.name}: {row.got}")
    for pattern in check.unmatched:
        print(f"note   nothing in the model matches {pattern}")
    for note in check.notes:
        print(f"note   {note}")
    if not check.rows:
        raise ProbeError(f"{arguments.config} gives no module of this model an adapter")
    print(
        f"LyCORIS {check.lycoris}: {len(check.wrong):,} of {len(check.rows):,} modules wrong, "
        f"{check.parameters:,} trainable parameters, {check.intended_parameters:,} meant"
    )
    check.require()
    return OK
