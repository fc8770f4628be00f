"""The article's figures and the heatmaps as arrays.

Everything is returned as bytes; the same input gives the same bytes with the same versions of matplotlib
and numpy. matplotlib is imported inside the functions, draws with Agg and leaves no global state behind.

Shape letters: T bins, L blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.heatmap import Heatmap, PairHeatmap, all_blocks, bin_edges
from simpletuner_layerprobe.readings import UPDATE_COSINE, UPDATE_NORM, parse_reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_CLIP_PERCENTILE = 95
FORMATS = ("png", "svg")
PIXELS_PER_INCH = 150

_COLOUR_MAP = "viridis"  # monotone in lightness, and read alike with every common colour blindness
_SIGNED_COLOUR_MAP = "PuOr"  # two hues that every common colour blindness tells apart, pale at 0
_HEAD_INCHES = 0.62
_INK = "#222222"
_MUTED = "#6b6b6b"
_EMPTY_FACE, _EMPTY_STROKE = "#f2f2f2", "#a8a8a8"
_FACTOR_BAR, _REPEATED_BAR, _CRITICAL_BAR = "#0072b2", "#9ecae1", "#d55e00"  # after Okabe and Ito
_READINGS = {"last": "last token", "mean": "mean over tokens"}


@dataclass(frozen=True)
class _View:
    """One way to show a heatmap: its row of panels in Figures 1 and 2. signed: 0 is the middle of the colours."""

    title: str
    unit: str
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    clipped: bool = False
    signed: bool = False


def _clip(filled_TL: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(filled_TL, np.percentile(filled_TL, FIGURE_CLIP_PERCENTILE))


_VIEWS = (
    _View("linear", "angular distance (fraction of π)", lambda filled_TL: filled_TL),
    _View("log1p", "ln(1 + angular distance)", np.log1p),
    _View(
        f"clipped at the {FIGURE_CLIP_PERCENTILE}th percentile",
        "angular distance (fraction of π)",
        _clip,
        clipped=True,
    ),
)


def _log10(filled_TL: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log10(np.where(filled_TL > 0, filled_TL, np.nan))


_RATIO = "|after - before| / |before|"
_READING_VIEWS = {
    UPDATE_NORM: (
        _View("linear", _RATIO, lambda filled_TL: filled_TL),
        _View("logarithm", f"log10 {_RATIO}", _log10),
        _View(f"clipped at the {FIGURE_CLIP_PERCENTILE}th percentile", _RATIO, _clip, clipped=True),
    ),
    UPDATE_COSINE: (
        _View("cosine", "cosine of (after - before) and before", lambda filled_TL: filled_TL, signed=True),
    ),
}
_READING_TITLES = {
    UPDATE_NORM: "How much each block adds to the hidden states, by stream",
    UPDATE_COSINE: "Whether each block adds along the hidden states or against them, by stream",
}


def streams_figure(streams: Mapping[str, Heatmap], *, model: str = "", file_format: str = "png") -> bytes:
    """Figure 1: one column of panels per stream; rows linear, log1p, clipped at the 95th percentile.

    Columns of the heatmaps are blocks by number, rows are sigma bins from 0 (clean) at the bottom to 1
    (noise) at the top. Cells without samples are grey with a stroke; the percentile is over the others. A
    block that a stream lacks is blank and says so: a number means the same block in every panel.
    """
    return _heatmap_figure(
        tuple(streams.values()),
        what=[f"{name} stream" for name in streams],
        blocks=all_blocks([heatmap.blocks for heatmap in streams.values()]),
        title="Figure 1.  How much each block changes the hidden states, by stream",
        model=model,
        file_format=file_format,
    )


def combination_figure(combination: Heatmap, *, model: str = "", file_format: str = "png") -> bytes:
    """Figure 2: the plain mean of the streams (`analyse.heatmap.combined`) in the same three views."""
    return _heatmap_figure(
        (combination,),
        what=["mean of the streams"],
        blocks=combination.blocks,
        title="Figure 2.  How much each block changes the hidden states, streams combined",
        model=model,
        file_format=file_format,
    )


def reading_figure(streams: Mapping[str, Heatmap], *, model: str = "", file_format: str = "png") -> bytes:
    """The heatmaps of a reading of the blocks' updates, one column of panels per stream.

    A relative norm is shown linear, as its logarithm and clipped at the 95th percentile; a cosine with colours that
    have 0 in the middle. A cell is white where no sample has the number (an update of zero has no cosine).
    """
    kind = parse_reading(next(iter(streams.values())).tokens).kind
    return _heatmap_figure(
        tuple(streams.values()),
        what=[f"{name} stream" for name in streams],
        blocks=all_blocks([heatmap.blocks for heatmap in streams.values()]),
        title=_READING_TITLES[kind],
        model=model,
        file_format=file_format,
        views=_READING_VIEWS[kind],
    )


def pairs_figure(pairs: Mapping[str, PairHeatmap], *, model: str = "", file_format: str = "png") -> bytes:
    """Angular distance over several blocks in a row, one column of panels per stream.

    Columns are the first block, rows the number of blocks; below, each row from its least (0) to its largest (1)
    distance, as in arXiv 2403.17887. Cells without such a pair are white.
    """
    shown = tuple(pairs.values())
    blocks = all_blocks([heatmap.blocks for heatmap in shown])
    narrowest, widest = (5.0, 9.0) if len(shown) > 1 else (6.5, 14.0)
    panel_width = float(np.clip(0.19 * len(blocks) + 1.2, narrowest, widest))
    panel_height = float(np.clip(0.2 * len(shown[0].mean_PL) + 1.0, 1.7, 7.0))
    views = (
        ("linear", "angular distance (fraction of π)", lambda mean_PL: mean_PL),
        ("each row rescaled", "0 least of the row, 1 largest", _rescaled_rows),
    )
    with _style():
        figure = _new_figure(panel_width * len(shown), panel_height * len(views) + 1.0)
        grid = figure.subplots(len(views), len(shown), squeeze=False, sharex=True, sharey=True)
        for row, (title, unit, transform) in enumerate(views):
            for column, heatmap in enumerate(shown):
                axes = grid[row, column]
                _pair_panel(axes, heatmap, blocks, transform(heatmap.mean_PL), unit, 0.2 * (file_format == "svg"))
                axes.set_title(f"{heatmap.stream} stream, {title}", loc="left")
                if row == len(views) - 1:
                    _block_labels(axes, blocks, panel_width - 1.7)
                    axes.set_xlabel("first block")
                if column == 0:
                    axes.set_ylabel("blocks in a row")
        samples = shown[0].samples
        facts = (
            model,
            f"{samples:,} samples" if samples != 1 else "1 sample",
            _READINGS[shown[0].tokens],
            "mean over sigma bins",
            "white: no such pair",
        )
        _head(figure, "How far several blocks in a row change the hidden states, by stream", facts)
        return _rendered(figure, file_format)


def pairs_npz(pairs: Mapping[str, PairHeatmap]) -> bytes:
    """The heatmaps over pairs as an .npz file without pickled objects.

    For every stream S: S_pairs (P, L) float64, the mean angular distance (fraction of pi) over n = row + 1 blocks from
    the column's block on, NaN where there is no such pair; S_blocks (L,) str. And once: tokens () str.
    """
    arrays: dict[str, NDArray[Any]] = {"tokens": np.array(next(iter(pairs.values())).tokens)}
    for heatmap in pairs.values():
        arrays[f"{heatmap.stream}_pairs"] = heatmap.mean_PL
        arrays[f"{heatmap.stream}_blocks"] = np.array(heatmap.blocks)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def factor_figure(
    blocks: Sequence[str],
    factors: Sequence[int],
    *,
    critical: Sequence[int] = (),
    repeated: Sequence[int] = (),
    max_factor: int = 12,
    model: str = "",
    file_format: str = "png",
) -> bytes:
    """Figure 3: the LoKr factor of each block. `critical` and `repeated` are block numbers.

    Critical blocks have their own colour and a bold number; blocks that repeat their neighbour's factor,
    because a stream lacks them, are pale.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    L = len(blocks)
    width = float(np.clip(2.2 + 0.24 * L, 7.0, 18.0))
    with _style():
        figure = _new_figure(width, 4.4)
        axes = figure.add_subplot()
        colour = [_CRITICAL_BAR if i in critical else _REPEATED_BAR if i in repeated else _FACTOR_BAR for i in range(L)]
        axes.bar(range(L), factors, width=0.82, color=colour, zorder=2)
        for i, factor in enumerate(factors):
            axes.annotate(
                str(factor),
                (i, factor),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                weight="bold" if i in critical else "normal",
                color=_CRITICAL_BAR if i in critical else _INK,
            )
        _list_boundaries(axes, blocks)
        _block_labels(axes, blocks, width - 1.0)
        axes.set_xlim(-0.7, L - 0.3)
        axes.set_ylim(0, max_factor * 1.09)
        axes.set_ylabel("LoKr factor")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7, zorder=0)
        axes.tick_params(axis="y", length=0)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        entries = [Patch(facecolor=_FACTOR_BAR, label="from the contribution")]
        if len(critical):
            entries.append(Patch(facecolor=_CRITICAL_BAR, label="critical: 1"))
        if len(repeated):
            entries.append(Patch(facecolor=_REPEATED_BAR, label="repeats the nearest block"))
        if len(entries) > 1:
            figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize=8.5)
        _head(
            figure,
            "Figure 3.  Weighted LoKr factor of each block",
            ("smaller factor, more parameters", "attention gets twice the factor", model),
        )
        return _rendered(figure, file_format)


def heatmap_npz(heatmaps: Mapping[str, Heatmap]) -> bytes:
    """The heatmaps as an .npz file without pickled objects (`numpy.load` reads it as it is).

    For every heatmap S ("image", "text", and "combined" if it is among them):
      S_mean       (T, L) float64: mean angular distance, fraction of pi; 0 where the bin has no sample
      S_count      (T,) int64: samples in each bin
      S_blocks     (L,) str: path of each block in the model
      S_nonfinite  () int64: samples left out because a distance was NaN or infinite
    and once: bin_edges (T + 1,) float64, sigma 0 (clean) .. 1 (noise); tokens () str, the reading.
    """
    first = next(iter(heatmaps.values()))
    arrays: dict[str, NDArray[Any]] = {"bin_edges": bin_edges(first.bins), "tokens": np.array(first.tokens)}
    for heatmap in heatmaps.values():
        arrays[f"{heatmap.stream}_mean"] = heatmap.mean_TL
        arrays[f"{heatmap.stream}_count"] = heatmap.count_T
        arrays[f"{heatmap.stream}_blocks"] = np.array(heatmap.blocks)
        arrays[f"{heatmap.stream}_nonfinite"] = np.array(heatmap.nonfinite)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _heatmap_figure(
    heatmaps: Sequence[Heatmap],
    *,
    what: Sequence[str],
    blocks: Sequence[str],
    title: str,
    model: str,
    file_format: str,
    views: Sequence[_View] = _VIEWS,
) -> bytes:
    """A grid of panels: one column per heatmap, called `what`, and one row per view."""
    narrowest, widest = (5.0, 9.0) if len(heatmaps) > 1 else (6.5, 14.0)
    panel_width = float(np.clip(0.19 * len(blocks) + 1.2, narrowest, widest))
    with _style():
        figure = _new_figure(panel_width * len(heatmaps), 2.75 * len(views) + 1.0)
        grid = figure.subplots(len(views), len(heatmaps), squeeze=False, sharex=True, sharey=True)
        for row, view in enumerate(views):
            for column, heatmap in enumerate(heatmaps):
                axes = grid[row, column]
                # Viewers of SVG leave hairlines between neighbouring cells; a thin edge covers them.
                _panel(axes, heatmap, blocks, view, edge=0.2 if file_format == "svg" else 0.0)
                axes.set_title(f"{what[column]}, {view.title}", loc="left")
                if row == len(views) - 1:
                    _block_labels(axes, blocks, panel_width - 1.7)
                if column == 0:
                    axes.set_ylabel("sigma bin  (0 clean, 1 noise)")
        samples = max(int(heatmap.count_T.sum()) for heatmap in heatmaps)
        left_out = max(heatmap.nonfinite for heatmap in heatmaps)
        empty = any(heatmap.empty_bins() for heatmap in heatmaps)
        facts = (
            model,
            f"{samples:,} samples" if samples != 1 else "1 sample",
            _READINGS[parse_reading(heatmaps[0].tokens).tokens],
            f"{left_out:,} left out (not finite)" if left_out else "",
            "grey with a stroke: no samples" if empty else "",
        )
        _head(figure, title, facts)
        return _rendered(figure, file_format)


def _panel(axes: Axes, heatmap: Heatmap, blocks: Sequence[str], view: _View, *, edge: float) -> None:
    """One heatmap in one view, with its colour bar. `edge`: line width around each cell, in points."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    T, L = heatmap.bins, len(blocks)
    edges = bin_edges(T)
    shown_TL = np.full((T, L), np.nan)
    own_L = [blocks.index(block) for block in heatmap.blocks]
    filled_T = heatmap.count_T > 0
    if filled_T.any():
        shown_TL[np.ix_(filled_T, own_L)] = view.transform(heatmap.mean_TL[filled_T])
    low, high = (np.nanmin(shown_TL), np.nanmax(shown_TL)) if np.isfinite(shown_TL).any() else (0.0, 1.0)
    if view.signed:
        low, high = -max(-low, high), max(-low, high)
    if not high > low:
        high = low + 1e-6
    mesh = axes.pcolormesh(
        np.arange(L + 1) - 0.5,
        edges,
        np.ma.masked_invalid(shown_TL),
        cmap=_SIGNED_COLOUR_MAP if view.signed else _COLOUR_MAP,
        vmin=low,
        vmax=high,
        edgecolors="face",
        linewidth=edge,
        rasterized=T > 50,
    )
    has_block_L = np.isin(np.arange(L), own_L)
    for first, last in _spans(~filled_T):
        for left, right in _spans(has_block_L):
            corner, size = (left - 0.5, edges[first]), (right - left + 1, edges[last + 1] - edges[first])
            axes.add_patch(Rectangle(corner, *size, facecolor=_EMPTY_FACE, linewidth=0.0))
    # Lines of our own, not matplotlib's hatches: some viewers of SVG paint those black.
    strokes = [[(i - 0.5, edges[t]), (i + 0.5, edges[t + 1])] for t in np.flatnonzero(~filled_T) for i in own_L]
    axes.add_collection(LineCollection(strokes, colors=_EMPTY_STROKE, linewidths=0.7), autolim=False)
    for left, right in _spans(~has_block_L):
        axes.text(
            (left + right) / 2,
            0.5,
            f"not in the {heatmap.stream} stream",
            rotation=90,
            ha="center",
            va="center",
            fontsize=7,
            color=_MUTED,
        )
    _list_boundaries(axes, blocks)
    axes.set_xlim(-0.5, L - 0.5)
    axes.set_ylim(0.0, 1.0)
    axes.set_yticks(edges if T <= 10 else np.linspace(0.0, 1.0, 6))
    axes.yaxis.set_major_formatter("{x:.3g}")
    bar = axes.figure.colorbar(mesh, ax=axes, extend="max" if view.clipped else "neither", pad=0.015, aspect=16)
    bar.set_label(view.unit, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)


def _pair_panel(
    axes: Axes,
    heatmap: PairHeatmap,
    blocks: Sequence[str],
    shown_PL: NDArray[np.float64],
    unit: str,
    edge: float,
) -> None:
    """One stream's pairs with their colour bar. `edge`: line width around each cell, in points."""
    from matplotlib.ticker import MaxNLocator

    P, L = len(shown_PL), len(blocks)
    all_PL = np.full((P, L), np.nan)
    all_PL[:, [blocks.index(block) for block in heatmap.blocks]] = shown_PL
    mesh = axes.pcolormesh(
        np.arange(L + 1) - 0.5,
        np.arange(P + 1) + 0.5,
        np.ma.masked_invalid(all_PL),
        cmap=_COLOUR_MAP,
        edgecolors="face",
        linewidth=edge,
    )
    _list_boundaries(axes, blocks)
    axes.set_xlim(-0.5, L - 0.5)
    axes.set_ylim(0.5, P + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=16)
    bar.set_label(unit, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=2)


def _rescaled_rows(mean_PL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row from 0 (its least) to 1 (its largest); 0 where all are equal, NaN where there is none."""
    scaled_PL = np.full_like(mean_PL, np.nan)
    for row_L, value_L in zip(scaled_PL, mean_PL, strict=True):
        finite_L = np.isfinite(value_L)
        if finite_L.any():
            least, largest = value_L[finite_L].min(), value_L[finite_L].max()
            row_L[finite_L] = (value_L[finite_L] - least) / (largest - least or 1.0)
    return scaled_PL


def _list_starts(blocks: Sequence[str]) -> list[tuple[int, str]]:
    """Where each block list of the model begins, and its path: (block number, "transformer_blocks")."""
    lists = [block.rpartition(".")[0] for block in blocks]
    return [(i, name) for i, name in enumerate(lists) if i == 0 or name != lists[i - 1]]


def _list_boundaries(axes: Axes, blocks: Sequence[str]) -> None:
    """A line wherever another block list of the model begins."""
    for start, _ in _list_starts(blocks)[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=2.2, zorder=3)
        axes.axvline(start - 0.5, color=_INK, linewidth=0.8, zorder=4)


def _block_labels(axes: Axes, blocks: Sequence[str], width: float) -> None:
    """Block numbers under the axes, and the names of the block lists if the model has several.

    `width` is that of the blocks in inches: numbers are left out, and names too, where there is no room.
    """
    L = len(blocks)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if width / L * s >= 0.24), 100)
    axes.set_xticks(range(0, L, step))
    axes.set_xticks(range(L), minor=True)
    axes.tick_params(axis="x", which="minor", length=1.5)
    axes.set_xlabel("block number")
    starts = _list_starts(blocks)
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
                color=_MUTED,
            )


def _spans(chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The unbroken stretches of True, as (first, last) positions."""
    change = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(first), int(end) - 1) for first, end in zip(change[::2], change[1::2], strict=True)]


def _style() -> Any:
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
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _MUTED,
        "axes.linewidth": 0.6,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.5,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "svg.hashsalt": "layerprobe",
        "text.parse_math": False,  # a dollar sign in a model's name is a dollar sign
    }
    return matplotlib.rc_context(rc={**defaults, **house})


def _new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot, drawn by Agg, with room for `_head` left free at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - _HEAD_INCHES / height))
    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: Figure, title: str, facts: Sequence[str]) -> None:
    """Title and one line of facts, left-aligned above the panels, smaller where the figure is too narrow for them."""
    width, height = figure.get_size_inches()
    left = 0.12 / width
    line = "   ·   ".join(fact for fact in facts if fact)
    for text in (
        figure.text(left, 1 - 0.14 / height, title, fontsize=12.5, weight="bold", va="top", ha="left"),
        figure.text(left, 1 - 0.40 / height, line, fontsize=9, color=_MUTED, va="top", ha="left"),
    ):
        room = (1 - 2 * left) * figure.bbox.width
        needed = text.get_window_extent().width
        if needed > room:
            text.set_fontsize(text.get_fontsize() * room / needed)


def _rendered(figure: Figure, file_format: str) -> bytes:
    """The figure as PNG (PIXELS_PER_INCH) or SVG, without dates or versions in it."""
    assert file_format in FORMATS, file_format
    metadata = {"Software": None} if file_format == "png" else {"Date": None, "Creator": None}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=PIXELS_PER_INCH, metadata=metadata)
    return buffer.getvalue()
