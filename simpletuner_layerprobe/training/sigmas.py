"""Noise levels for a probe-only run: uniform, or uniform and stratified.

Every rank has a sequence of its own. Its members are numbered from 0, and a run that goes on takes it up at the number
of the samples that this rank has recorded: however unevenly ranks stop, and however many there are the next time, none
is drawn twice and each rank's own samples fill the strata.

Shape letters: N samples.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

DIGITS = 3
CYCLE = 10**DIGITS


def uniform_sigmas(numbers: Iterable[int], *, seed: int, rank: int) -> NDArray[np.float64]:
    """Independent uniform draws in [0, 1), as in the article (torch.rand), for these members of a rank's sequence.

    The same arguments give the same sigmas, (N,).
    """
    return np.array([_random(seed, rank, number).random() for number in numbers], dtype=np.float64)


def stratified_sigmas(numbers: Iterable[int], *, seed: int, rank: int) -> NDArray[np.float64]:
    """Sigmas of these members of a rank's sequence: each uniform over [0, 1), consecutive ones spread evenly.

    Every aligned ten consecutive members fill the ten tenths of [0, 1], every hundred the hundredths, every
    thousand the thousandths: the radical inverse in base 10 with randomly permuted digits (A. Owen, "Randomly
    permuted (t,m,s)-nets", 1995), with a uniform draw inside the last stratum. Ten, because heatmaps have ten bins
    unless told otherwise. The same arguments give the same sigmas, (N,).
    """
    return np.array([_stratified_sigma(number, seed, rank) for number in numbers], dtype=np.float64)


def _stratified_sigma(number: int, seed: int, rank: int) -> float:
    cycle, position = divmod(number, CYCLE)
    stratum, prefix, remaining = 0, 1, position
    for _ in range(DIGITS):
        remaining, digit = divmod(remaining, 10)
        # `prefix` names the node of the digit tree: its digits so far, with a leading 1.
        permutation = _random(seed, rank, cycle, prefix).permutation(10)
        stratum = stratum * 10 + int(permutation[digit])
        prefix = prefix * 10 + digit
    inside = _random(seed, rank, cycle, CYCLE * 10 + position).random()
    return (stratum + inside) / CYCLE


def _random(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, *place])
