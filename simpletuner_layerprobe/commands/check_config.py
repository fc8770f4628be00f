"""`layerprobe check-config`: what LyCORIS makes of a config."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import KNOWN_MODELS, Add, add_precision, add_wide
from simpletuner_layerprobe.commands.imports import light, named_model
from simpletuner_layerprobe.commands.output import LEFT, OK, print_table, print_text, say
from simpletuner_layerprobe.errors import ConfigError

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.plans import Architecture, Check
    from simpletuner_layerprobe.api.run import Run

MOST_ALIKE = 24


def add_parser(add: Add) -> None:
    added = add(
        "check-config",
        command,
        "show what each module was meant to get from a LyCORIS config and what it gets",
        "Exits with 1 if a module gets something else, and if nothing would learn or the training would stop.",
        "layerprobe check-config lycoris_config.json --model sd35-large --differences",
    )
    added.add_argument("config", metavar="LYCORIS_CONFIG", help="the LyCORIS config, a JSON file")
    source = added.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="the model is the one of this run folder")
    source.add_argument("--model", metavar="MODEL", help=KNOWN_MODELS)
    add_precision(added)
    added.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="say instead whether this file, pytorch_lora_weights.safetensors, comes from the config: module by module",
    )
    added.add_argument("--differences", action="store_true", help="list only the modules that differ")
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import check_config, load

    if arguments.precision is not None and arguments.model is None:
        arguments.wrong_usage("--precision goes with --model: a run has the layers that it was recorded with")
    model = load(arguments.run) if arguments.run is not None else named_model(arguments)
    if arguments.adapter is not None:
        return _compare_adapter(arguments, model)
    with light("lycoris", arguments):
        check = check_config(arguments.config, model)
    wide = arguments.wide
    rows = [
        ("ok", row.name, str(row.got)) if row.ok else ("WRONG", row.name, row.difference)
        for row in check.rows
        if not (row.ok and arguments.differences)
    ]
    if rows:
        print_table(("", "module", "gets"), rows, 3 * LEFT, wide=wide)
    if not arguments.differences:
        _print_splits(check, wide)
    for pattern in check.unmatched[:MOST_ALIKE]:
        print_text("note   ", f"nothing in the model matches {pattern}", wide=wide)
    if len(check.unmatched) > MOST_ALIKE:
        say(f"note   nothing in the model matches {len(check.unmatched) - MOST_ALIKE:,} more")
    for note in check.notes:
        print_text("note   ", note, wide=wide)
    if check.uncovered:
        print_text(
            "reach  ",
            f"{len(check.layers) - len(check.uncovered):,} of the model's {len(check.layers):,} linear and "
            f"convolutional layers; {len(check.uncovered):,} get no adapter, first {check.uncovered[0]}",
            wide=wide,
        )
    for reason in check.stops:
        print_text("STOPS  ", reason, wide=wide)
    say(
        f"LyCORIS {check.version}: {len(check.wrong):,} of {len(check.rows):,} modules wrong, "
        f"{check.parameters:,} trainable parameters, {check.intended_parameters:,} meant"
    )
    check.require()
    return OK


def _print_splits(check: Check, wide: bool) -> None:
    lines = check.splits
    for line in lines[:MOST_ALIKE]:
        print_text("split  ", line, wide=wide)
    if len(lines) > MOST_ALIKE:
        say(f"split  ... and {len(lines) - MOST_ALIKE:,} more")
    if lines:
        said = "a side splits at its largest divisor up to the factor; a larger factor is fewer parameters"
        print_text("split  ", said, wide=wide)


def _compare_adapter(arguments: argparse.Namespace, model: Run | Architecture) -> int:
    from simpletuner_layerprobe.api.plans import adapter_origin

    with light("lycoris", arguments):
        made = adapter_origin(arguments.adapter, arguments.config, model)
    for name in made.missing:
        say(f"WRONG  {name}: not in the file")
    for name in made.strange:
        say(f"WRONG  {name}: in the file, and no adapter by the config")
    for name, (tensors, others) in made.different.items():
        say(f"WRONG  {name}: {_tensors(tensors)} by the config, {_tensors(others)} in the file")
    for name, (meant, held) in made.alphas.items():
        say(f"WRONG  {name}: alpha {meant:g} by the config, {held:g} in the file")
    if not arguments.differences:
        for name in made.same:
            say(f"ok     {name}")
    every = len(made.same) + len(made.missing) + len(made.strange) + len(made.different) + len(made.alphas)
    say(
        f"{len(made.same):,} of {every:,} modules the same: {len(made.missing):,} missing in the file, "
        f"{len(made.strange):,} not in the config, {len(made.different):,} of other tensors, "
        f"{len(made.alphas):,} of another alpha"
    )
    if not made.fits:
        raise ConfigError(f"{arguments.adapter} does not come from {arguments.config}")
    return OK


def _tensors(tensors: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}".strip() for name, shape in sorted(tensors.items()))
