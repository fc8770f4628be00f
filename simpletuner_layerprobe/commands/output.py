"""What the commands print and write, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.printable import printable
from simpletuner_layerprobe.show.words import stream_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run

OK = 0
LEFT, RIGHT = "<", ">"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch, diffusers and LyCORIS from warning about themselves while they are imported and used."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def say(line: str = "", *, flush: bool = False) -> None:
    """Print one line. All that commands print goes through here, and is escaped."""
    print(printable(line), flush=flush)


def warn(*messages: str) -> None:
    """What a command warns of, if anything: one line."""
    if messages:
        print(f"layerprobe: warning: {printable('; '.join(messages))}", file=sys.stderr)


def sample_warnings(run: Run, reading: str | None, bins: int) -> Iterator[str]:
    """A warning of bins without samples, in whichever stream, and one per stream of samples that were left out."""
    heatmaps = run.heatmaps(reading, bins=bins)
    empty_in: dict[tuple[int, ...], list[str]] = {}
    for name, heatmap in heatmaps.items():
        empty_in.setdefault(heatmap.empty_bins(), []).append(name)
    for empty, names in empty_in.items():
        if empty:
            labels = bin_labels(bins)
            shown = ", ".join(labels[t] for t in empty[:5]) + (", ..." if len(empty) > 5 else "")
            where = "" if len(names) == len(heatmaps) else f" {stream_text(names[0])}"
            yield (
                f"{len(empty)} of {bins} sigma bins have no samples{where} ({shown}) and count as 0, as in the "
                "article; record more samples, or take fewer --bins"
            )
    for name, heatmap in heatmaps.items():
        if heatmap.nonfinite:
            yield f"{heatmap.nonfinite:,} samples are left out {stream_text(name)}: numbers not finite"


def print_json(result: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(result, indent=2, allow_nan=False))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str, indent: str = "") -> None:
    """Columns as wide as they need to be. sides: LEFT or RIGHT for each."""
    lines = [[printable(text) for text in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True))
        say(f"{indent}{'  '.join(cells)}".rstrip())


def bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]


def size_text(size_bytes: int) -> str:
    """A size in decimal units, as disks and model pages give it: "1.53 GB"."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
