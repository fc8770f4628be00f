"""`layerprobe findings`: what a run shows, in words."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, print_json, say
from simpletuner_layerprobe.show.words import block_range


def add_parser(add: Add) -> None:
    added = add(
        "findings",
        command,
        "say in words what a run shows, and how sure it is",
        "Critical blocks, task islands and gradients, two-ended and least contributing blocks, and the effects of\n"
        "caption length, dropped captions, size, aspect and data backend. Of a run with ablation, which blocks the\n"
        "loss needs, and how far the angle tells it. docs/findings.md defines each.",
        "layerprobe findings output/sd35-probe/layerprobe\n"
        "layerprobe findings output/sd35-probe/layerprobe --json > findings.json",
    )
    add_run(added)
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_bins(added)
    add_tokens(added, "to look at")
    added.add_argument(
        "--reading",
        choices=("angle", "ablation", "ablation_text"),
        default="angle",
        help="what to look at: the angular distance (default), or how much the loss rises with a block, or its text "
        "update alone, left out (layerprobe_ablation)",
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.findings import TITLES, as_json, numbered, words
    from simpletuner_layerprobe.show.findings import by_kind, detail, where

    run = load(arguments.run)
    reading = arguments.tokens if arguments.reading == "angle" else arguments.reading
    sections = run.findings(reading, arguments.bins, arguments.tokens)
    if arguments.json:
        told = {"run": str(run.path), "samples": run.samples, "images": run.images}
        print_json({**told, **as_json(sections)})
        return OK
    say(f"{run.model or 'unknown model'}, {run.counted}")
    for section in (section for _, those in by_kind(sections) for section in those):
        say()
        say(f"{TITLES[section.kind]}{where(section.stream)}")
        if section.text:
            say(f"  {section.text}")
        for finding in section.findings:
            name = block_range(numbered(finding, run.streams))
            say(f"  {name} {words(finding)} ({detail(finding, run.samples)})")
        if section.missing or not (section.findings or section.text):
            say(f"  {section.missing or 'none'}")
        for note in section.notes:
            say(f"  note: {note}")
    return OK
