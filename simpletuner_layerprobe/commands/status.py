"""`layerprobe status`: what a run folder holds."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, preset
from simpletuner_layerprobe.commands.output import OK, bin_labels, counted, model_name, size_text
from simpletuner_layerprobe.commands.settled import settling_text
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import ARTICLE, preset_parameters

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.records import Run

HISTOGRAM_WIDTH = 40


def add_parser(add: Add) -> None:
    added = add(
        "status",
        command,
        "print what a run folder holds",
        "",
        "layerprobe status output/sd35-probe/layerprobe",
    )
    add_run(added)
    add_bins(added)
    added.add_argument(
        "--preset",
        type=preset,
        metavar="P",
        help="what the factors are judged for: article, or a plan for a number of parameters such as 400M or a size in "
        "bf16 such as 800MB; default the run's own layerprobe_preset, else article",
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.analyse.summary import summary
    from simpletuner_layerprobe.run.records import open_run

    run = open_run(arguments.run)
    manifest = run.manifest
    counts = summary(run, bins=arguments.bins)
    blocks = all_blocks([stream.blocks for stream in manifest.streams])
    total = sum(counts.samples.values())
    ranks = ", ".join(f"rank {rank}: {count:,}" for rank, count in counts.samples.items())
    nonfinite = ", ".join(f"{stream} {reading}: {count:,}" for (stream, reading), count in counts.nonfinite.items())
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    backends = ", ".join(f"{name or 'unknown'}: {count:,}" for name, count in counts.backends.items())
    facts = {
        "run": str(run.path),
        "model": f"{model_name(manifest) or 'unknown'}, {counted(len(blocks), 'block')}",
        "recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "versions": versions or "unknown",
        "samples": f"{total:,} ({ranks})",
        "streams": ", ".join(f"{stream.name} {counted(len(stream.blocks), 'block')}" for stream in manifest.streams),
        "readings": ", ".join((*manifest.tokens, *manifest.extra)),
        "modules": f"{len(manifest.modules):,} in the module table" if manifest.modules else "no module table",
        "backends": backends,
        "non-finite": nonfinite or "none",
        "settled": settling_text(run, arguments.bins, arguments.preset or _preset_of(run)),
        "size": f"{size_text(run.size_bytes())} in {counted(len(run.shards), 'shard')}",
    }
    for name, value in facts.items():
        print(f"{name:<12}{value}")
    print(f"{'sigma':<12}samples per bin, 0 clean .. 1 noise")
    largest = int(counts.count_T.max())
    for label, count in zip(bin_labels(arguments.bins), counts.count_T.tolist(), strict=True):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * count / largest)
        print(f"  {label:<14}{count:>12,}  {bar or '(none)'}")
    return OK


def _preset_of(run: Run) -> str:
    """The preset that the run's first start named; article if it named none, or none that can be read."""
    from simpletuner_layerprobe.lokr.config import read_options

    try:
        options = read_options(run.path)
        named = str(next((value for key, value in options.items() if key.lstrip("-") == "layerprobe_preset"), ARTICLE))
        preset_parameters(named)
    except ProbeError:
        return ARTICLE
    return named
