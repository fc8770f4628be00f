"""`layerprobe report`: one HTML page of a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, add_tokens, add_weighting, given_weighting
from simpletuner_layerprobe.commands.output import OK, replace_files


def add_parser(add: Add) -> None:
    added = add(
        "report",
        command,
        "make one HTML page of everything a run shows",
        "The page needs no network and opens from disk. A file of the same name is replaced.",
        "layerprobe report output/sd35-probe/layerprobe --out report.html",
    )
    add_run(added)
    added.add_argument("--out", metavar="FILE", help="the page; default report.html in the run folder")
    add_bins(added)
    add_tokens(added, "to show")
    add_weighting(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.records import open_run
    from simpletuner_layerprobe.show.page import page

    made = page(
        open_run(arguments.run), tokens=arguments.tokens, bins=arguments.bins, **given_weighting(arguments)
    ).encode()
    out = Path(arguments.out if arguments.out is not None else os.path.join(arguments.run, "report.html"))
    replace_files(out.parent, {out.name: made})
    print(out)
    return OK
