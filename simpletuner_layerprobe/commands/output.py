"""What the commands print and write, and how."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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


def warn(message: str) -> None:
    print(f"layerprobe: warning: {message}", file=sys.stderr)


def warn_of_samples(run: Run, reading: str | None, bins: int) -> None:
    """One warning per stream for bins without samples, and one for samples that were left out."""
    for name, heatmap in run.heatmaps(reading, bins=bins).items():
        empty = heatmap.empty_bins()
        if empty:
            labels = bin_labels(bins)
            shown = ", ".join(labels[t] for t in empty[:5]) + (", ..." if len(empty) > 5 else "")
            warn(
                f"{len(empty)} of {bins} sigma bins have no samples {stream_text(name)} ({shown}); "
                "they count as 0, as in the article: record more samples"
            )
        if heatmap.nonfinite:
            warn(f"{heatmap.nonfinite:,} samples are left out {stream_text(name)}: numbers not finite")


def print_json(result: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(result, indent=2, allow_nan=False))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str, indent: str = "") -> None:
    """Columns as wide as they need to be. sides: LEFT or RIGHT for each."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True))
        print(f"{indent}{'  '.join(cells)}".rstrip())


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
