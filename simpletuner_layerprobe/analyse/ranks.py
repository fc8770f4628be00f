"""Rank correlations of what blocks do, with the interval that the images leave.

Shape letters: T bins, L blocks, D numbers that are ranked, R replicates, the first of which is the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHUFFLES = 2000
MIN_SHUFFLED = 4
"""Blocks that there must be to shuffle their profiles: three leave two ways in which none stays in its place."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Profile:
    """Whether a block's profile of one quantity over sigma is that of another.

    mean: over the blocks, of the rank correlation of both profiles within the block. limit: the 97.5th percentile of
    the same mean with the first profiles shuffled so that no block keeps its own. p: the share of the shuffles that
    reach the run's own mean. Both NaN for fewer than MIN_SHUFFLED blocks.
    """

    mean: Interval
    limit: float
    p: float


@dataclass(frozen=True)
class Agreement:
    """How alike two sets of levels of the same blocks are.

    correlation: Spearman's. most, least: how many of the `ends` largest (smallest) of one are so in the other.
    """

    correlation: float
    most: int
    least: int
    ends: int


def ranks(value_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis, equal numbers sharing theirs, less their mean and of length 1; 0 if all are equal."""
    from scipy.stats import rankdata  # takes half a second to import

    rank_D = rankdata(value_D, axis=-1)
    rank_D = rank_D - rank_D.mean(axis=-1, keepdims=True)
    length = np.sqrt((rank_D**2).sum(axis=-1, keepdims=True))
    unit_D: NDArray[np.float64] = rank_D / np.where(length > 0, length, 1.0)
    return unit_D


def spearman(a_D: NDArray[np.float64], b_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation along the last axis, for all others at once; 0 where a side has no order."""
    correlation: NDArray[np.float64] = np.clip((ranks(a_D) * ranks(b_D)).sum(axis=-1), -1.0, 1.0)
    return correlation


def interval(value_R: NDArray[np.float64]) -> Interval:
    """The run's own rank correlation and its interval: the middle 95% of the replicates, and the end that is further
    from 0 as far as the other one, mirrored at the run's own on Fisher's scale, reaches.

    Chance pulls a rank correlation towards 0, in the run and in its replicates once more: these alone end too near.
    """
    low, high = (float(end) for end in np.quantile(value_R[1:], [0.025, 0.975], method="weibull"))
    own = float(value_R[0])
    near = low if own > 0 else high
    at, other = np.arctanh(np.clip([own, near], -1 + 1e-9, 1 - 1e-9))
    mirrored = float(np.tanh(2 * at - other))
    return Interval(own, low, max(high, mirrored)) if own > 0 else Interval(own, min(low, mirrored), high)


def difference(value_R: NDArray[np.float64]) -> Interval:
    """The run's own number and its interval: the middle 95% of the replicates, or these mirrored at the run's own where
    that reaches further."""
    low, high = (float(end) for end in np.quantile(value_R[1:], [0.025, 0.975], method="weibull"))
    own = float(value_R[0])
    return Interval(own, min(low, 2 * own - high), max(high, 2 * own - low))


def reliability(value_RD: NDArray[np.float64]) -> float:
    """The rank correlation of the run's numbers with those of as many other images of the same kind, about.

    Two halves of the images lie off the whole by the same deviation to both sides; Spearman and Brown's formula (1910)
    makes up for their size.
    """
    deviation_RD = value_RD[1:401] - value_RD[0]  # as many as a mean needs
    half = float(spearman(value_RD[0] + deviation_RD, value_RD[0] - deviation_RD).mean())
    return 2 * half / (1 + half) if half > 0 else 0.0


def profile(a_RTL: NDArray[np.float64], b_RTL: NDArray[np.float64], seed: int = 0) -> Profile:
    """Whether the profiles of `a` over the bins are those of `b`, block by block. See `Profile`."""
    a_RLT, b_RLT = (np.swapaxes(part_RTL, -1, -2) for part_RTL in (a_RTL, b_RTL))
    mean = interval(spearman(a_RLT, b_RLT).mean(axis=-1))
    L = a_RLT.shape[1]
    if L < MIN_SHUFFLED:
        return Profile(mean, np.nan, np.nan)
    pair_LL = ranks(a_RLT[0]) @ ranks(b_RLT[0]).T
    shuffled = np.array([pair_LL[order_L, np.arange(L)].mean() for order_L in derangements(L, SHUFFLES, seed)])
    reached = int((shuffled >= mean.value - 1e-12).sum())
    limit = float(np.quantile(shuffled, 0.975, method="weibull"))
    return Profile(mean, limit, (1 + reached) / (1 + len(shuffled)))


def derangements(L: int, count: int, seed: int) -> NDArray[np.intp]:
    """(count, L) orders of L things that leave none in its place, all as likely. L: at least 2."""
    random = np.random.default_rng(seed)
    kept: list[NDArray[np.intp]] = []
    while sum(map(len, kept)) < count:
        order_XL = random.permuted(np.tile(np.arange(L), (3 * count, 1)), axis=1)
        kept.append(order_XL[(order_XL != np.arange(L)).all(axis=1)])
    return np.concatenate(kept)[:count]


def agreement(a_L: NDArray[np.floating], b_L: NDArray[np.floating], ends: int = 3) -> Agreement:
    """How alike the levels of the same L blocks are in two runs, two halves of the images, or a part and the whole."""
    order_a, order_b = (np.argsort(np.asarray(side_L), kind="stable") for side_L in (a_L, b_L))
    return Agreement(
        correlation=float(spearman(np.asarray(a_L, np.float64), np.asarray(b_L, np.float64))),
        most=len(np.intersect1d(order_a[-ends:], order_b[-ends:])),
        least=len(np.intersect1d(order_a[:ends], order_b[:ends])),
        ends=ends,
    )
