"""Intervals and tests of the protocol: a two-way bootstrap over seeds and images, and Holm's correction.

Shape letters: S seeds, Q images, R replicates, M arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Mean difference of an arm to another, paired by seed and image. low, high: at 95%. p: two-sided, from the same
    replicates. replicate_R: of the mean, for intervals of other levels."""

    mean: float
    low: float
    high: float
    p: float
    replicate_R: NDArray[np.float64]

    def interval(self, level: float) -> tuple[float, float]:
        """Percentiles that leave `level` outside, half on each side."""
        low, high = np.percentile(self.replicate_R, [100 * level / 2, 100 * (1 - level / 2)])
        return float(low), float(high)


def difference(
    arm_SQ: NDArray[np.floating], other_SQ: NDArray[np.floating], replicates: int = REPLICATES
) -> Difference:
    """Seeds and images are drawn anew, with replacement and independently; the same draws for all arms of one shape."""
    change_SQ = np.asarray(arm_SQ, dtype=np.float64) - np.asarray(other_SQ, dtype=np.float64)
    S, Q = change_SQ.shape
    rng = np.random.default_rng(0)
    seed_RS = rng.multinomial(S, np.full(S, 1 / S), size=replicates) / S
    image_RQ = rng.multinomial(Q, np.full(Q, 1 / Q), size=replicates) / Q
    replicate_R = np.einsum("rs,sq,rq->r", seed_RS, change_SQ, image_RQ, optimize=True)
    low, high = np.percentile(replicate_R, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    beyond = min((replicate_R >= 0).sum(), (replicate_R <= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (replicates + 1))
    return Difference(float(change_SQ.mean()), float(low), float(high), p, replicate_R)


def holm(p_M: Sequence[float], level: float = LEVEL) -> tuple[list[bool], list[float]]:
    """Which of M are rejected, and the level that each is held to: its interval at that level is the corrected one."""
    order = np.argsort(p_M, kind="stable").tolist()
    rejected, levels, open_ = [False] * len(p_M), [level] * len(p_M), True
    for rank, place in enumerate(order):
        levels[place] = level / (len(p_M) - rank)
        open_ = open_ and p_M[place] <= levels[place]
        rejected[place] = open_
    return rejected, levels


def verdict(own: Difference, rejected: bool, margin: float) -> str:
    """better, worse, no different, or open. margin: what 10% more parameters gain."""
    inside = margin > 0 and -margin <= own.low and own.high <= margin
    if rejected:
        word = "better" if own.mean < 0 else "worse"
        return f"{word}, within the margin" if inside else word
    return "no different" if inside else "open"


def exchange_rate(loss: float, sizes: Sequence[float], losses: Sequence[float]) -> float | None:
    """The size, 1 for the equal plan's, at which equal plans have this loss: linear between them in log size.

    None outside what was measured, or where the losses do not fall with the size.
    """
    order = np.argsort(sizes)
    size = np.log(np.asarray(sizes, dtype=np.float64)[order])
    falling = np.asarray(losses, dtype=np.float64)[order]
    if np.any(np.diff(falling) >= 0) or not falling[-1] <= loss <= falling[0]:
        return None
    return float(np.exp(np.interp(-loss, -falling, size)))
