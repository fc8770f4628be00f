"""`layerprobe export`: a run as the article's records, or as a table."""

from __future__ import annotations

import argparse
import sys

from simpletuner_layerprobe.commands.arguments import Add, add_force, add_tokens
from simpletuner_layerprobe.commands.output import OK, say, warn
from simpletuner_layerprobe.show.words import counted


def add_parser(add: Add) -> None:
    added = add(
        "export",
        command,
        "write a run as a file of the article's records, or as a table",
        "A name that ends in .csv, .csv.gz, .csv.bz2 or .parquet gives a table with a row per sample and all readings\n"
        "(docs/run-folder.md). One that ends in .jsonl, .jsonl.gz or .jsonl.bz2 gives the article's records, one JSON\n"
        "object per line; - writes them to standard output.",
        "layerprobe export output/sd35-probe/layerprobe records.jsonl.gz\n"
        "layerprobe export output/sd35-probe/layerprobe run.parquet",
    )
    added.add_argument("run", metavar="RUN", help="run folder, or a file of the article's records")
    added.add_argument("file", metavar="FILE", help="file to write, - for standard output")
    add_force(added)
    add_tokens(added, "of the records")
    added.add_argument(
        "--facts",
        action="store_true",
        help="with what is known of each sample in its record: image, caption_words, width, height, backend, dropped, "
        "loss",
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.records import export, require_export

    file = sys.stdout.buffer if arguments.file == "-" else arguments.file
    require_export(file, force=arguments.force)
    run = load(arguments.run)
    written, skipped = export(run, file, tokens=arguments.tokens, facts=arguments.facts, force=arguments.force)
    if skipped:
        warn(f"{counted(skipped, 'sample')} left out: a record cannot hold distances that are not finite")
    if arguments.file != "-":
        arguments.written = [arguments.file]
        say(f"{f'{written:,} of ' if skipped else ''}{run.counted} written to {arguments.file}")
    return OK
