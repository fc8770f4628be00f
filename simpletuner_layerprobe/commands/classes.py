"""`layerprobe classes`: the class names and name patterns that a LyCORIS config can aim at."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add, add_precision, add_wide
from simpletuner_layerprobe.commands.imports import named_model
from simpletuner_layerprobe.commands.output import LEFT, OK, RIGHT, print_json, print_table

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.plans import Aim


def add_parser(add: Add) -> None:
    added = add(
        "classes",
        command,
        "list the class names and name patterns that a LyCORIS config can aim at in a model",
        "Classes are for target_module and module_algo_map: every layer in a module of the class. Names are for\n"
        'target_name and name_algo_map with "use_fnmatch": true. modules: the layers that LyCORIS adapts by it;\n'
        "weights: the numbers in their weights, without biases. A layer counts in every class that it lies in.",
        "layerprobe classes --model wan21-1.3b\n"
        "layerprobe classes --model output/sd35/transformer --precision int8-quanto",
    )
    source = added.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="MODEL", help=KNOWN_MODELS)
    source.add_argument("--run", metavar="RUN", help="the model is the one of this run folder")
    add_precision(added)
    added.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.plans import aims

    if arguments.precision is not None and arguments.model is None:
        arguments.wrong_usage("--precision goes with --model: a run has the layers that it was recorded with")
    model = load(arguments.run) if arguments.run is not None else named_model(arguments)
    classes, names = aims(model)
    if arguments.json:
        print_json({"classes": [_fields(aim, "class") for aim in classes], "names": [_fields(aim) for aim in names]})
        return OK
    table = [[aim.text, f"{aim.modules:,}", f"{aim.weights:,}"] for aim in (*classes, *names)]
    table.insert(len(classes), ["name (use_fnmatch)", "", ""])
    print_table(["class", "modules", "weights"], table, LEFT + RIGHT + RIGHT, spare=("weights",), wide=arguments.wide)
    return OK


def _fields(aim: Aim, key: str = "name") -> dict[str, Any]:
    return {key: aim.text, "modules": aim.modules, "weights": aim.weights}
