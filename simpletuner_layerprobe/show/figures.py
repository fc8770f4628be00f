"""The article's figures, and those of the further readings, as the bytes of a PNG or SVG file.

The same input gives the same bytes with the same versions of matplotlib and numpy.
Shape letters: T bins, L blocks, P blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.heatmap import Heatmap, PairHeatmap, bin_edges
from simpletuner_layerprobe.analyse.shapes import ranges
from simpletuner_layerprobe.readings import (
    ABLATION,
    ABLATION_CHANGE,
    ANGLE,
    UPDATE_COSINE,
    UPDATE_NORM,
    WHOLE,
    all_blocks,
    parse_reading,
)
from simpletuner_layerprobe.show import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLIP_PERCENTILE = 95
TOKENS = {"last": "last token", "mean": "mean over tokens", "": ""}
WHAT = {"combined": "mean of the streams", WHOLE: "whole block"}
_EMPTY = "#d9d9d9"
_FACTOR_BAR, _REPEATED_BAR, _CRITICAL_BAR = "#0072b2", "#9ecae1", "#d55e00"  # after Okabe and Ito


@dataclass(frozen=True)
class _View:
    """One way to show a heatmap: a row of panels. signed: 0 is the middle of the colours. symmetric: these go by the
    logarithm on both sides of it."""

    title: str
    unit: str
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    clipped: bool = False
    signed: bool = False
    symmetric: bool = False


def _clip(shown_TL: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(shown_TL, np.nanpercentile(shown_TL, CLIP_PERCENTILE))


def _log10(shown_TL: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log10(np.where(shown_TL > 0, shown_TL, np.nan))


def _rescaled_rows(value_PL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row from 0 (its least) to 1 (its largest); 0 where all are equal, NaN where there is none."""
    least_P1 = np.fmin.reduce(value_PL, axis=1, keepdims=True)
    span_P1 = np.fmax.reduce(value_PL, axis=1, keepdims=True) - least_P1
    return (value_PL - least_P1) / np.where(span_P1 == 0, 1.0, span_P1)


_DISTANCE = "angular distance (fraction of π)"
_RATIO = "|after - before| / |before|"
_LOSS = "loss increase"
_CHANGE = "|with - without| / |with|"
_CLIPPED = f"clipped at the {CLIP_PERCENTILE}th percentile"
_VIEWS = {
    ANGLE: (
        _View("linear", _DISTANCE, np.asarray),
        _View("log1p", "ln(1 + angular distance)", np.log1p),
        _View(_CLIPPED, _DISTANCE, _clip, clipped=True),
    ),
    UPDATE_NORM: (
        _View("linear", _RATIO, np.asarray),
        _View("logarithm", f"log10 {_RATIO}", _log10),
        _View(_CLIPPED, _RATIO, _clip, clipped=True),
    ),
    UPDATE_COSINE: (_View("cosine", "cosine of (after - before) and before", np.asarray, signed=True),),
    ABLATION: (
        _View("linear", _LOSS, np.asarray),
        _View("logarithm on both sides of 0", _LOSS, np.asarray, signed=True, symmetric=True),
        _View(_CLIPPED, _LOSS, _clip, clipped=True),
    ),
    ABLATION_CHANGE: (
        _View("linear", _CHANGE, np.asarray),
        _View("logarithm", f"log10 {_CHANGE}", _log10),
        _View(_CLIPPED, _CHANGE, _clip, clipped=True),
    ),
}
_PAIR_VIEWS = (
    _View("linear", _DISTANCE, np.asarray),
    _View("each row rescaled", "0 least of the row, 1 largest", _rescaled_rows),
)
TITLES = {
    ANGLE: "Figure 1.  How much each block changes the hidden states, by stream",
    UPDATE_NORM: "How much each block adds to the hidden states, by stream",
    UPDATE_COSINE: "Whether each block adds along the hidden states or against them, by stream",
    ABLATION: "How much the loss rises when a block is left out",
    ABLATION_CHANGE: "How much the prediction changes when a block is left out",
}
COMBINED_TITLE = "Figure 2.  How much each block changes the hidden states, streams combined"
PAIRS_TITLE = "How far several blocks in a row change the hidden states, by stream"


def heatmap_figure(
    heatmaps: Sequence[Heatmap], *, title: str = "", samples: str = "", model: str = "", file_format: str = "png"
) -> bytes:
    """Figure 1 (one column of panels per stream) and Figure 2 (their mean alone), and those of update readings.

    Distances are shown linear, as log1p and clipped at the 95th percentile; relative norms linear, as their logarithm
    and clipped; cosines with colours that have 0 in the middle; loss increases linear, by their logarithm on both sides
    of 0, and clipped. Columns are blocks by number, rows sigma bins from 0
    (clean) at the bottom to 1 (noise) at the top. Cells without samples are grey; the percentile is over the others. A
    block that a stream lacks is blank and says so: a number means the same block in every panel.

    title: that of the reading if it is empty. samples: how many there are, in words ("2,000 samples of 60 images").
    """
    reading = parse_reading(heatmaps[0].reading)
    empty_T = np.any([heatmap.counts_T == 0 for heatmap in heatmaps], axis=0)
    left_out = max(heatmap.nonfinite for heatmap in heatmaps)
    facts = (
        model,
        samples,
        TOKENS[reading.tokens],
        f"{left_out:,} left out (not finite)" if left_out else "",
        "grey: no samples" if empty_T.any() else "",
    )

    def draw(axes: Axes, heatmap: Heatmap, blocks: Sequence[str], view: _View) -> None:
        _heat_panel(axes, heatmap, blocks, view, vector=file_format == "svg")

    return _grid(
        heatmaps,
        _VIEWS[reading.kind],
        draw,
        row_inches=2.75,
        labels=("block number", "sigma bin  (0 clean, 1 noise)"),
        title=title or TITLES[reading.kind],
        facts=facts,
        file_format=file_format,
    )


def pairs_figure(
    pairs: Sequence[PairHeatmap], *, samples: str = "", model: str = "", file_format: str = "png"
) -> bytes:
    """Angular distance over several blocks in a row, one column of panels per stream.

    Columns are the first block, rows the number of blocks; below, each row from its least (0) to its largest (1)
    distance, as in arXiv 2403.17887. Cells without such a pair are white.
    """
    from matplotlib.ticker import MaxNLocator

    spans = len(pairs[0].values_PL)

    def draw(axes: Axes, heatmap: PairHeatmap, blocks: Sequence[str], view: _View) -> None:
        shown_PL = np.full((spans, len(blocks)), np.nan)
        shown_PL[:, [blocks.index(block) for block in heatmap.blocks]] = view.transform(heatmap.values_PL)
        panels.cells(axes, shown_PL, np.arange(0.5, spans + 1), view.unit, vector=file_format == "svg")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))

    return _grid(
        pairs,
        _PAIR_VIEWS,
        draw,
        row_inches=float(np.clip(0.2 * spans + 1.0, 1.7, 7.0)),
        labels=("first block", "blocks in a row"),
        title=PAIRS_TITLE,
        facts=(
            model,
            samples,
            TOKENS[parse_reading(pairs[0].reading).tokens],
            "mean over sigma bins",
            "white: no such pair",
        ),
        file_format=file_format,
    )


def factor_figure(
    blocks: Sequence[str],
    factors: Sequence[int],
    heights: Sequence[float],
    *,
    unit: str = "trainable parameters",
    critical: Sequence[int] = (),
    repeated: Sequence[int] = (),
    model: str = "",
    file_format: str = "png",
) -> bytes:
    """Figure 3: what each block gets, a taller bar for more, and its LoKr factor above the bar.

    heights, unit: the parameters of each block or, where they are not known, its contribution. `critical` and
    `repeated` are block numbers.
    Critical blocks have their own colour; blocks that repeat their neighbour's factor,
    because a stream lacks them, are pale.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    L = len(blocks)
    width = float(np.clip(2.2 + 0.24 * L, 7.0, 18.0))
    kinds = {
        "from the contribution": (_FACTOR_BAR, set(range(L)) - set(critical) - set(repeated)),
        "critical: 1": (_CRITICAL_BAR, set(critical)),
        "repeats the nearest block": (_REPEATED_BAR, set(repeated) - set(critical)),
    }
    with panels.style():
        figure = panels.new_figure(width, 4.4)
        axes = figure.add_subplot()
        for colour, numbers in kinds.values():
            own = sorted(numbers)
            bars = axes.bar(own, [heights[i] for i in own], width=0.82, color=colour, zorder=2)
            ink = _CRITICAL_BAR if colour == _CRITICAL_BAR else panels.INK
            axes.bar_label(bars, [str(factors[i]) for i in own], padding=2, fontsize=7.5, color=ink)
        panels.list_boundaries(axes, blocks)
        panels.block_labels(axes, blocks, width - 1.0)
        axes.set_xlim(-0.7, L - 0.3)
        axes.set_ylim(0, 1.09 * max(*heights, 1e-6))
        axes.set_xlabel("block number")
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7, zorder=0)
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "right", "top"]].set_visible(False)
        entries = [Patch(facecolor=colour, label=label) for label, (colour, numbers) in kinds.items() if numbers]
        if len(entries) > 1:
            figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=8.5)
        facts = ("above a bar: its factor, smaller for more parameters", "attention gets twice the factor", model)
        panels.head(figure, "Figure 3.  What each block gets by the article's recipe", facts)
        return panels.rendered(figure, file_format)


def _grid[H: Heatmap | PairHeatmap](
    heatmaps: Sequence[H],
    views: Sequence[_View],
    draw: Callable[[Axes, H, Sequence[str], _View], None],
    *,
    row_inches: float,
    labels: tuple[str, str],
    title: str,
    facts: Sequence[str],
    file_format: str,
) -> bytes:
    """A grid of panels: one column per heatmap and one row per view. labels: of the two axes."""
    blocks = all_blocks([heatmap.blocks for heatmap in heatmaps])
    width = panels.panel_width(len(blocks), len(heatmaps))
    with panels.style():
        figure = panels.new_figure(width * len(heatmaps), row_inches * len(views) + 1.0)
        grid = figure.subplots(len(views), len(heatmaps), squeeze=False, sharex=True, sharey=True)
        for axes_row, view in zip(grid, views, strict=True):
            for axes, heatmap in zip(axes_row, heatmaps, strict=True):
                draw(axes, heatmap, blocks, view)
                panels.list_boundaries(axes, blocks)
                ablated = parse_reading(heatmap.reading).ablation
                what = WHAT.get(heatmap.stream, f"{heatmap.stream} {'update alone' if ablated else 'stream'}")
                axes.set_title(f"{what}, {view.title}", loc="left")
            axes_row[0].set_ylabel(labels[1])
        for axes in grid[-1]:
            panels.block_labels(axes, blocks, width - 1.7)
            axes.set_xlabel(labels[0])
        panels.head(figure, title, facts)
        return panels.rendered(figure, file_format)


def _heat_panel(axes: Axes, heatmap: Heatmap, blocks: Sequence[str], view: _View, *, vector: bool) -> None:
    """One heatmap in one view: its cells, the bins without samples, the blocks that the stream lacks."""
    T, L = len(heatmap.counts_T), len(blocks)
    edges = bin_edges(T)
    own_L = [blocks.index(block) for block in heatmap.blocks]
    filled_T = heatmap.counts_T > 0
    shown_TL = np.full((T, L), np.nan)
    if filled_T.any():
        shown_TL[np.ix_(filled_T, own_L)] = view.transform(heatmap.values_TL[filled_T])
    look = {"signed": view.signed, "symmetric": view.symmetric, "clipped": view.clipped, "vector": vector}
    panels.cells(axes, shown_TL, edges, view.unit, **look)
    for t in np.flatnonzero(~filled_T):
        axes.axhspan(edges[t], edges[t + 1], color=_EMPTY, linewidth=0)
    for left, right in ranges(~np.isin(np.arange(L), own_L)):
        axes.axvspan(left - 0.5, right + 0.5, color="white", linewidth=0)
        place = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 7, "color": panels.MUTED}
        axes.text((left + right) / 2, 0.5, f"not in the {heatmap.stream} stream", **place)  # type: ignore[arg-type]
    axes.set_yticks(edges if T <= 10 else np.linspace(0.0, 1.0, 6))
    axes.yaxis.set_major_formatter("{x:.3g}")
