"""`layerprobe report`: one HTML page of a run."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import (
    Add,
    add_bins,
    add_force,
    add_preset,
    add_run,
    add_tokens,
    chosen_run,
)
from simpletuner_layerprobe.commands.imports import light
from simpletuner_layerprobe.commands.output import OK, sample_warnings, say, warn
from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import write_files
from simpletuner_layerprobe.targets import PAGE, require_file


def add_parser(add: Add) -> None:
    added = add(
        "report",
        command,
        "make one HTML page of everything a run shows",
        "The page needs no network and opens from disk. One that layerprobe made is replaced.",
        "layerprobe report output/sd35-probe/layerprobe --out report.html",
    )
    add_run(added)
    added.add_argument("--out", metavar="FILE", help="the page; default report.html in the run folder")
    add_force(added)
    add_bins(added)
    add_tokens(added, "to show")
    add_preset(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.pages import report

    run = load(chosen_run(arguments))
    if arguments.out is None and not run.path.is_dir():
        raise ConfigError(f"{run.path} is no folder that the page could lie in; name the page with --out")
    place = run.path / "report.html"
    out = require_file(place if arguments.out is None else arguments.out, PAGE, force=arguments.force, place=place)
    with light("lycoris", arguments):  # which counts what the run's own config trains
        page = report(run, arguments.tokens, bins=arguments.bins, preset=arguments.preset)
    write_files({out: page.encode()}, force=arguments.force, place=place)
    arguments.written = [out]
    warn(*sample_warnings(run, arguments.tokens, arguments.bins))
    say(str(out))
    return OK
