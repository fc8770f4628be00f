"""`layerprobe merge`: one run out of runs that were recorded on different machines."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add
from simpletuner_layerprobe.commands.output import OK, say, warn


def add_parser(add: Add) -> None:
    added = add(
        "merge",
        command,
        "make one run of runs from different machines",
        "The runs must be of the same model and config. What is in several of them, such as a copied folder, is\n"
        "counted once. All of it is written, or nothing; the runs stay as they are.",
        "layerprobe merge machine-a/layerprobe machine-b/layerprobe runs/both",
    )
    added.usage = "layerprobe merge [-h] RUN RUN [RUN ...] OUT"
    added.add_argument("runs", metavar="RUN", nargs="+", help="run folders, two or more")
    added.add_argument("out", metavar="OUT", help="run folder to make")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.records import merge

    sources = merge(arguments.runs, arguments.out)
    arguments.written = [arguments.out]
    for source in sources:
        say(f"{source.path}: {load(source.path).counted}")
    warn(
        *(
            f"{source.path}: {source.skipped:,} samples are in the runs before it or in it twice: counted once"
            for source in sources
            if source.skipped
        )
    )
    say(f"{load(arguments.out).counted} merged into {arguments.out}")
    return OK
