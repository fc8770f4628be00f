"""Contributions to LoKr factors, and what a factor means for one weight.

LoKr writes the change of a weight of shape (out, in) as a Kronecker product of a small matrix w1 and a large
matrix w2. A factor f asks for a w1 of about f x f: a smaller factor gives more parameters, factor 1 is a full
matrix. Shape letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simpletuner_layerprobe.errors import ConfigError

ARTICLE_CONTRAST = 12
"""The article's factor of the block that contributes least; 1 is that of the block that contributes most."""
AUTO_FACTOR = -1
"""LyCORIS's factor for "as square as the dimension allows"."""


def article_factors(
    value_L: ArrayLike, *, contrast: float = ARTICLE_CONTRAST, critical: Sequence[int] = ()
) -> NDArray[np.int64]:
    """The article's factors: round((1 - contribution) * (contrast - 1) + 1), critical blocks get 1.

    value_L: (L,) contributions in [0, 1], 1 for the block that contributes most. Halves are rounded to even, as numpy
    and Python do. critical: numbers of blocks, counted from 0. Returns (L,) int64, 1 or more. Raises ConfigError for a
    contrast below 1, a contribution outside [0, 1], a critical block that is not there.
    """
    if not 1 <= contrast < float("inf"):
        raise ConfigError(f"the contrast is {contrast}; expected a number, 1 or more")
    contribution_L = np.asarray(value_L, dtype=np.float64)
    if contribution_L.ndim != 1 or contribution_L.size == 0:
        raise ConfigError(f"contributions have the shape {contribution_L.shape}; expected one number per block")
    outside_L = ~((contribution_L >= 0) & (contribution_L <= 1))
    if outside_L.any():
        block = int(np.flatnonzero(outside_L)[0])
        raise ConfigError(f"the contribution of block {block} is {contribution_L[block]}; expected 0 to 1")
    factor_L = np.maximum(1, np.round((1 - contribution_L) * (contrast - 1) + 1)).astype(np.int64)
    factor_L[list(checked_blocks(critical, factor_L.size, "critical block"))] = 1
    return factor_L


def checked_blocks(numbers: Iterable[int], count: int, what: str) -> tuple[int, ...]:
    """Numbers of blocks, counted from 0, as they are. Raises ConfigError for one that is not below `count`."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ConfigError(f"{what} {number!r} is not a whole number; give block numbers such as 0,31,35")
        if not 0 <= number < count:
            raise ConfigError(f"{what} {number} does not exist; the blocks are 0 to {count - 1}")
    return tuple(map(int, numbers))


@cache
def achieved_factor(dimension: int, factor: int) -> int:
    """What LyCORIS makes of `factor` for one dimension of a weight: the smaller part of its split in two.

    A factor that divides the dimension is taken as it is (or the quotient, if that is smaller); any other
    becomes the largest divisor up to the factor and the square root of the dimension. So 2432 = 2^7 * 19 and
    the factors 1 to 12 only know 1, 2, 4 and 8. factor: 1 or more.
    Source: LyCORIS 4.1.3, functional/general.py, `factorization`.
    """
    if dimension % factor == 0:
        return min(factor, dimension // factor)
    return _largest_part(dimension, factor)


def factor_steps(dimensions: Iterable[int]) -> tuple[int, ...]:
    """The factors that make a difference for weights of these dimensions, ascending.

    A step splits every dimension at its largest divisor up to the factor and the dimension's square root. Factors
    that LyCORIS takes otherwise for one of them are left out: those above the root that divide the dimension (64 turns
    2432 into 38 x 64, but 76 into 32 x 76). From step to step no parts become smaller, so that the parameters fall.
    On SD3.5 Large's attention they are 1, 2, 4, 8, 16, 19, 32 and 38.
    """
    steps: list[int] = []
    last: tuple[int, ...] = ()
    distinct = sorted(set(dimensions))
    for factor in range(1, max(isqrt(dimension) for dimension in distinct) + 1):
        split = tuple(achieved_factor(dimension, factor) for dimension in distinct)
        if split != last and split == tuple(_largest_part(dimension, factor) for dimension in distinct):
            steps.append(factor)
            last = split
    return tuple(steps)


def _largest_part(dimension: int, factor: int) -> int:
    """The largest divisor of a dimension up to the factor and the square root."""
    return next(part for part in range(min(factor, isqrt(dimension)), 0, -1) if dimension % part == 0)
