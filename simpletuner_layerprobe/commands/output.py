"""What the commands print and write, and how."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.show.words import stream_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.show.verdict import Verdict

OK = 0
LEFT, RIGHT = "<", ">"
GAP = 2
NARROWEST = 16
"""The last column of a table is given at least so much before columns are left out."""


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


def room(wide: bool = False) -> int:
    """How many columns there are to print in: the terminal's, or what COLUMNS says; 80 where neither is known."""
    return sys.maxsize if wide else shutil.get_terminal_size().columns


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    sides: str,
    indent: str = "",
    *,
    spare: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """Columns as wide as they need to be, in a table that fits the terminal, unless `wide`.

    sides: LEFT or RIGHT for each. spare: heads of the columns that are left out, in this order, while the table is too
    wide; a last column of text wraps in its own width.
    """
    columns = list(zip(sides, zip(heads, *rows, strict=True), strict=True))
    free, left_out = room(wide) - len(indent), []
    for head in spare:
        kept = [column for column in columns if column[1][0] != head]
        if sum(_widths(columns, 0)) + GAP * (len(columns) - 1) > free and len(kept) < len(columns):
            columns = kept
            left_out.append(head)
    widths = _widths(columns, free)
    for cells in zip(*(cells for _, cells in columns), strict=True):
        *first, last = cells
        for line in _wrapped(last, max(widths[-1], 1)) or [""]:
            shown = zip((*first, line), (side for side, _ in columns), widths, strict=True)
            print(f"{indent}{(GAP * ' ').join(f'{text:{side}{width}}' for text, side, width in shown)}".rstrip())
            first = [""] * len(first)
    if left_out:
        print_text(f"{indent}left out to fit (--wide shows all): ", ", ".join(left_out))


def _widths(columns: Sequence[tuple[str, Sequence[str]]], free: int) -> list[int]:
    """Of each column; the last, if it is text, takes what `free` leaves to it, and at least NARROWEST."""
    widths = [max(map(len, cells)) for _, cells in columns]
    if columns[-1][0] == LEFT:
        widths[-1] = min(widths[-1], max(NARROWEST, free - sum(widths[:-1]) - GAP * (len(columns) - 1)))
    return widths


def print_text(label: str, text: str, *, wide: bool = False) -> None:
    """A label and a text beside it that wraps in its own width."""
    free = max(room(wide) - len(label), NARROWEST)
    print("\n".join((label if i == 0 else " " * len(label)) + line for i, line in enumerate(_wrapped(text, free))))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, longer only for a word that is."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def print_verdict(verdict: Verdict, *, wide: bool = False) -> None:
    """The five lines, and the commands below them, each whole on its own line: to be copied."""
    for name, sentence in verdict.lines.items():
        print_text(f"{name:<12}", f"{sentence}.", wide=wide)
    for name, command in verdict.commands.items():
        print(f"  {name:<10}{command}")


def bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]
