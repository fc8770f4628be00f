"""`layerprobe findings`: what a run shows, in words."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, counted, model_name, print_json


def add_parser(add: Add) -> None:
    added = add(
        "findings",
        command,
        "say in words what a run shows, and how sure it is",
        "Critical blocks, task islands and gradients, two-ended and least contributing blocks, and the effects of\n"
        "caption length, dropped captions, size, aspect and data backend. docs/findings.md defines each.",
        "layerprobe findings output/sd35-probe/layerprobe\n"
        "layerprobe findings output/sd35-probe/layerprobe --json > findings.json",
    )
    add_run(added)
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_bins(added)
    add_tokens(added, "to look at")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.conditions import observe
    from simpletuner_layerprobe.analyse.findings import TITLES, as_json, chance, findings, words
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.run.records import open_run

    run = open_run(arguments.run)
    observation = observe(run, tokens=arguments.tokens, bins=arguments.bins)
    sections = findings(observation)
    if arguments.json:
        print_json({"run": str(run.path), "samples": observation.samples, **as_json(sections)})
        return OK
    numbers = {block: i for i, block in enumerate(all_blocks([stream.blocks for stream in run.manifest.streams]))}
    print(f"{model_name(run.manifest) or 'unknown model'}, {counted(observation.samples, 'sample')}")
    for section in sections:
        print(f"\n{TITLES[section.kind]}, {section.stream} stream")
        for one in section.findings:
            first, last = numbers[one.blocks[0]], numbers[one.blocks[-1]]
            name = f"block {first}" if first == last else f"blocks {first} to {last}"
            print(f"  {name} {words(one)} ({chance(one.p)}, {counted(one.samples, 'sample')})")
        if section.missing or not section.findings:
            print(f"  {section.missing or 'none found'}")
        for note in section.notes:
            print(f"  note: {note}")
    return OK
