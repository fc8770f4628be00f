"""`layerprobe export`: a run as the article's records, or as a table."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, warn

CSV = (".csv", ".csv.gz", ".csv.bz2")
PARQUET = (".parquet",)


def add_parser(add: Add) -> None:
    added = add(
        "export",
        command,
        "write a run as a file of the article's records, or as a table",
        "A name that ends in .csv, .csv.gz, .csv.bz2 or .parquet gives a table with a row per sample and all readings\n"
        "(docs/pandas.md). Any other name gives the article's records, one JSON object per line; one that ends in .gz\n"
        "or .bz2 is compressed. A file that exists is not overwritten.",
        "layerprobe export output/sd35-probe/layerprobe records.jsonl.gz\n"
        "layerprobe export output/sd35-probe/layerprobe run.parquet",
    )
    add_run(added)
    added.add_argument("file", metavar="FILE", help="file to write")
    add_tokens(added, "of the records")
    added.set_defaults(tokens=None, wrong_usage=added.error)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.article import export_jsonl
    from simpletuner_layerprobe.run.records import open_run
    from simpletuner_layerprobe.run.tables import export_csv, export_parquet

    name = arguments.file.lower()
    if name.endswith((*CSV, *PARQUET)):
        if arguments.tokens is not None:
            arguments.wrong_usage("argument --tokens: a table has all readings, each in columns of its own")
        export = export_parquet if name.endswith(PARQUET) else export_csv
        written, skipped = export(open_run(arguments.run), arguments.file), 0
    else:
        written, skipped = export_jsonl(open_run(arguments.run), arguments.file, tokens=arguments.tokens or "last")
    if skipped:
        warn(f"{skipped:,} samples left out: a record cannot hold distances that are not finite")
    print(f"{written:,} samples written to {arguments.file}")
    return OK
