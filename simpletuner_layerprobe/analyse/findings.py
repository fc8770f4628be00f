"""Findings: what a run shows by itself, and how sure it is. Every definition and its reason: docs/findings.md.

All tests go over the means of the sigma bins and their standard errors, so a bin counts the same however many samples
it has. A run in which there is nothing to find shows anything at all, of any kind, with a chance of at most ALPHA.

Shape letters: T bins, L blocks, S strata of sigma, R permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.conditions import (
    BACKEND,
    CONTINUOUS,
    DROPPED,
    Condition,
    Observation,
    StreamObservation,
)
from simpletuner_layerprobe.analyse.contribution import TUKEY_FAR_OUT, far_out
from simpletuner_layerprobe.analyse.heatmap import all_blocks, bin_edges

ALPHA = 0.05
CONDITIONS = (*CONTINUOUS, DROPPED, BACKEND)
KINDS = ("critical", "islands", "gradients", "two-ended", "least", *CONDITIONS)
ISLAND_ALPHA = 0.02
"""The chance of a false island, over all streams: few blocks leave few arrangements to compare with."""
KIND_ALPHA = (ALPHA - ISLAND_ALPHA) / (len(KINDS) - 1)
"""The chance of a false finding that each other kind may take, over all blocks and streams."""
SAMPLES = 2000
"""Samples, evenly over sigma, with which planted effects are found with precision and recall of at least 0.95
(docs/findings.md)."""
BIN_SAMPLES = 20  # below, a bin's spread is too uncertain for its standard error to be used
GROUP_SAMPLES = 50  # of each of two groups that are compared, and of a conditioning fact per stratum on average
MIN_BINS = 5  # filled, for a line or two ends and a middle to mean something
MIN_BLOCKS = 8  # below, quartiles of blocks say little
SHAPE_FLOOR = 0.10  # of the block's level: smaller changes over sigma are no finding, however certain
CONDITION_FLOOR = 0.05  # of the block's level, the same for conditioning
LINE_SHARE = 0.5  # of the variation between bins that a straight line must explain to be a gradient
END = 0.2  # of sigma, at each end
LEAST = 0.5  # of the median block
ISLAND_BLOCKS = 3  # the shortest island
TOGETHER = (0.6, 0.2, 0.2)  # islands are looked for one, two and three together, with these parts of their chance
ISLAND_FLOOR = 0.15  # of the level of the surroundings
HAMPEL = 3.0  # median absolute deviations, scaled to a normal's standard deviation
PERMUTATIONS = 1999
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    kind: one of KINDS. stream. blocks: paths in the model, more than one for an island. low_sigma, high_sigma: the part
    of sigma it speaks of. effect, low, high: the statistic of the kind (docs/findings.md) and its 95% interval. unit:
    of these three. score: the test statistic. p: the chance of it without an effect, corrected for the blocks and
    streams of the kind. level: mean angular distance of the blocks. samples: behind it. value: the data backend.
    """

    kind: str
    stream: str
    blocks: tuple[str, ...]
    low_sigma: float
    high_sigma: float
    effect: float
    low: float
    high: float
    unit: str
    score: float
    p: float
    level: float
    samples: int
    value: str = ""


@dataclass(frozen=True)
class Section:
    """All findings of one kind in one stream, the strongest first.

    samples: that were looked at. missing: why nothing can be said ("not enough samples: ..."), else "". notes: what
    else the reader should know.
    """

    kind: str
    stream: str
    findings: tuple[Finding, ...]
    samples: int
    missing: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Test:
    """One number per block, tested against 0: positive scores speak for an effect."""

    effect_L: NDArray[np.float64]
    error_L: NDArray[np.float64]
    score_L: NDArray[np.float64]
    p_L: NDArray[np.float64]


def findings(observation: Observation) -> tuple[Section, ...]:
    """All sections, kind by kind and stream by stream, in the order of KINDS."""
    streams = observation.streams
    return (
        *_sections("critical", {name: _critical(stream) for name, stream in streams.items()}),
        *_sections("islands", {name: _islands(stream, len(streams)) for name, stream in streams.items()}),
        *_sections("gradients", {name: _gradients(stream) for name, stream in streams.items()}),
        *_sections("two-ended", {name: _two_ended(stream) for name, stream in streams.items()}),
        *_sections("least", {name: _least(stream) for name, stream in streams.items()}),
        *(
            section
            for kind in CONDITIONS
            for section in _sections(kind, {name: _condition(stream, kind) for name, stream in streams.items()})
        ),
    )


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The sections as JSON values; numbers that are not finite are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return {
        "alpha": ALPHA,
        "kind_alpha": KIND_ALPHA,
        "island_alpha": ISLAND_ALPHA,
        "sections": [plain(asdict(section)) for section in sections],
    }


# Candidates: what a kind found in one stream before the correction over streams


@dataclass(frozen=True)
class _Candidates:
    """found: with p not yet corrected, one for each test that counts. tests: how many tests were made."""

    found: tuple[Finding, ...]
    tests: int
    samples: int
    missing: str = ""
    notes: tuple[str, ...] = ()
    corrected: bool = False


def _sections(kind: str, parts: dict[str, _Candidates]) -> Iterator[Section]:
    """Holm's correction over everything that the kind tested, then what is left of it per stream."""
    tests = sum(part.tests for part in parts.values())
    pairs = sorted(
        ((finding.p, name, i) for name, part in parts.items() for i, finding in enumerate(part.found)),
    )
    corrected: dict[tuple[str, int], float] = {}
    highest = 0.0
    for rank, (p, name, i) in enumerate(pairs):
        highest = max(highest, p if parts[name].corrected else min(1.0, p * (tests - rank)))
        corrected[name, i] = highest
    for name, part in parts.items():
        left = [
            Finding(**{**vars(finding), "p": corrected[name, i]})
            for i, finding in enumerate(part.found)
            if corrected[name, i] <= (ISLAND_ALPHA if kind == "islands" else KIND_ALPHA)
        ]
        left.sort(key=lambda finding: (-abs(finding.score), finding.blocks))
        yield Section(kind, name, tuple(left), part.samples, part.missing, part.notes)


def _upper(score_L: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance that a standard normal number exceeds each score."""
    return np.array([0.5 * math.erfc(score / math.sqrt(2)) for score in score_L.tolist()])


def _scores(difference_L: NDArray[np.float64], error_L: NDArray[np.float64]) -> NDArray[np.float64]:
    """difference / error; a difference without any error is infinitely certain, none at all is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        score_L = difference_L / error_L
    return np.where(np.isnan(score_L), 0.0, score_L)


def _good_bins(stream: StreamObservation) -> NDArray[np.bool_]:
    return stream.heatmap.count_T >= BIN_SAMPLES


def _samples(stream: StreamObservation) -> int:
    return int(stream.heatmap.count_T.sum())


def _too_few_bins(stream: StreamObservation, wanted: int) -> str:
    good = int(_good_bins(stream).sum())
    if good >= wanted:
        return ""
    return (
        f"not enough samples: {good} of {stream.heatmap.bins} sigma bins have {BIN_SAMPLES} or more, "
        f"{'one' if wanted == 1 else wanted} must"
    )


def _level(stream: StreamObservation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(L,) the mean of the bins with enough samples, and its standard error."""
    good_T = _good_bins(stream)
    error_L = np.sqrt((stream.error_TL()[good_T] ** 2).sum(axis=0)) / good_T.sum()
    return stream.heatmap.mean_TL[good_T].mean(axis=0), error_L


def _weak_note(stream: StreamObservation) -> tuple[str, ...]:
    fewest, wanted = int(stream.heatmap.count_T[_good_bins(stream)].min()), SAMPLES // stream.heatmap.bins
    # A uniform run of SAMPLES has some bins below their part.
    if fewest >= 0.75 * wanted:
        return ()
    return (f"the emptiest sigma bin has {fewest:,} samples: below {wanted:,} weaker effects are missed",)


def _critical(stream: StreamObservation) -> _Candidates:
    missing = _too_few_bins(stream, 1) or _too_few_blocks(stream)
    if missing:
        return _Candidates((), 0, _samples(stream), missing)
    level_L, error_L = _level(stream)
    first, third = np.percentile(level_L, [25, 75])
    fence = third + TUKEY_FAR_OUT * (third - first)
    score_L = _scores(level_L - fence, error_L)
    p_L = _upper(score_L)
    blocks = stream.heatmap.blocks
    found = tuple(
        Finding(
            "critical",
            stream.heatmap.stream,
            (blocks[i],),
            0.0,
            1.0,
            float(level_L[i]),
            float(level_L[i] - Z95 * error_L[i]),
            float(level_L[i] + Z95 * error_L[i]),
            "angular distance / π",
            float(score_L[i]),
            float(p_L[i]),
            float(level_L[i]),
            _samples(stream),
        )
        for i in np.flatnonzero(far_out(level_L))
    )
    return _Candidates(found, len(blocks), _samples(stream), notes=(f"the fence is at {fence:.4g}",))


def _too_few_blocks(stream: StreamObservation) -> str:
    blocks = len(stream.heatmap.blocks)
    return "" if blocks >= MIN_BLOCKS else f"not enough blocks: {blocks}, at least {MIN_BLOCKS} are needed"


def _least(stream: StreamObservation) -> _Candidates:
    missing = _too_few_bins(stream, 1) or _too_few_blocks(stream)
    if missing:
        return _Candidates((), 0, _samples(stream), missing)
    level_L, error_L = _level(stream)
    median = float(np.median(level_L))
    blocks = stream.heatmap.blocks
    lowest = int(np.argmin(level_L))
    note = f"the lowest block is {blocks[lowest]}, mean {level_L[lowest]:.4g}; the median block has {median:.4g}"
    if median <= 0:
        return _Candidates((), len(blocks), _samples(stream), notes=(note,))
    score_L = _scores(LEAST * median - level_L, error_L)
    p_L = _upper(score_L)
    found = tuple(
        Finding(
            "least",
            stream.heatmap.stream,
            (blocks[i],),
            0.0,
            1.0,
            float(level_L[i] / median),
            float((level_L[i] - Z95 * error_L[i]) / median),
            float((level_L[i] + Z95 * error_L[i]) / median),
            "of the median block",
            float(score_L[i]),
            float(p_L[i]),
            float(level_L[i]),
            _samples(stream),
        )
        for i in np.flatnonzero(score_L > 0)
    )
    return _Candidates(found, len(blocks), _samples(stream), notes=(note,))


def _gradients(stream: StreamObservation) -> _Candidates:
    missing = _too_few_bins(stream, MIN_BINS)
    if missing:
        return _Candidates((), 0, _samples(stream), missing)
    good_T = _good_bins(stream)
    edges = bin_edges(stream.heatmap.bins)
    centre_T = ((edges[:-1] + edges[1:]) / 2)[good_T]
    mean_TL, error_TL = stream.heatmap.mean_TL[good_T], stream.error_TL()[good_T]
    weight_T = (centre_T - centre_T.mean()) / ((centre_T - centre_T.mean()) ** 2).sum()
    slope_L = weight_T @ mean_TL
    error_L = np.sqrt(weight_T**2 @ error_TL**2)
    level_L = mean_TL.mean(axis=0)
    total_L = ((mean_TL - level_L) ** 2).sum(axis=0)
    line_L = slope_L**2 * ((centre_T - centre_T.mean()) ** 2).sum()
    straight_L = line_L >= LINE_SHARE * total_L
    score_L = _scores(np.abs(slope_L) - SHAPE_FLOOR * level_L, error_L)
    p_L = 2 * _upper(score_L)
    blocks = stream.heatmap.blocks
    low, high = float(edges[:-1][good_T][0]), float(edges[1:][good_T][-1])
    found = tuple(
        Finding(
            "gradients",
            stream.heatmap.stream,
            (blocks[i],),
            low,
            high,
            float(slope_L[i]),
            float(slope_L[i] - Z95 * error_L[i]),
            float(slope_L[i] + Z95 * error_L[i]),
            "angular distance / π per sigma",
            float(score_L[i]),
            float(p_L[i]),
            float(level_L[i]),
            _samples(stream),
        )
        for i in np.flatnonzero(straight_L & (score_L > 0))
    )
    return _Candidates(found, len(blocks), _samples(stream), notes=_weak_note(stream))


def _two_ended(stream: StreamObservation) -> _Candidates:
    good_T = _good_bins(stream)
    edges = bin_edges(stream.heatmap.bins)
    centre_T = (edges[:-1] + edges[1:]) / 2
    parts = [good_T & (centre_T < END), good_T & (centre_T > 1 - END)]
    parts.append(good_T & ~(centre_T < END) & ~(centre_T > 1 - END))
    missing = _too_few_bins(stream, MIN_BINS)
    if not missing and not all(part.any() for part in parts):
        missing = f"not enough samples: below sigma {END}, above {1 - END} and between, a bin needs {BIN_SAMPLES}"
    if missing:
        return _Candidates((), 0, _samples(stream), missing)
    mean_TL, variance_TL = stream.heatmap.mean_TL, stream.error_TL() ** 2
    # Within an end, and between them, a bin counts by its samples: a run on a training schedule has few at the ends.
    weights = [part * stream.heatmap.count_T / (part * stream.heatmap.count_T).sum() for part in parts]
    means = [weight_T @ mean_TL for weight_T in weights]
    variances = [weight_T[part] ** 2 @ variance_TL[part] for weight_T, part in zip(weights, parts, strict=True)]
    level_L, _ = _level(stream)
    excess = [means[end] - means[2] for end in (0, 1)]
    error = [np.sqrt(variances[end] + variances[2]) for end in (0, 1)]
    score = [_scores(excess[end] - SHAPE_FLOOR * level_L, error[end]) for end in (0, 1)]
    # Both ends must be high, so the weaker of the two tests decides, and needs no correction for there being two.
    score_L = np.minimum(*score)
    p_L = _upper(score_L)
    weaker_L = excess[0] > excess[1]
    effect_L, error_L = np.where(weaker_L, excess[1], excess[0]), np.where(weaker_L, error[1], error[0])
    blocks = stream.heatmap.blocks
    found = tuple(
        Finding(
            "two-ended",
            stream.heatmap.stream,
            (blocks[i],),
            0.0,
            1.0,
            float(effect_L[i]),
            float(effect_L[i] - Z95 * error_L[i]),
            float(effect_L[i] + Z95 * error_L[i]),
            "angular distance / π",
            float(score_L[i]),
            float(p_L[i]),
            float(level_L[i]),
            _samples(stream),
        )
        for i in np.flatnonzero(score_L > 0)
    )
    return _Candidates(found, len(blocks), _samples(stream), notes=_weak_note(stream))


# Islands


def _islands(stream: StreamObservation, streams: int) -> _Candidates:
    missing = _too_few_bins(stream, 1) or _too_few_blocks(stream)
    if missing:
        return _Candidates((), 0, _samples(stream), missing)
    level_L, _ = _level(stream)
    blocks = stream.heatmap.blocks
    alpha = ISLAND_ALPHA / streams
    shortest = shortest_island(len(blocks), alpha)
    if not shortest:
        missing = f"not enough blocks: among {len(blocks)}, neighbours cannot be told from chance"
        return _Candidates((), 0, _samples(stream), missing)
    found = tuple(
        Finding(
            "islands",
            stream.heatmap.stream,
            blocks[island.first : island.last + 1],
            0.0,
            1.0,
            island.excess,
            island.low,
            island.high,
            "angular distance / π",
            island.score,
            min(1.0, island.p * streams),
            float(np.median(level_L[island.first : island.last + 1])),
            _samples(stream),
        )
        for island in islands(level_L, alpha=alpha)
    )
    notes = (f"among {len(blocks)} blocks, fewer than {shortest} side by side are no more than chance",)
    return _Candidates(found, len(found), _samples(stream), notes=notes, corrected=True)


def shortest_island(blocks: int, alpha: float) -> int:
    """The smallest number of blocks that shuffling puts side by side, as the highest of all, with a chance below what
    one island by itself may have. 0 if there are too few blocks for any."""
    widths = range(ISLAND_BLOCKS, blocks // 2 + 1)
    allowed = TOGETHER[0] * alpha / 2
    return next((width for width in widths if (blocks - width + 1) / math.comb(blocks, width) <= allowed), 0)


@dataclass(frozen=True)
class Island:
    """Positions first .. last (inclusive) of a range above the rest. excess: median difference between a block inside
    and one outside, with its 95% interval low .. high. score: the range's share of all variation, as a correlation.
    p: of that score."""

    first: int
    last: int
    excess: float
    low: float
    high: float
    score: float
    p: float


def islands(level_L: NDArray[np.float64], *, alpha: float = ISLAND_ALPHA, seed: int = 0) -> tuple[Island, ...]:
    """The ranges of neighbouring numbers that lie above the others by more than chance puts together.

    Looked for twice, at half the chance each. First without the critical blocks, which hide a lower island: one may
    span them, and those beside it belong to it. Then in what is left with them: an island that stands out by much is
    critical block by block.
    """
    random = np.random.default_rng(seed)
    far_L = far_out(level_L)
    kept = np.flatnonzero(~far_L)
    found: list[Island] = []
    taken_L = np.zeros(len(level_L), dtype=bool)
    for one in _search(level_L[kept], np.arange(len(kept)), alpha / 2, random):
        first, last = int(kept[one.first]), int(kept[one.last])
        while first > 0 and far_L[first - 1]:
            first -= 1
        while last + 1 < len(level_L) and far_L[last + 1]:
            last += 1
        taken_L[first : last + 1] = True
        found.append(replace(one, first=first, last=last))
    found += _search(level_L, np.flatnonzero(~taken_L), alpha / 2, random)
    return tuple(replace(one, p=min(1.0, 2 * one.p)) for one in found)


def _search(
    level_L: NDArray[np.float64], left: NDArray[np.intp], alpha: float, random: np.random.Generator
) -> list[Island]:
    """Islands among the positions `left`, found with a chance of at most alpha where there are none.

    One, two and three best ranges are chosen greedily, here and in PERMUTATIONS shuffles of the same numbers, which
    accounts for choosing among all ranges; where several together stand out, each must do so with the others taken
    away. Found ones are taken out and the rest is looked at again. Numbers further from the median than HAMPEL
    deviations count as that far: one large block makes no island.
    """
    median = float(np.median(level_L))
    deviation = 1.4826 * float(np.median(np.abs(level_L - median)))
    reach = HAMPEL * deviation if deviation > 0 else np.inf
    clipped_L = np.clip(level_L, median - reach, median + reach)
    found: list[Island] = []
    while len(left) >= MIN_BLOCKS:
        for together, share in enumerate(TOGETHER, start=1):
            score, p, ranges = _best_ranges(clipped_L[left], left, together, random, share * alpha)
            p /= share
            if p <= alpha:
                break
        else:
            break
        chosen = [left[start : start + width] for start, width in ranges]
        tested = []
        for one in chosen:
            if len(chosen) > 1:
                rest = np.setdiff1d(left, np.concatenate([other for other in chosen if other is not one]))
                score, p, _ = _best_ranges(clipped_L[rest], rest, 1, random, alpha)
            if p <= alpha:
                tested.append((one, score, p))
        inside = np.concatenate([one for one, _, _ in tested]) if tested else left[:0]
        outside_L = level_L[np.setdiff1d(left, inside)]
        taken = []
        for one, score, p in tested:
            excess, low, high = _shift(level_L[one], outside_L)
            if excess >= ISLAND_FLOOR * float(np.median(outside_L)):
                found.append(Island(int(one[0]), int(one[-1]), excess, low, high, score, p))
                taken.append(one)
        if not taken:
            break
        left = np.setdiff1d(left, np.concatenate(taken))
    return found


def _shift(inside_I: NDArray[np.float64], outside_O: NDArray[np.float64]) -> tuple[float, float, float]:
    """How far `inside` lies above `outside`, and the 95% interval of that: Hodges and Lehmann's median of all
    differences, with the bounds of the rank-sum test. One large block does not move it."""
    difference = np.sort((inside_I[:, None] - outside_O).ravel())
    pairs = len(difference)
    spread = math.sqrt(pairs * (len(inside_I) + len(outside_O) + 1) / 12)
    cut = max(0, math.floor(pairs / 2 - Z95 * spread) - 1)
    return float(np.median(difference)), float(difference[cut]), float(difference[pairs - 1 - cut])


def _best_ranges(
    value_L: NDArray[np.float64], position_L: NDArray[np.intp], most: int, random: np.random.Generator, alpha: float
) -> tuple[float, float, list[tuple[int, int]]]:
    """The score of the `most` best ranges together, the chance of it, and the ranges as (start, width), best first.

    Shuffling stops as soon as the chance cannot come out at `alpha` or less.
    """
    L = len(value_L)
    centred_L = value_L - value_L.mean()
    spread = math.sqrt((centred_L**2).sum())
    if L < MIN_BLOCKS or spread <= 1e-12 * max(1.0, float(np.abs(value_L).max())):
        return 0.0, 1.0, []
    value_1L = centred_L[None] / spread
    gap_L = np.concatenate([[0], np.cumsum(np.diff(position_L) != 1)])
    widths = _widths(L)
    score = float(_greedy(value_1L, gap_L, widths, most)[0][0])
    above = done = 0
    while done < PERMUTATIONS and above + 1 <= alpha * (PERMUTATIONS + 1):
        rows = min(PERMUTATIONS - done, max(20, min(200, 200_000 // L))) if done else 20
        shuffled_RL = random.permuted(np.broadcast_to(value_1L, (rows, L)), axis=1)
        above += int((_greedy(shuffled_RL, gap_L, widths, most)[0] >= score - 1e-12).sum())
        done += rows
    _, start_K1, width_K1 = _greedy(value_1L, gap_L, range(ISLAND_BLOCKS, L // 2 + 1), most)
    ranges = list(zip(start_K1[:, 0].tolist(), width_K1[:, 0].tolist(), strict=True))
    return score, (above + 1) / (done + 1), ranges


def _greedy(
    value_RL: NDArray[np.float64], gap_L: NDArray[np.int64], widths: Sequence[int], most: int
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    """For each row the ranges with the best scores, one after the other and not overlapping.

    value_RL: (R, L) rows with mean 0 and sum of squares 1. The score is the correlation of a row with "inside or not".
    Returns (R,) scores of all `most` ranges together, their (K, R) starts and widths.
    """
    R, L = value_RL.shape
    taken_RL = np.zeros((R, L), dtype=bool)
    start_KR, width_KR = np.zeros((most, R), dtype=np.intp), np.zeros((most, R), dtype=np.intp)
    for k in range(most):
        free_R1 = L - taken_RL.sum(axis=1, keepdims=True)
        mean_R1 = np.where(taken_RL, 0.0, value_RL).sum(axis=1, keepdims=True) / np.maximum(free_R1, 1)
        # A taken block costs more than all others can give.
        rest_RL = np.where(taken_RL, -1e3, value_RL - mean_R1)
        total_RL = np.concatenate([np.zeros((R, 1)), np.cumsum(rest_RL, axis=1)], axis=1)
        best_R = np.full(R, -np.inf)
        for width in widths:
            possible = np.flatnonzero(gap_L[width - 1 :] == gap_L[: L - width + 1])
            if not len(possible):
                continue
            sum_RL = total_RL[:, possible + width] - total_RL[:, possible]
            at_R = np.argmax(sum_RL, axis=1)
            weight_R = np.sqrt(free_R1[:, 0] / (width * np.maximum(free_R1[:, 0] - width, 1)))
            found_R = sum_RL[np.arange(R), at_R] * weight_R
            better_R = found_R > best_R
            best_R = np.where(better_R, found_R, best_R)
            start_KR[k] = np.where(better_R, possible[at_R], start_KR[k])
            width_KR[k] = np.where(better_R, width, width_KR[k])
        number_L = np.arange(L)
        new_RL = (number_L >= start_KR[k][:, None]) & (number_L < (start_KR[k] + width_KR[k])[:, None])
        taken_RL |= new_RL
    inside_R = taken_RL.sum(axis=1)
    score_R = np.where(taken_RL, value_RL, 0).sum(axis=1) * np.sqrt(L / np.maximum(inside_R * (L - inside_R), 1))
    return score_R, start_KR, width_KR


def _widths(length: int) -> tuple[int, ...]:
    """Every width up to 16, then in steps of a quarter, up to half of all."""
    widths: list[int] = []
    width = ISLAND_BLOCKS
    while width <= length // 2:
        widths.append(width)
        width += width // 4 if width >= 16 else 1
    return tuple(widths)


# Conditioning


def _condition(stream: StreamObservation, kind: str) -> _Candidates:
    conditions = [one for one in stream.conditions if one.name == kind]
    known = max((int(one.count_S.sum()) for one in conditions), default=0)
    if not known:
        return _Candidates((), 0, 0, "not recorded in this run")
    if kind == BACKEND and len(conditions) < 2:
        return _Candidates((), 0, known, f"all samples come from one data backend ({conditions[0].value})")
    if kind == BACKEND and len(conditions) == 2:
        conditions = conditions[:1]  # the second compared with the first is the same test again
    level_L = stream.heatmap.mean_TL[stream.heatmap.count_T > 0].mean(axis=0)
    found: list[Finding] = []
    notes: list[str] = []
    tests = 0
    for one in conditions:
        reason, test = _condition_test(one)
        if test is None:
            notes.append(f"{one.value}: {reason}" if one.value else reason)
            continue
        score_L = _scores(np.abs(test[0]) - CONDITION_FLOOR * level_L, test[1])
        p_L = 2 * _upper(score_L)
        tests += len(level_L)
        found += [
            Finding(
                kind,
                stream.heatmap.stream,
                (stream.heatmap.blocks[i],),
                0.0,
                1.0,
                float(test[0][i] / level_L[i]),
                float((test[0][i] - Z95 * test[1][i]) / level_L[i]),
                float((test[0][i] + Z95 * test[1][i]) / level_L[i]),
                "of the block's level",
                float(score_L[i]),
                float(p_L[i]),
                float(level_L[i]),
                known,
                one.value,
            )
            for i in np.flatnonzero((score_L > 0) & (level_L > 0))
        ]
    if not tests:
        return _Candidates((), 0, known, "; ".join(notes))
    return _Candidates(tuple(found), tests, known, notes=tuple(notes))


def _condition_test(
    one: Condition,
) -> tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]] | None]:
    """Why there is none, or the effect and its error: (L,) each, in angular distance, at equal sigma.

    For two groups the difference of their means, for a number its effect over two standard deviations of it.
    """
    if one.binary:
        return _group_test(one)
    used_S = one.count_S >= BIN_SAMPLES
    count_S = one.count_S[used_S]
    if count_S.sum() < GROUP_SAMPLES * 2:
        return f"not enough samples: {int(one.count_S.sum()):,} with a known {one.name}", None
    x_S, d_SL = one.x_S[used_S], one.d_SL[used_S]
    xx_S = one.xx_S[used_S] - x_S**2 / count_S
    scale = float(one.xx_S[used_S].sum())
    if xx_S.sum() <= 1e-9 * scale or scale == 0:
        return f"the {one.name} does not vary in this run", None
    xd_SL = one.xd_SL[used_S] - x_S[:, None] * d_SL / count_S[:, None]
    dd_SL = one.dd_SL[used_S] - d_SL**2 / count_S[:, None]
    slope_L = xd_SL.sum(axis=0) / xx_S.sum()
    residual_SL = np.maximum(dd_SL - 2 * slope_L * xd_SL + slope_L**2 * xx_S[:, None], 0) / (count_S - 2)[:, None]
    error_L = np.sqrt((xx_S[:, None] * residual_SL).sum(axis=0)) / xx_S.sum()
    span = 2 * math.sqrt(xx_S.sum() / count_S.sum())
    return "", (slope_L * span, error_L * span)


def _group_test(one: Condition) -> tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]] | None]:
    rest_S = one.count_S - one.x_S
    smaller = int(min(one.x_S.sum(), rest_S.sum()))
    what = "captions dropped" if one.name == DROPPED else f"of {one.value}"
    if not smaller:
        there = "no" if not one.x_S.sum() else "all"
        return f"{there} {what}" if one.name == DROPPED else f"{there} samples {what}", None
    used_S = (one.x_S >= 2) & (rest_S >= 2)
    if smaller < GROUP_SAMPLES or not used_S.any():
        return f"not enough samples: {smaller:,} in the smaller group ({what} or not), {GROUP_SAMPLES} needed", None
    in_S, out_S = one.x_S[used_S][:, None], rest_S[used_S][:, None]
    mean_in_SL, mean_out_SL = one.xd_SL[used_S] / in_S, (one.d_SL - one.xd_SL)[used_S] / out_S
    # Spread within each group, pooled over the strata: a stratum may hold two samples of the smaller one.
    spread_in_L = _pooled(one.xdd_SL[used_S] - in_S * mean_in_SL**2, in_S)
    spread_out_L = _pooled((one.dd_SL - one.xdd_SL)[used_S] - out_S * mean_out_SL**2, out_S)
    weight_S = in_S * out_S / (in_S + out_S)
    weight_S = weight_S / weight_S.sum()
    effect_L = (weight_S * (mean_in_SL - mean_out_SL)).sum(axis=0)
    error_L = np.sqrt((weight_S**2 * (spread_in_L / in_S + spread_out_L / out_S)).sum(axis=0))
    return "", (effect_L, error_L)


def _pooled(squares_SL: NDArray[np.float64], count_S: NDArray[np.float64]) -> NDArray[np.float64]:
    pooled_L: NDArray[np.float64] = np.maximum(squares_SL, 0).sum(axis=0) / (count_S - 1).sum()
    return pooled_L


# In words

TITLES = {
    "critical": "Critical blocks",
    "islands": "Task islands",
    "gradients": "Task gradients",
    "two-ended": "Two-ended blocks",
    "least": "Least contributing blocks",
    "caption length": "Caption length",
    "size": "Image size",
    "aspect": "Aspect",
    DROPPED: "Dropped captions",
    BACKEND: "Data backend",
}


def words(finding: Finding) -> str:
    """What was found, without naming the blocks: "rises with sigma by 0.12 [0.11, 0.13] ..."."""
    f = finding
    if f.kind == "critical":
        return f"changes the hidden states far more than the other blocks: {_between(f.effect, f.low, f.high)}"
    if f.kind == "islands":
        return f"lie {_between(f.effect, f.low, f.high)} above the other blocks, the median one at {f.level:.3g}"
    if f.kind == "gradients":
        verb = "rises" if f.effect > 0 else "falls"
        size = _between(*((f.effect, f.low, f.high) if f.effect > 0 else (-f.effect, -f.high, -f.low)))
        return f"{verb} from clean to noise by {size}, around a mean of {f.level:.3g}"
    if f.kind == "two-ended":
        return f"is {_between(f.effect, f.low, f.high)} higher or more at both ends of sigma than between"
    if f.kind == "least":
        share = f"{100 * f.effect:.3g}% [{100 * max(f.low, 0):.3g}, {100 * f.high:.3g}]"
        return f"does {share} of what the median block does ({f.level:.3g})"
    size = f"{100 * f.effect:+.3g}% [{100 * f.low:+.3g}, {100 * f.high:+.3g}]"
    return {
        "caption length": f"{size} from shorter to longer captions",
        "size": f"{size} from smaller to larger images",
        "aspect": f"{size} from squarer to longer images",
        DROPPED: f"{size} where the caption was dropped",
        BACKEND: f"{size} on {f.value} compared with the other data",
    }[f.kind]


def _between(effect: float, low: float, high: float) -> str:
    return f"{effect:.3g} [{low:.3g}, {high:.3g}]"


def chance(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-6 else "p < 1e-6"


def numbered(finding: Finding, observation: Observation) -> tuple[int, ...]:
    """The numbers of a finding's blocks in the list of all blocks."""
    blocks = all_blocks([stream.heatmap.blocks for stream in observation.streams.values()])
    return tuple(blocks.index(block) for block in finding.blocks)
