"""Comparison: what changed from one run to another of the same blocks, and how sure that is. See docs/compare.md.

A change is always run B minus run A. The runs are taken for independent draws of images: their errors add up.

Shape letters: T bins, L blocks, D columns of all streams side by side, R replicates, K things that are decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.chances import above, holm, pooled_freedom, scores, student95
from simpletuner_layerprobe.analyse.change import ALPHA, BIN_SAMPLES, KIND_ALPHA, Change, require_same_blocks
from simpletuner_layerprobe.analyse.paired import Paired
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.sections import plain
from simpletuner_layerprobe.analyse.settled import Confidence, Decide, confidence
from simpletuner_layerprobe.analyse.units import UnitMeans, unit_means
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import all_blocks

RESOLUTION = 1e-7
"""Of the mean: float32 holds no finer differences, so a smaller one is not looked into."""
SAME, CHANGED, OPEN = "same", "changed", "not settled"


@dataclass(frozen=True)
class StreamComparison:
    """One stream of both runs.

    counts_a_T, counts_b_T: samples of each bin. nonfinite_a, nonfinite_b: samples left out. used_T: the bins that have
    BIN_SAMPLES in both. cells: (T, L). levels: (L,), the mean over the bins used, each weighing the same. missing: why
    nothing can be said, else "".
    """

    stream: str
    blocks: tuple[str, ...]
    counts_a_T: NDArray[np.int64]
    counts_b_T: NDArray[np.int64]
    nonfinite_a: int
    nonfinite_b: int
    used_T: NDArray[np.bool_]
    cells: Change
    levels: Change
    missing: str


@dataclass(frozen=True)
class FactorComparison:
    """The contributions and the decisions (factors) of both runs.

    blocks: all, in the model's order. values: (L,) the contributions. a, b: intervals, factors and agreement of each
    run. verdict_K: "same" or "changed" where both runs are settled, else "not settled"; "changed" also needs a change
    beyond chance of the block's contribution or level, where there is one decision per block.
    """

    blocks: tuple[str, ...]
    values: Change
    a: Confidence
    b: Confidence
    verdict_K: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. factors: None where `factors_missing` says why. notes: what else the reader should
    know. paired: sample by sample, of runs with one noise seed; None where `not_paired` says why."""

    reading: str
    bins: int
    samples_a: int
    samples_b: int
    streams: Mapping[str, StreamComparison]
    factors: FactorComparison | None
    factors_missing: str
    notes: tuple[str, ...]
    paired: Paired | None = None
    not_paired: str = ""

    @property
    def blocks(self) -> tuple[str, ...]:
        """All blocks of the model, in its order."""
        return all_blocks([stream.blocks for stream in self.streams.values()])


def compare(
    a: Samples, b: Samples, decide_of: Callable[[Bootstrap], Decide] | None = None, bins: int = 10
) -> Comparison:
    """Compare two runs of the same streams and blocks in one reading.

    decide_of: what gives the decision whose factors are compared, None for none. Raises ProbeError if the streams,
    blocks or readings differ, or a run has no samples.
    """
    require_same_blocks(a, b)
    streams = _streams(a, b, bins)
    factors, missing = None, "nothing was asked to be decided"
    if a.kind.ablation:
        missing = "what is compared is an ablation, not the angles that factors are made from"
    elif decide_of is not None:
        try:
            factors, missing = _factors(Bootstrap.of(a, bins), Bootstrap.of(b, bins), decide_of, streams), ""
        except ProbeError as error:
            missing = str(error)
    return Comparison(
        reading=a.reading,
        bins=bins,
        samples_a=a.samples,
        samples_b=b.samples,
        streams=streams,
        factors=factors,
        factors_missing=missing,
        notes=tuple(_notes(a, b, streams)),
    )


def _notes(a: Samples, b: Samples, streams: Mapping[str, StreamComparison]) -> Iterator[str]:
    if a.stratified != b.stratified:
        yield (
            "the runs draw sigma in different ways, so within a bin their sigmas may lie differently: where a distance "
            "changes much with sigma, that alone can look like a change (more bins make it smaller)"
        )
    for label, samples in (("A", a), ("B", b)):
        if samples.images is None:
            yield f"the images of {label} are not known: a change may be one of images"
    for name, stream in streams.items():
        unused = int((~stream.used_T).sum())
        if unused and not stream.missing:
            yield (
                f"{unused} of {len(stream.used_T)} sigma bins of the {name} stream are left out: fewer than "
                f"{BIN_SAMPLES} samples in A or in B"
            )
        if stream.nonfinite_a or stream.nonfinite_b:
            yield (
                f"samples left out of the {name} stream because a distance is not finite: {stream.nonfinite_a:,} in A, "
                f"{stream.nonfinite_b:,} in B"
            )


# Cells and blocks


def _streams(a: Samples, b: Samples, bins: int) -> dict[str, StreamComparison]:
    """Cells and blocks of every stream, the chances corrected over all streams together."""
    means = [unit_means(samples, bins) for samples in (a, b)]
    counts = [side.count_TD for side in means]
    used_TD = np.minimum(*counts) >= BIN_SAMPLES
    cells = _change(
        np.nan_to_num(means[0].mean_TD),
        np.nan_to_num(means[1].mean_TD),
        np.stack([np.nan_to_num(side.error_TD) for side in means]),
        np.stack([side.freedom_TD for side in means]),
        used_TD & np.all([side.freedom_TD > 0 for side in means], axis=0),
    )
    weight_TD = used_TD / np.maximum(used_TD.sum(axis=0), 1)
    level_a, level_b = (side.levels(weight_TD) for side in means)
    levels = _change(
        level_a[0],
        level_b[0],
        np.stack([level_a[1], level_b[1]]),
        np.stack([level_a[2], level_b[2]]),
        used_TD.any(axis=0) & (np.minimum(level_a[2], level_b[2]) > 0),
    )
    return {name: _stream(name, blocks, means, used_TD, cells, levels) for name, blocks in a.blocks.items()}


def _stream(
    name: str,
    blocks: tuple[str, ...],
    means: list[UnitMeans],
    used_TD: NDArray[np.bool_],
    cells: Change,
    levels: Change,
) -> StreamComparison:
    part = means[0].columns[name]
    counts_a_T, counts_b_T = (side.count_TD[:, part].max(axis=1) for side in means)
    used_T = used_TD[:, part].any(axis=1)
    return StreamComparison(
        stream=name,
        blocks=blocks,
        counts_a_T=counts_a_T,
        counts_b_T=counts_b_T,
        nonfinite_a=means[0].nonfinite[name],
        nonfinite_b=means[1].nonfinite[name],
        used_T=used_T,
        cells=cells.columns(part),
        levels=levels.columns(part),
        missing=""
        if used_T.any()
        else f"not enough samples: no sigma bin has {BIN_SAMPLES} with finite distances in both runs; take fewer bins",
    )


def _change(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    error_2: NDArray[np.float64],
    freedom_2: NDArray[np.float64],
    tested: NDArray[np.bool_],
) -> Change:
    """Welch's test of b - a: standard errors and degrees of freedom of both runs, stacked.

    The interval goes by Welch's error, the test by that or by the one with each run's spread over the other's number of
    units if that is larger (they are the same for equal numbers): with few units of a skewed distance a low mean comes
    with a small spread, and Welch's error alone would call that a change against a run of many.
    """
    finest = RESOLUTION * np.maximum(np.abs(a), np.abs(b))
    freedom_2 = np.maximum(freedom_2, 1e-3)
    swapped_2 = error_2**2 * (freedom_2 + 1) / (freedom_2[::-1] + 1)
    error = np.maximum(np.sqrt((error_2**2).sum(axis=0)), finest)
    freedom = pooled_freedom(error_2**2, freedom_2)
    score = np.abs(scores(b - a, np.maximum(error, np.sqrt(swapped_2.sum(axis=0)))))
    p = np.where(tested, 2 * above(score, freedom), np.nan)
    difference = np.where(tested, b - a, np.nan)
    margin = np.where(tested, student95(freedom), np.nan) * error
    return Change(a, b, difference, difference - margin, difference + margin, holm(p.ravel()).reshape(p.shape))


# Contributions and factors


def _factors(
    a: Bootstrap, b: Bootstrap, decide_of: Callable[[Bootstrap], Decide], streams: Mapping[str, StreamComparison]
) -> FactorComparison:
    values, errors, sure = [], [], []
    for side in (a, b):
        decide = decide_of(side)
        value_L = decide({name: mean_TL[None] for name, mean_TL in side.mean_TL.items()})[0][0]
        values.append(value_L)
        # The least and the most block move all others: replicates lie off the run's own value. That counts as error.
        errors.append(np.sqrt(((decide(side.replicates())[0] - value_L) ** 2).mean(axis=0)))
        sure.append(confidence(side, decide))
    if a.blocks != b.blocks or sure[0].factor_K.shape != sure[1].factor_K.shape:
        raise ProbeError("the runs do not have finite distances of the same streams, so their factors do not compare")
    freedom_2L = np.repeat([[min(side.freedom.values())] for side in (a, b)], len(values[0]), axis=1)
    change = _change(values[0], values[1], np.stack(errors), freedom_2L, np.full(len(values[0]), True))
    same_bins = all(np.array_equal(a.counts_T[name] > 0, b.counts_T[name] > 0) for name in a.blocks)
    settled_K = sure[0].settled_K & sure[1].settled_K & same_bins
    same_K = sure[0].factor_K == sure[1].factor_K
    if same_K.shape == change.p.shape:  # one decision per block: it changes only with what it comes from
        moved = {stream.blocks[i] for stream in streams.values() for i in np.flatnonzero(stream.levels.significant)}
        settled_K &= same_K | change.significant | np.array([block in moved for block in a.names])
    verdict_K = np.where(settled_K, np.where(same_K, SAME, CHANGED), OPEN)
    return FactorComparison(a.names, change, sure[0], sure[1], tuple(verdict_K.tolist()))


# For other programs, and in words


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, by the names of its fields; numbers that are not known are null."""
    return {"alpha": ALPHA, "kind_alpha": KIND_ALPHA, **plain(asdict(comparison))}


def change_text(levels: Change, i: int) -> str:
    """The change of block i with its interval, and relative to A where that is not 0."""
    percent = 100 * levels.difference[i] / levels.a[i] if levels.a[i] else math.nan
    share = "" if math.isnan(percent) else f" ({percent:+.3g}%)" if abs(percent) < 999.5 else f" ({percent:+,.0f}%)"
    return f"{levels.difference[i]:+.3g} [{levels.low[i]:+.3g}, {levels.high[i]:+.3g}]{share}"
