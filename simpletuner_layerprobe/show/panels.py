"""The parts that figures are made of: a canvas, its head, a panel of cells, the axis of blocks.

matplotlib is imported inside the functions, draws with Agg and leaves no global state behind.
Shape letters: Y rows, L blocks.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.targets import MAKER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_PER_INCH = 150
INK, MUTED = "#222222", "#6b6b6b"
COLOUR_MAP = "viridis"  # monotone in lightness, and read alike with every common colour blindness
SIGNED_COLOUR_MAP = "PuOr"  # two hues that every common colour blindness tells apart, pale at 0
HEAD_INCHES = 0.62


def style() -> AbstractContextManager[None]:
    """matplotlib's own defaults plus the house style, whatever the user's matplotlibrc says."""
    import matplotlib

    kept = {"backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.address"}
    defaults: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in kept}
    house: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.5,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "svg.hashsalt": "layerprobe",
        "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
    }
    return matplotlib.rc_context(rc={**defaults, **house})


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own (inches), outside pyplot, drawn by Agg, with room for `head` left free at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - HEAD_INCHES / height))
    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def head(figure: Figure, title: str, facts: Sequence[str]) -> None:
    """Title and one line of facts, left-aligned above the panels, smaller where the figure is too narrow for them."""
    width, height = figure.get_size_inches()
    left = 0.12 / width
    line = "   ·   ".join(fact for fact in facts if fact)
    for text in (
        figure.text(left, 1 - 0.14 / height, title, fontsize=12.5, weight="bold", va="top", ha="left"),
        figure.text(left, 1 - 0.40 / height, line, fontsize=9, color=MUTED, va="top", ha="left"),
    ):
        room = (1 - 2 * left) * figure.bbox.width
        needed = text.get_window_extent().width
        if needed > room:
            text.set_fontsize(text.get_fontsize() * room / needed)


def rendered(figure: Figure, file_format: str) -> bytes:
    """The figure as PNG (PIXELS_PER_INCH) or SVG, which says who made it, without dates or versions in it."""
    metadata = {"Software": MAKER} if file_format == "png" else {"Date": None, "Creator": MAKER}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=PIXELS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def panel_width(blocks: int, panels: int) -> float:
    """The width in inches of each of so many panels side by side."""
    narrowest, widest = (5.0, 9.0) if panels > 1 else (6.5, 14.0)
    return float(np.clip(0.19 * blocks + 1.2, narrowest, widest))


def cells(
    axes: Axes,
    shown_YL: NDArray[np.float64],
    row_edges: NDArray[np.float64],
    unit: str,
    *,
    signed: bool = False,
    symmetric: bool = False,
    clipped: bool = False,
    vector: bool = False,
) -> None:
    """A panel of coloured cells with its colour bar, called `unit`; cells that are not finite stay white.

    row_edges: (Y + 1,). signed: 0 is the middle of the colours. symmetric: these go by the logarithm on both
    sides of 0, from a tenth of the median number on. clipped: larger values share the last colour.
    vector: for SVG, whose viewers leave hairlines between neighbouring cells; a thin edge covers them.
    """
    from matplotlib.colors import Normalize, SymLogNorm

    rows, L = shown_YL.shape
    finite_YL = np.isfinite(shown_YL)
    low, high = (float(np.nanmin(shown_YL)), float(np.nanmax(shown_YL))) if finite_YL.any() else (0.0, 1.0)
    if signed:
        low, high = -max(-low, high), max(-low, high)
    high = high if high > low else low + 1e-6
    middle = float(np.median(np.abs(shown_YL[finite_YL]))) if finite_YL.any() else 1.0
    linear = max(middle, high * 1e-6) / 10
    norm = SymLogNorm(linear, vmin=low, vmax=high) if symmetric else Normalize(low, high)
    mesh = axes.pcolormesh(
        np.arange(L + 1) - 0.5,
        row_edges,
        np.ma.masked_invalid(shown_YL),
        cmap=SIGNED_COLOUR_MAP if signed else COLOUR_MAP,
        norm=norm,
        edgecolors="face",
        linewidth=0.2 if vector else 0.0,
        rasterized=rows > 50,
    )
    axes.set_xlim(-0.5, L - 0.5)
    axes.set_ylim(row_edges[0], row_edges[-1])
    bar = axes.figure.colorbar(mesh, ax=axes, extend="max" if clipped else "neither", pad=0.015, aspect=16)
    bar.set_label(unit, fontsize=8)
    if symmetric:
        first, last = (int(np.floor(np.log10(size))) for size in (5 * linear, high))
        sizes = [10.0**decade for decade in range(first + 1, last + 1)][-4:]
        bar.set_ticks([*(-size for size in reversed(sizes)), 0.0, *sizes], minor=False)
        bar.minorticks_off()
        bar.ax.yaxis.set_major_formatter("{x:.3g}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)


def list_starts(blocks: Sequence[str]) -> list[tuple[int, str]]:
    """Where each block list of the model begins, and its path: (block number, "transformer_blocks")."""
    lists = [block.rpartition(".")[0] for block in blocks]
    return [(i, name) for i, name in enumerate(lists) if i == 0 or name != lists[i - 1]]


def list_boundaries(axes: Axes, blocks: Sequence[str]) -> None:
    """A line wherever another block list of the model begins."""
    for start, _ in list_starts(blocks)[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=2.2, zorder=3)
        axes.axvline(start - 0.5, color=INK, linewidth=0.8, zorder=4)


def block_labels(axes: Axes, blocks: Sequence[str], width: float) -> None:
    """Block numbers under the axes, and the names of the block lists if the model has several.

    `width` is that of the blocks in inches: numbers are left out, and names too, where there is no room.
    """
    L = len(blocks)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if width / L * s >= 0.24), 100)
    axes.set_xticks(range(0, L, step))
    axes.set_xticks(range(L), minor=True)
    axes.tick_params(axis="x", which="minor", length=1.5)
    starts = list_starts(blocks)
    if len(starts) == 1:
        return
    axes.xaxis.labelpad = 14
    for (start, name), end in zip(starts, [*(start for start, _ in starts[1:]), L], strict=True):
        if width / L * (end - start) >= 0.066 * len(name):
            axes.annotate(
                name,
                ((start + end - 1) / 2, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -17),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7.5,
                color=MUTED,
            )
