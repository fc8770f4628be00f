"""`layerprobe status`: what a run holds."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_preset, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, bin_labels, say, size_text
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.show.words import counted

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run

HISTOGRAM_WIDTH = 40


def add_parser(add: Add) -> None:
    added = add(
        "status",
        command,
        "print what a run holds",
        "",
        "layerprobe status output/sd35-probe/layerprobe",
    )
    add_run(added)
    add_bins(added)
    add_tokens(added, "that the factors are judged by")
    add_preset(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load

    run = load(arguments.run)
    run.samples_in(arguments.tokens).require()
    manifest = run.manifest
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    backends = Counter(run.facts["backend"].tolist())
    facts = {
        "run": str(run.path),
        "model": f"{run.model or 'unknown'}, {counted(len(run.blocks), 'block')}",
        "recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "versions": versions or "unknown",
        "samples": run.counted + _ranks(run),
        "streams": ", ".join(f"{name} {counted(len(blocks), 'block')}" for name, blocks in run.streams.items()),
        "readings": ", ".join(run.readings),
        "modules": f"{len(manifest.modules):,} in the module table" if manifest.modules else "no module table",
        "backends": ", ".join(f"{name or 'unknown'}: {count:,}" for name, count in sorted(backends.items())),
        **({"ablation": run.ablated} if run.ablated else {}),
        "non-finite": _nonfinite(run) or "none",
        "settled": _settled(run, arguments),
        "size": _size(run),
    }
    for name, value in facts.items():
        say(f"{name:<12}{value}")
    say(f"{'sigma':<12}samples per bin, 0 clean .. 1 noise")
    counts = run.counts(arguments.bins).tolist()
    for label, count in zip(bin_labels(arguments.bins), counts, strict=True):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * count / max(counts))
        say(f"  {label:<14}{count:>12,}  {bar or '(none)'}")
    return OK


def _ranks(run: Run) -> str:
    """ " (rank 0: 60, rank 1: 60)", "" without stream files."""
    samples = Counter[int]()
    for file in run.files:
        samples[file.rank] += file.samples
    torn = sum(file.torn for file in run.files)
    said = [f"rank {rank}: {count:,}" for rank, count in sorted(samples.items())]
    said += [f"{counted(torn, 'stream file')} cut off in its last flush, as a kill leaves it"] if torn else []
    return f" ({', '.join(said)})" if said else ""


def _nonfinite(run: Run) -> str:
    """The samples that are left out of a stream, by stream and reading."""
    counts = {
        f"{stream} {reading}": heatmap.nonfinite
        for reading in ("last", "mean", "ablation", "ablation_text")
        if reading in run.readings and run.samples_in(reading).samples
        for stream, heatmap in run.heatmaps(reading).items()
    }
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count)


def _settled(run: Run, arguments: argparse.Namespace) -> str:
    """What the factors of a preset still need."""
    from simpletuner_layerprobe.api.options import WEIGHED

    preset = arguments.preset or run.preset
    options = {"preset": preset, "reading": arguments.tokens, "direction": WEIGHED}
    try:
        sure, times = run.confidence(**options), run.times_to_settle(**options)
    except ProbeError as error:
        return f"unknown: {error}"
    what = f"{sure.text()} (preset {preset})"
    if not sure.enough:  # nor to judge by how many more would do
        return what
    if times is None:
        return f"{what}; far more {sure.unit}s than there are would not settle all"
    return what if times == 1 else f"{what}; about {times} times the {sure.unit}s would settle all"


def _size(run: Run) -> str:
    paths = [file.path for file in run.files] or [run.path]
    kind = "stream file" if run.files else "file"
    return f"{size_text(sum(path.stat().st_size for path in paths))} in {counted(len(paths), kind)}"
