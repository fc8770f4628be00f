"""Chances: Student's intervals, and corrections for asking many things at once.

Shape letters: D numbers asked about, G units, R draws.
"""

from __future__ import annotations

import numpy as np
import scipy.special  # scipy.stats would take another half second to import
from numpy.typing import NDArray

Z95 = float(scipy.special.ndtri(0.975))
_GROUPS = 2048  # more units are put together, which changes nothing but the time


def student95(freedom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 97.5% point of Student's t: half a 95% interval in standard errors. Infinite without a degree of freedom."""
    point: NDArray[np.float64] = np.where(freedom > 0, scipy.special.stdtrit(np.maximum(freedom, 1e-3), 0.975), np.inf)
    return point


def above(score_D: NDArray[np.float64], freedom: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """The chance that a number of Student's distribution is larger."""
    chance_D: NDArray[np.float64] = scipy.special.stdtr(freedom, -score_D)
    return chance_D


def scores(difference_D: NDArray[np.float64], error_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """difference / error; a difference without any error is infinitely certain, none at all is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        score_D = difference_D / error_D
    return np.where(np.isnan(score_D), 0.0, score_D)


def pooled_freedom(square_ND: NDArray[np.float64], freedom_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees of freedom of the sum over the first axis of squared errors with these degrees of freedom.

    Satterthwaite's formula (Welch 1947, Biometrika 34); infinite where all errors are 0.
    """
    # Relative to the largest, as fourth powers of small errors underflow.
    share_ND = square_ND / np.maximum(square_ND.max(axis=0, initial=0.0), np.finfo(np.float64).tiny)
    fourth_D = (share_ND**2 / freedom_ND).sum(axis=0)
    freedom_D: NDArray[np.float64] = np.where(
        fourth_D > 0, share_ND.sum(axis=0) ** 2 / np.where(fourth_D > 0, fourth_D, 1), np.inf
    )
    return freedom_D


def holm(p_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chances corrected for their number by Holm's step-down method (1979). NaN counts as no test and stays NaN.

    Whoever calls everything at or below alpha a finding calls anything wrongly with a chance of at most alpha, however
    the tests depend on each other.
    """
    corrected_D = np.full(p_D.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_D))
    order = tested[np.argsort(p_D[tested], kind="stable")]
    left = np.arange(len(order), 0, -1)
    corrected_D[order] = np.minimum(np.maximum.accumulate(p_D[order] * left), 1.0)
    return corrected_D


def sign_chances(score_GD: NDArray[np.float64], draws: int = 1999, seed: int = 0) -> NDArray[np.float64]:
    """(D,) the chance of a sum over the units as large as it is, corrected for all D, if units push either way alike.

    score_GD: what each unit adds to the D sums. Units get signs at random; a sum is compared, in its standard errors,
    with the largest of all D (score bootstrap: Kline and Santos 2012, Journal of Econometric Methods 1; largest of all:
    Westfall and Young 1993). Blocks that move together cost no more than one. The smallest chance is 1 / (draws + 1).
    """
    spread_D = np.sqrt((score_GD**2).sum(axis=0))
    groups = np.arange(len(score_GD)) * min(_GROUPS, len(score_GD)) // len(score_GD)
    score_GD = np.add.reduceat(score_GD, np.flatnonzero(np.diff(groups, prepend=-1)), axis=0)
    unit_GD = score_GD / np.where(spread_D > 0, spread_D, 1)
    sign_RG = np.random.default_rng(seed).integers(0, 2, size=(draws, len(unit_GD))) * 2.0 - 1
    largest_R = np.sort(np.abs(sign_RG @ unit_GD).max(axis=1))
    reached_D = draws - np.searchsorted(largest_R, np.abs(unit_GD.sum(axis=0)) - 1e-12)
    chance_D: NDArray[np.float64] = np.where(spread_D > 0, (1 + reached_D) / (draws + 1), 1.0)
    return chance_D
