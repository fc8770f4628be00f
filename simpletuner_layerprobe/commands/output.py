"""What the commands print and write, and how."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.printable import printable
from simpletuner_layerprobe.show.words import stream_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.show.verdict import Verdict

OK = 0
LEFT, RIGHT = "<", ">"
GAP = 2
LABEL = 9
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
    lines = [[printable(text) for text in row] for row in (heads, *rows)]
    columns = list(zip(sides, zip(*lines, strict=True), strict=True))
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
            say(f"{indent}{(GAP * ' ').join(f'{text:{side}{width}}' for text, side, width in shown)}".rstrip())
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
    for i, line in enumerate(_wrapped(printable(text), free)):
        say((" " * len(label) if i else label) + line)


def print_line(line: str, *, wide: bool = False) -> None:
    """A line that begins with a label of nine columns; what follows wraps in its own width."""
    print_text(line[:LABEL], line[LABEL:], wide=wide)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many columns, longer only for a word that is."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def print_verdict(verdict: Verdict, *, wide: bool = False) -> None:
    """The five lines, and the commands below them, to be copied: too long ones go on behind a backslash."""
    for name, sentence in verdict.lines.items():
        print_text(f"{name:<12}", f"{sentence}.", wide=wide)
    for name, command in verdict.commands.items():
        _print_command(f"  {name:<10}", command, wide=wide)


def _print_command(label: str, command: str, *, wide: bool) -> None:
    """A command beside its label, in lines that a shell takes for one where it is too wide."""
    words: list[str] = []
    for word in shlex.split(command):
        if word.startswith("--") or not words:
            words.append(word)
        else:  # an option keeps its value
            words[-1] += f" {shlex.quote(word)}"
    lines = words[:1]
    for word in words[1:]:
        if len(label) + len(f"{lines[-1]} {word} \\") > room(wide):
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    for i, line in enumerate(lines):
        say((" " * len(label) if i else label) + line + " \\" * (i < len(lines) - 1))


def bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]
