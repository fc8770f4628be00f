"""`layerprobe merge`: one run out of runs that were recorded on different machines."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add
from simpletuner_layerprobe.commands.output import OK, warn


def add_parser(add: Add) -> None:
    added = add(
        "merge",
        command,
        "make one run of runs from different machines",
        "The runs must be of the same model and config. What is in several of them, such as a copied folder, is\n"
        "counted once. All of it is written, or nothing; the runs stay as they are.",
        "layerprobe merge machine-a/layerprobe machine-b/layerprobe runs/both",
    )
    added.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    added.add_argument("out", metavar="OUT", help="run folder to make")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.merge import merge

    sources = merge(arguments.runs, arguments.out)
    for source in sources:
        moved = ", ".join(f"{rank} is {number}" for rank, number in source.ranks.items() if rank != number)
        ranks = f"; its rank {moved}" if moved and source.samples else ""
        print(f"{source.path}: {source.samples:,} samples{ranks}")
        if source.skipped:
            warn(f"{source.path}: {source.skipped:,} samples are in the runs before it or in it twice: counted once")
        if source.same_sigmas is not None:
            warn(
                f"{source.path} drew the same sigmas as {source.same_sigmas}: if both used the same images too, these "
                "are the same samples and say nothing new; give each machine a seed of its own"
            )
    print(f"{sum(source.samples for source in sources):,} samples merged into {arguments.out}")
    return OK
