"""`layerprobe status`: what a run holds."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.arguments import (
    Add,
    add_bins,
    add_preset,
    add_run,
    add_tokens,
    add_wide,
    chosen_run,
)
from simpletuner_layerprobe.commands.imports import light
from simpletuner_layerprobe.commands.output import OK, bin_labels, print_json, print_text, print_verdict, say
from simpletuner_layerprobe.show.words import counted, size_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.show.verdict import Verdict

HISTOGRAM_WIDTH = 40


def add_parser(add: Add) -> None:
    added = add(
        "status",
        command,
        "print what a run holds, and what it comes to",
        "",
        "layerprobe status output/sd35-probe/layerprobe",
    )
    add_run(added)
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_bins(added)
    add_tokens(added, "that the factors are judged by")
    add_preset(added)
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.verdict import verdict

    run = load(chosen_run(arguments))
    run.samples_in(arguments.tokens).require()
    with light("lycoris", arguments):  # which counts what the run's own config trains
        judged = verdict(run, arguments.tokens, arguments.preset)
    if arguments.json:
        print_json(_as_json(run, judged, arguments.bins))
        return OK
    manifest = run.manifest
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    facts = {
        "run": str(run.path),
        "model": f"{run.model or 'unknown'}, {counted(len(run.blocks), 'block')}",
        "recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "versions": versions or "unknown",
        "samples": run.counted + _ranks(run),
        "streams": ", ".join(f"{name} {counted(len(blocks), 'block')}" for name, blocks in run.streams.items()),
        "readings": ", ".join(run.readings),
        "modules": f"{len(manifest.modules):,} in the module table" if manifest.modules else "no module table",
        "backends": ", ".join(f"{name or 'unknown'}: {count:,}" for name, count in _backends(run).items()),
        **({"ablation": run.ablated} if run.ablated else {}),
        "non-finite": ", ".join(f"{name}: {count:,}" for name, count in _nonfinite(run).items()) or "none",
        "size": _size(run),
    }
    for name, value in facts.items():
        print_text(f"{name:<12}", value, wide=arguments.wide)
    say(f"{'sigma':<12}samples per bin, 0 clean .. 1 noise")
    counts = run.counts(arguments.bins).tolist()
    for label, count in zip(bin_labels(arguments.bins), counts, strict=True):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * count / max(counts))
        say(f"  {label:<14}{count:>12,}  {bar or '(none)'}")
    say()
    say("Verdict")
    print_verdict(judged, wide=arguments.wide)
    return OK


def _as_json(run: Run, judged: Verdict, bins: int) -> dict[str, Any]:
    """What `status --json` prints. Numbers that are not known are null."""
    manifest = run.manifest
    return {
        "run": str(run.path),
        "model": run.model or None,
        "created": manifest.created or None,
        "source": manifest.source,
        "versions": dict(manifest.versions),
        "samples": run.samples,
        "images": run.images,
        "streams": {name: list(blocks) for name, blocks in run.streams.items()},
        "readings": list(run.readings),
        "modules": len(manifest.modules),
        "backends": _backends(run),
        "ablated": run.ablated or None,
        "nonfinite": _nonfinite(run),
        "files": [{"file": str(file.path), "rank": file.rank, "samples": file.samples} for file in run.files],
        "samples_by_sigma": run.counts(bins).tolist(),
        "verdict": dict(judged.lines),
        "commands": dict(judged.commands),
    }


def _backends(run: Run) -> dict[str, int]:
    return dict(sorted(Counter(run.facts["backend"].tolist()).items()))


def _ranks(run: Run) -> str:
    """ " (rank 0: 60, rank 1: 60)", "" without stream files."""
    samples = Counter[int]()
    for file in run.files:
        samples[file.rank] += file.samples
    torn = sum(file.torn for file in run.files)
    said = [f"rank {rank}: {count:,}" for rank, count in sorted(samples.items())]
    said += [f"{counted(torn, 'stream file')} cut off in its last flush, as a kill leaves it"] if torn else []
    return f" ({', '.join(said)})" if said else ""


def _nonfinite(run: Run) -> dict[str, int]:
    """The samples that are left out of a stream, by stream and reading."""
    counts = {
        f"{stream} {reading}": heatmap.nonfinite
        for reading in ("last", "mean", "ablation", "ablation_text")
        if reading in run.readings and run.samples_in(reading).samples
        for stream, heatmap in run.heatmaps(reading).items()
    }
    return {name: count for name, count in counts.items() if count}


def _size(run: Run) -> str:
    paths = [file.path for file in run.files] or [run.path]
    kind = "stream file" if run.files else "file"
    return f"{size_text(sum(path.stat().st_size for path in paths))} in {counted(len(paths), kind)}"
