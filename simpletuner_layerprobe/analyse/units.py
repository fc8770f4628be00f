"""Cell means, and how far each unit moves them: the source of every standard error, interval and test here.

A unit is what was drawn independently of the rest: an image with all of its samples, where images are known. An image
comes back in every epoch and brings its own level along, so its samples are no independent draws. A sample of an
unknown image is a unit by itself; what is said then holds for these images.

Shape letters: N samples, T bins, L blocks, D columns of all streams side by side, G units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import pooled_freedom
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.errors import ProbeError

IMAGE, SAMPLE = "image", "sample"
LEAST_GROUPS, MOST_GROUPS, MOST_CELLS = 256, 2048, 20_480
"""So many units, and units x bins, are kept apart: 2,048 units for ten bins. More are put together, see `grouped`."""


@dataclass(frozen=True)
class UnitMeans:
    """The cell means of all streams side by side, and what they owe to each unit.

    columns: stream -> its columns among the D. mean_TD: NaN where no sample has a number. count_TD: its samples.
    influence_GTD: by how much unit g moved each mean; the squares add up to the mean's squared standard error.
    freedom_TD: degrees of freedom of that error, 0 where a single unit cannot tell; freedom_D: of all bins together.
    nonfinite: stream -> samples that were left out of it. unit: IMAGE or SAMPLE. units: how many there are before any
    are put together.
    """

    columns: Mapping[str, slice]
    mean_TD: NDArray[np.float64]
    count_TD: NDArray[np.int64]
    influence_GTD: NDArray[np.float64]
    freedom_TD: NDArray[np.float64]
    freedom_D: NDArray[np.float64]
    nonfinite: Mapping[str, int]
    unit: str
    units: int

    @property
    def error_TD(self) -> NDArray[np.float64]:
        """Standard errors of the means, NaN where a single unit cannot tell."""
        error_TD = np.sqrt(np.einsum("gtd,gtd->td", self.influence_GTD, self.influence_GTD))
        return np.where(self.freedom_TD > 0, error_TD, np.nan)

    def levels(self, weight_TD: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """(D,) sums of the means over the bins with these weights, their standard errors and degrees of freedom.

        A unit moves the bins together. The degrees of freedom are those of all bins, but no more than the units give.
        """
        error_D = np.sqrt((np.einsum("gtd,td->gd", self.influence_GTD, weight_TD) ** 2).sum(axis=0))
        square_TD = np.where(weight_TD > 0, (weight_TD * np.nan_to_num(self.error_TD)) ** 2, 0.0)
        freedom_D = pooled_freedom(square_TD, np.maximum(self.freedom_TD, 1.0))
        return (weight_TD * np.nan_to_num(self.mean_TD)).sum(axis=0), error_D, np.minimum(freedom_D, self.freedom_D)


def bin_index(sigma_N: NDArray[np.floating], bins: int) -> NDArray[np.int64]:
    """The bin of each sigma in [0, 1]: floor(sigma * bins), a sigma of exactly 1 in the last bin.

    Returns (N,) int64 in [0, bins - 1].
    """
    if bins < 1:
        raise ProbeError(f"the number of sigma bins is {bins}, at least 1 is needed")
    index_N = np.floor(np.asarray(sigma_N, dtype=np.float64) * bins).astype(np.int64)
    return np.clip(index_N, 0, bins - 1)


def unit_numbers(samples: Samples) -> tuple[NDArray[np.intp], int]:
    """(N,) the unit of each sample, and how many units there are: images, and samples whose image is not known."""
    known_N = samples.image_N != 0
    images, number_N = np.unique(samples.image_N, return_inverse=True)
    if known_N.all():
        return number_N, len(images)
    known = len(images) - 1  # the first is the 0 of those not known
    return np.where(known_N, number_N - 1, known - 1 + np.cumsum(~known_N)), known + int(np.count_nonzero(~known_N))


def grouped(number_N: NDArray[np.intp], units: int, most: int) -> NDArray[np.intp]:
    """The numbers of at most `most` groups of neighbouring units, about as many units in each.

    Which units share a group does not depend on their distances: sums of independent draws are independent draws, so
    groups serve as units, only fewer. Of unknown images neighbours are consecutive samples, which keeps together what
    these have in common.
    """
    return number_N if units <= most else number_N * most // units


def unit_means(samples: Samples, bins: int = 10) -> UnitMeans:
    """The cell means of a run's samples and the influence of each unit. Kept with the samples: asking again is free.

    A sample with a distance that is not finite is left out of its stream, or, of a reading that may lack a number
    (`Reading.complete`), of that column alone. Raises ProbeError without samples.
    """
    samples.require()
    if bins not in samples.cells:
        samples.cells[bins] = _unit_means(samples, bins)
    known: UnitMeans = samples.cells[bins]
    return known


def _unit_means(samples: Samples, bins: int) -> UnitMeans:
    number_N, units = unit_numbers(samples)
    most = min(max(MOST_CELLS // bins, LEAST_GROUPS), MOST_GROUPS)
    number_N, groups = grouped(number_N, units, most), min(units, most)
    bin_N = bin_index(samples.sigma_N, bins)
    cell_N = number_N * bins + bin_N
    columns: dict[str, slice] = {}
    parts: list[tuple[NDArray[Any], ...]] = []
    nonfinite: dict[str, int] = {}
    for name, distance_NC in samples.distances.items():
        first = sum(part[0].shape[1] for part in parts)
        columns[name] = slice(first, first + distance_NC.shape[1])
        finite_NC = np.isfinite(distance_NC)
        if samples.kind.complete:
            finite_NC = finite_NC.all(axis=1, keepdims=True)
        nonfinite[name] = int(np.count_nonzero(~finite_NC.any(axis=1)))
        parts.append(_stream_means(samples, distance_NC, finite_NC, cell_N, bin_N, groups, bins))
    mean_TD, count_TD, influence_GTD, freedom_TD, freedom_D = (
        np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
    )
    return UnitMeans(
        columns=columns,
        mean_TD=mean_TD,
        count_TD=count_TD,
        influence_GTD=influence_GTD,
        freedom_TD=freedom_TD,
        freedom_D=freedom_D,
        nonfinite=nonfinite,
        unit=IMAGE if samples.images is not None else SAMPLE,
        units=units,
    )


def _stream_means(
    samples: Samples,
    distance_NC: NDArray[np.floating],
    finite_NC: NDArray[np.bool_],
    cell_N: NDArray[np.intp],
    bin_N: NDArray[np.int64],
    groups: int,
    bins: int,
) -> tuple[NDArray[Any], ...]:
    """mean, count, influence and both freedoms of one stream. finite_NC: (N, C), or (N, 1) for all columns alike."""
    value_NC = np.asarray(distance_NC, dtype=np.float64)
    if not finite_NC.all():
        value_NC = np.where(finite_NC, value_NC, 0.0)
    over_cells = sums(cell_N, groups * bins)
    total_GTC = (over_cells @ value_NC).reshape(groups, bins, -1)
    count_GTC = (over_cells @ finite_NC.astype(np.float64)).reshape(groups, bins, -1)
    count_TC = count_GTC.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_TC = total_GTC.sum(axis=0) / count_TC
        share_GTC = np.nan_to_num(count_GTC / count_TC)
        # A unit pulls the mean towards itself; CR2 (Bell and McCaffrey 2002) makes up for it. Alone it tells nothing.
        scale_GTC = 1 / (np.maximum(count_TC, 1) * np.sqrt(np.where(share_GTC < 1, 1 - share_GTC, np.inf)))
        freedom_TC = 1 / (share_GTC**2).sum(axis=0) - 1  # Kish's number of units that weigh alike, less the mean
        freedom_C = 1 / ((count_GTC.sum(axis=1) / count_TC.sum(axis=0)) ** 2).sum(axis=0) - 1
    residual_GTC = total_GTC - count_GTC * np.nan_to_num(mean_TC)
    if samples.stratified:
        residual_GTC -= _trend(samples, value_NC, finite_NC, cell_N, bin_N, groups, bins)
    shape = mean_TC.shape
    return (
        mean_TC,
        np.broadcast_to(count_TC, shape).astype(np.int64),
        residual_GTC * scale_GTC,
        np.broadcast_to(np.where(count_TC > 0, np.maximum(freedom_TC, 0), 0), shape),
        np.broadcast_to(np.nan_to_num(np.maximum(freedom_C, 0)), shape[1:]),
    )


def sums(cell_N: NDArray[np.intp], cells: int, weight_N: NDArray[np.float64] | None = None) -> scipy.sparse.csr_array:
    """(cells, N): times a table of rows per sample it gives the sums (weighted, if asked) over every cell."""
    N = len(cell_N)
    return scipy.sparse.csr_array((np.ones(N) if weight_N is None else weight_N, (cell_N, np.arange(N))), (cells, N))


def _trend(
    samples: Samples,
    value_NC: NDArray[np.float64],
    finite_NC: NDArray[np.bool_],
    cell_N: NDArray[np.intp],
    bin_N: NDArray[np.int64],
    groups: int,
    bins: int,
) -> NDArray[np.float64]:
    """(G, T, C) what a straight line in sigma within each bin explains of the units' sums.

    Stratified sigmas lie evenly in a bin, by design: where a sample lies there is no chance, and its part of the
    distance is none of the mean's error.
    """
    count_TC = np.maximum(sums(bin_N, bins) @ finite_NC.astype(np.float64), 1)
    sigma_N1 = np.asarray(samples.sigma_N, dtype=np.float64)[:, None]
    centre_TC = (sums(bin_N, bins) @ (sigma_N1 * finite_NC)) / count_TC
    place_NC = np.where(finite_NC, sigma_N1 - centre_TC[bin_N], 0.0)
    squares_TC = sums(bin_N, bins) @ place_NC**2
    slope_TC = (sums(bin_N, bins) @ (place_NC * value_NC)) / np.where(squares_TC > 0, squares_TC, 1)
    place_GTC = (sums(cell_N, groups * bins) @ place_NC).reshape(groups, bins, -1)
    explained_GTC: NDArray[np.float64] = place_GTC * slope_TC
    return explained_GTC
