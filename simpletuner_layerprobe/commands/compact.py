"""`layerprobe compact`: few large shards instead of many small ones."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_run
from simpletuner_layerprobe.commands.output import OK, counted


def add_parser(add: Add) -> None:
    added = add(
        "compact",
        command,
        "rewrite a run's many small shards as few large ones",
        "The samples, their order and every result stay the same. It may run at any time, also while the run is\n"
        "recorded or read, and may be stopped at any time: nothing is lost or counted twice. Version 0.1.0 refuses\n"
        "to read a compacted run.",
        "layerprobe compact output/sd35-probe/layerprobe",
    )
    add_run(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.compact import compact

    done = compact(arguments.run)
    left = f" ({counted(done.removed, 'shard')} left by an interrupted compaction)" if done.removed else ""
    print(f"{arguments.run}: {counted(done.before, 'shard')}{left} before, {done.after:,} now")
    return OK
