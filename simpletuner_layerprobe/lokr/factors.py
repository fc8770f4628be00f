"""Contributions to LoKr factors, and what a factor means for one weight.

LoKr writes the change of a weight of shape (out, in) as a Kronecker product of a small matrix w1 and a large
matrix w2. A factor f asks for a w1 of about f x f: a smaller factor gives more parameters, factor 1 is a full
matrix. Shape letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt, prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simpletuner_layerprobe.errors import ProbeError

ARTICLE_MAX_FACTOR = 12
AUTO_FACTOR = -1
"""LyCORIS's factor for "as square as the dimension allows"."""


def article_factors(
    value_L: ArrayLike, *, max_factor: int = ARTICLE_MAX_FACTOR, critical: Sequence[int] = ()
) -> NDArray[np.int64]:
    """The article's factors: round((1 - contribution) * (max_factor - 1) + 1), critical blocks get 1.

    value_L: (L,) contributions in [0, 1], 1 for the block that contributes most. Halves are rounded to
    even, as numpy and Python do. critical: numbers of blocks, counted from 0. Returns (L,) int64 in
    [1, max_factor]. Raises ProbeError for a max_factor below 1, a contribution outside [0, 1], a critical
    block that is not there.
    """
    if isinstance(max_factor, bool) or not isinstance(max_factor, int | np.integer) or max_factor < 1:
        raise ProbeError(f"the largest factor is {max_factor!r}; it must be a whole number, 1 or more")
    contribution_L = np.asarray(value_L, dtype=np.float64)
    if contribution_L.ndim != 1 or contribution_L.size == 0:
        raise ProbeError(f"contributions have the shape {contribution_L.shape}; expected one number per block")
    outside_L = ~((contribution_L >= 0) & (contribution_L <= 1))
    if outside_L.any():
        block = int(np.flatnonzero(outside_L)[0])
        raise ProbeError(f"the contribution of block {block} is {contribution_L[block]}; expected 0 to 1")
    inverted_L = 1 - contribution_L
    factor_L = np.clip(np.round(inverted_L * (max_factor - 1) + 1), 1, max_factor).astype(np.int64)
    for block in critical:
        if isinstance(block, bool) or not isinstance(block, int | np.integer):
            raise ProbeError(f"critical block {block!r} is not a whole number; give block numbers such as 0,31,35")
        if not 0 <= block < factor_L.size:
            raise ProbeError(f"critical block {block} does not exist; the blocks are 0 to {factor_L.size - 1}")
        factor_L[block] = 1
    return factor_L


@cache
def achieved_factor(dimension: int, factor: int) -> int:
    """What LyCORIS makes of `factor` for one dimension of a weight: the smaller part of its split in two.

    A factor that divides the dimension is taken as it is (or the quotient, if that is smaller); any other
    becomes the largest divisor up to the factor and the square root of the dimension. So 2432 = 2^7 * 19 and
    the factors 1 to 12 only know 1, 2, 4 and 8. -1 asks for the largest divisor up to the square root.
    Raises ProbeError for another factor below 1.
    Source: LyCORIS 4.1.3, functional/general.py, `factorization`.
    """
    if factor != AUTO_FACTOR and factor < 1:
        raise ProbeError(f"the factor is {factor}; it must be a whole number, 1 or more, or -1 for automatic")
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor)
    largest = isqrt(dimension) if factor == AUTO_FACTOR else min(factor, isqrt(dimension))
    return next(part for part in range(largest, 0, -1) if dimension % part == 0)


@dataclass(frozen=True)
class Factorisation:
    """How a full-matrix LoKr splits one weight of shape (out, in, *kernel).

    out_parts, in_parts: (part of w1, part of w2); their products are the two dimensions. kernel: () for a
    linear layer; it stays with w2.
    """

    out_parts: tuple[int, int]
    in_parts: tuple[int, int]
    kernel: tuple[int, ...] = ()

    @property
    def w1_shape(self) -> tuple[int, ...]:
        return (self.out_parts[0], self.in_parts[0])

    @property
    def w2_shape(self) -> tuple[int, ...]:
        return (self.out_parts[1], self.in_parts[1], *self.kernel)

    @property
    def parameters(self) -> int:
        """Trainable numbers: those of w1 and of w2."""
        return prod(self.w1_shape) + prod(self.w2_shape)


def factorisation(shape: tuple[int, ...], factor: int) -> Factorisation:
    """The split of a weight of shape (out, in) or (out, in, *kernel) at `factor`, as LyCORIS's LoKr makes it.

    Raises ProbeError for a factor below 1 other than -1.
    """
    out_dimension, in_dimension, *kernel = shape
    out_part, in_part = achieved_factor(out_dimension, factor), achieved_factor(in_dimension, factor)
    return Factorisation((out_part, out_dimension // out_part), (in_part, in_dimension // in_part), tuple(kernel))


def lokr_parameters(shape: tuple[int, ...], factor: int) -> int:
    """Trainable numbers of a full-matrix LoKr on a weight of shape (out, in, *kernel)."""
    return factorisation(shape, factor).parameters
