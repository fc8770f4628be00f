"""`layerprobe export`: the article's records from a run."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, warn


def add_parser(add: Add) -> None:
    added = add(
        "export",
        command,
        "write a run as a file of the article's records",
        "A name that ends in .gz or .bz2 is compressed. A file that exists is not overwritten.",
        "layerprobe export output/sd35-probe/layerprobe records.jsonl.gz",
    )
    add_run(added)
    added.add_argument("file", metavar="FILE", help="file to write")
    add_tokens(added, "to write")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.jsonl import export_jsonl
    from simpletuner_layerprobe.run.shards import open_run

    written, skipped = export_jsonl(open_run(arguments.run), arguments.file, tokens=arguments.tokens)
    if skipped:
        warn(f"{skipped:,} samples left out: a record cannot hold distances that are not finite")
    print(f"{written:,} samples written to {arguments.file}")
    return OK
