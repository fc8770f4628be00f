"""`layerprobe check-config`: what LyCORIS makes of a config."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add, add_precision
from simpletuner_layerprobe.commands.imports import light, named_model
from simpletuner_layerprobe.commands.output import OK
from simpletuner_layerprobe.errors import ConfigError


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
    source.add_argument("--model", metavar="MODEL", help=KNOWN_MODELS)
    add_precision(added)
    added.add_argument("--differences", action="store_true", help="list only the modules that differ")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import check_config, load

    if arguments.precision is not None and arguments.model is None:
        arguments.wrong_usage("--precision goes with --model: a run has the layers that it was recorded with")
    model = load(arguments.run) if arguments.run is not None else named_model(arguments)
    with light("lycoris", arguments):
        check = check_config(arguments.config, model)
    for row in check.rows:
        if not row.ok:
            print(f"WRONG  {row}")
        elif not arguments.differences:
            print(f"ok     {row.name}: {row.got}")
    for pattern in check.unmatched:
        print(f"note   nothing in the model matches {pattern}")
    for note in check.notes:
        print(f"note   {note}")
    for reason in check.stops:
        print(f"STOPS  {reason}")
    if not check.rows:
        raise ConfigError(f"{arguments.config} gives no module of this model an adapter")
    print(
        f"LyCORIS {check.version}: {len(check.wrong):,} of {len(check.rows):,} modules wrong, "
        f"{check.parameters:,} trainable parameters, {check.intended_parameters:,} meant"
    )
    check.require()
    return OK
