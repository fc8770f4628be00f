"""`layerprobe findings`: what a run shows, in words."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, add_tokens, add_wide, chosen_run
from simpletuner_layerprobe.commands.imports import light
from simpletuner_layerprobe.commands.output import OK, print_json, print_text, print_verdict, say
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
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.findings import TITLES, as_json, numbered, words
    from simpletuner_layerprobe.api.verdict import verdict
    from simpletuner_layerprobe.show.findings import by_kind, detail, empty, where

    run = load(chosen_run(arguments))
    reading = arguments.tokens if arguments.reading == "angle" else arguments.reading
    sections = run.findings(reading, arguments.bins, arguments.tokens)
    with light("lycoris", arguments):  # which counts what the run's own config trains
        judged = verdict(run, arguments.tokens)
    if arguments.json:
        told = {
            "run": str(run.path),
            "samples": run.samples,
            "images": run.images,
            "verdict": dict(judged.lines),
        }
        print_json({**told, **as_json(sections)})
        return OK
    say(f"{run.model or 'unknown model'}, {run.counted}")
    print_verdict(judged, wide=arguments.wide)
    for section in (section for _, those in by_kind(sections) for section in those if not section.empty):
        say()
        say(f"{TITLES[section.kind]}{where(section.stream)}")
        if section.text:
            print_text("  ", section.text, wide=arguments.wide)
        for finding in section.findings:
            name = block_range(numbered(finding, run.streams))
            print_text("  ", f"{name} {words(finding)} ({detail(finding, run.samples)})", wide=arguments.wide)
        for note in section.notes:
            print_text("  note: ", note, wide=arguments.wide)
    if nothing := empty(sections):
        say()
        print_text("nothing of  ", "; ".join(nothing), wide=arguments.wide)
    return OK
