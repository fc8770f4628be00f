"""The files of figures and arrays that a run gives: name -> bytes.

Shape letters: T bins, L blocks, P blocks in a row.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.contribution import Contribution, article_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap, PairHeatmap, bin_edges, combined
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.show.figures import COMBINED_TITLE, factor_figure, heatmap_figure, pairs_figure
from simpletuner_layerprobe.targets import ARCHIVE_COMMENT

ARTICLE_FIGURES = ("figure1_streams", "figure2_combined", "figure3_factors")
ARTICLE_ARRAYS = "heatmap.npz"


def article_names(file_format: str) -> list[str]:
    """The names of what `article_files` can give, which is not all of it for every run."""
    return [*(f"{name}.{file_format}" for name in ARTICLE_FIGURES), ARTICLE_ARRAYS]


def reading_names(kind: str, file_format: str) -> list[str]:
    """The names of what `reading_files` gives, and with "pairs" `pairs_files`."""
    return [f"{kind}.{file_format}", f"{kind}.npz"]


def article_files(
    streams: Mapping[str, Heatmap],
    factors: Callable[[Contribution], Sequence[int]],
    parameters: Sequence[int] | None,
    **look: str,
) -> tuple[dict[str, bytes], str]:
    """The article's three figures and heatmap.npz; and why a figure cannot be drawn, else "". factors: the recipe.

    parameters: of each block by the recipe, None where they are not known; its contribution is drawn then.
    look: samples, model and file_format, here and below.
    """
    arrays, ending = dict(streams), look["file_format"]
    by_stream, mean, by_block, npz = article_names(ending)
    files = {by_stream: heatmap_figure(tuple(streams.values()), **look)}
    problem = ""
    try:
        if len(streams) > 1:
            arrays["combined"] = combined(streams)
            files[mean] = heatmap_figure((arrays["combined"],), title=COMBINED_TITLE, **look)
        contribution = article_contributions(streams)
        files[by_block] = factor_figure(
            contribution.blocks,
            factors(contribution),
            contribution.value_L.tolist() if parameters is None else parameters,
            unit="contribution" if parameters is None else "trainable parameters",
            critical=contribution.critical_union(),
            repeated=np.flatnonzero(~contribution.covered_L).tolist(),
            model=look["model"],
            file_format=ending,
        )
    except ProbeError as error:
        problem = str(error)
    return files | {npz: _npz(heatmap_arrays(arrays))}, problem


def reading_files(kind: str, streams: Mapping[str, Heatmap], **look: str) -> dict[str, bytes]:
    """The figure and the arrays of a further reading of single blocks; kind: the files' name."""
    figure = heatmap_figure(tuple(streams.values()), **look)
    return dict(zip(reading_names(kind, look["file_format"]), (figure, _npz(heatmap_arrays(streams))), strict=True))


def pairs_files(pairs: Mapping[str, PairHeatmap], **look: str) -> dict[str, bytes]:
    """The figure and the arrays of the distances over several blocks in a row."""
    figure = pairs_figure(tuple(pairs.values()), **look)
    return dict(zip(reading_names("pairs", look["file_format"]), (figure, _npz(pairs_arrays(pairs))), strict=True))


def _npz(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """An .npz file without pickled objects, which says who made it; `numpy.load` reads it as it is."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with ZipFile(buffer, "a") as archive:
        archive.comment = ARCHIVE_COMMENT
    return buffer.getvalue()


def heatmap_arrays(heatmaps: Mapping[str, Heatmap]) -> dict[str, NDArray[np.generic]]:
    """The heatmaps as named arrays, for an .npz file.

    For every heatmap S ("image", "text", and "combined" if it is among them; "block" of an ablation of whole blocks):
      S_mean       (T, L) float64: mean over the samples of the bin; 0 where the bin has none
      S_error      (T, L) float64: its standard error; not finite where it is not known
      S_count      (T,) int64: samples in each bin
      S_blocks     (L,) str: path of each block in the model
      S_nonfinite  () int64: samples left out because a number was NaN or infinite
    and once: bin_edges (T + 1,) float64, sigma 0 (clean) .. 1 (noise); reading () str.
    """
    first = next(iter(heatmaps.values()))
    arrays: dict[str, NDArray[np.generic]] = {
        "bin_edges": bin_edges(len(first.counts_T)),
        "reading": np.array(first.reading),
    }
    for name, heatmap in heatmaps.items():
        arrays[f"{name}_mean"] = heatmap.values_TL
        arrays[f"{name}_error"] = heatmap.standard_errors_TL
        arrays[f"{name}_count"] = heatmap.counts_T
        arrays[f"{name}_blocks"] = np.array(heatmap.blocks)
        arrays[f"{name}_nonfinite"] = np.array(heatmap.nonfinite)
    return arrays


def pairs_arrays(pairs: Mapping[str, PairHeatmap]) -> dict[str, NDArray[np.generic]]:
    """The heatmaps over pairs as named arrays, for an .npz file.

    For every stream S: S_pairs (P, L) float64, the mean angular distance (fraction of pi) over n = row + 1 blocks from
    the column's block on, NaN where there is no such pair; S_blocks (L,) str. And once: reading ().
    """
    arrays: dict[str, NDArray[np.generic]] = {"reading": np.array(next(iter(pairs.values())).reading)}
    for name, heatmap in pairs.items():
        arrays[f"{name}_pairs"] = heatmap.values_PL
        arrays[f"{name}_blocks"] = np.array(heatmap.blocks)
    return arrays
