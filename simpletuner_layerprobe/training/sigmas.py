"""Noise levels for a probe-only run: uniform, or uniform and stratified."""

from __future__ import annotations

import numpy as np

DIGITS = 3
CYCLE = 10**DIGITS


def uniform_sigmas(count: int, *, seed: int, rank: int, first: int) -> np.ndarray:
    """Independent uniform draws in [0, 1), as in the article (torch.rand).

    first: how many samples this rank has drawn before, so that a run that goes on does not repeat its draws.
    Returns (count,) float64. The same arguments give the same sigmas.
    """
    return np.random.default_rng([seed & 0xFFFFFFFF, rank, first]).random(count)


def stratified_sigmas(sample_N: np.ndarray, *, seed: int) -> np.ndarray:
    """Sigmas of the samples with these global numbers: each uniform over [0, 1), consecutive ones spread evenly.

    Every aligned ten consecutive samples fill the ten tenths of [0, 1], every hundred the hundredths, every
    thousand the thousandths: the radical inverse in base 10 with randomly permuted digits (A. Owen, "Randomly
    permuted (t,m,s)-nets", 1995), with a uniform draw inside the last stratum. Ten, because heatmaps have ten bins
    unless told otherwise. Ranks share one sequence: rank r of W takes the samples r, r + W, r + 2W, ...

    sample_N: int, 0 or more. Returns (N,) float64 in [0, 1). The same arguments give the same sigmas.
    """
    return np.array([_stratified_sigma(int(sample), seed) for sample in sample_N], dtype=np.float64)


def _stratified_sigma(sample: int, seed: int) -> float:
    cycle, position = divmod(sample, CYCLE)
    stratum, prefix, remaining = 0, 1, position
    for _ in range(DIGITS):
        remaining, digit = divmod(remaining, 10)
        # `prefix` names the node of the digit tree: its digits so far, with a leading 1.
        permutation = np.random.default_rng([seed & 0xFFFFFFFF, cycle, prefix]).permutation(10)
        stratum = stratum * 10 + int(permutation[digit])
        prefix = prefix * 10 + digit
    inside = np.random.default_rng([seed & 0xFFFFFFFF, cycle, CYCLE * 10 + position]).random()
    return (stratum + inside) / CYCLE
