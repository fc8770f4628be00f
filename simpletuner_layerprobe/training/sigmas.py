"""Noise levels for a probe-only run: uniform, or uniform and stratified.

Every rank has a sequence of its own. Its members are numbered from 0, and a run that goes on takes it up at the number
of the samples that this rank has recorded: however unevenly ranks stop, and however many there are the next time, none
is drawn twice and each rank's own samples fill the strata.

With a noise seed (fixed_noise.py) there is no sequence: `image_sigma` gives each repeat of an image its sigma.

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


SPREAD_DIGITS = (0, 5, 2, 7, 1, 6, 3, 8, 4, 9)
"""The order in which the tenths of an image's sigmas come: two repeats are a half apart, four at least a fifth."""


def image_sigma(image: int, repeat: int, *, seed: int, stratified: bool) -> float:
    """The sigma in [0, 1) of one repeat of an image, whatever else is in the run; uniform over [0, 1) over the images.

    image: its 64-bit hash. Stratified: an offset of the image, independent and uniform, plus the repeat's radical
    inverse in base 10 with the digits in the order of SPREAD_DIGITS, modulo 1 (a rotation: Cranley and Patterson, 1976,
    SIAM Journal on Numerical Analysis 13). Every aligned ten repeats of an image fill the ten tenths of [0, 1], every
    hundred the hundredths, and so on; images do not know of each other, so that their offsets are independent draws.
    Otherwise every repeat is an independent draw.
    """
    words = (image & 0xFFFFFFFF, image >> 32)
    if not stratified:
        return float(_random(seed, seed >> 32, *words, repeat, 1).random())
    inverse, unit = 0.0, 1.0
    while repeat:
        repeat, digit = divmod(repeat, 10)
        unit /= 10
        inverse += SPREAD_DIGITS[digit] * unit
    return float((_random(seed, seed >> 32, *words, 0).random() + inverse) % 1.0)


def _random(seed: int, *place: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, *place])
