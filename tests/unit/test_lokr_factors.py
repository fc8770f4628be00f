"""Contributions to factors."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st
from lokr_models import split

from simpletuner_layerprobe.lokr.factors import article_factors, factor_steps

CONTRIBUTIONS = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def rounded_half_to_even(number: Fraction) -> int:
    whole, rest = divmod(number, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    return int(whole) + bool(up)


@given(CONTRIBUTIONS, st.one_of(st.integers(1, 40), st.floats(1, 40)))
def test_factors_are_the_articles(values, contrast):
    factors = article_factors(values, contrast=contrast).tolist()
    for value, factor in zip(values, factors, strict=True):
        # The article computes in float64: so does the sum here, only the rounding is exact.
        assert factor == max(1, rounded_half_to_even(Fraction((1 - value) * (contrast - 1) + 1)))


def test_the_ends_and_the_halves():
    assert article_factors([0, 1]).tolist() == [12, 1]
    assert article_factors([0, 0.25, 0.5, 0.75, 1], contrast=3).tolist() == [3, 2, 2, 2, 1]
    assert article_factors([0.5], contrast=4).tolist() == [2]
    assert article_factors([0.3, 0.9], contrast=1).tolist() == [1, 1]
    assert article_factors([0.0]).dtype == np.int64
    assert article_factors([0, 0, 0, 0], critical=[np.int64(0), 3, 3]).tolist() == [1, 12, 12, 1]


@pytest.mark.parametrize(
    ("text", "values", "options"),
    [
        ("the contrast is 0.99", [0.5], {"contrast": 0.99}),
        ("the contrast is inf", [0.5], {"contrast": float("inf")}),
        ("the contrast is nan", [0.5], {"contrast": float("nan")}),
        ("critical block 38 does not exist; the blocks are 0 to 37", [0] * 38, {"critical": [0, 38]}),
        ("critical block -1 does not exist", [0] * 38, {"critical": [-1]}),
        ("critical block 1.0 is not a whole number", [0] * 38, {"critical": [1.0]}),
        ("critical block True is not a whole number", [0] * 38, {"critical": [True]}),
        ("the contribution of block 1 is -0.01; expected 0 to 1", [0.5, -0.01], {}),
        ("the contribution of block 1 is nan; expected 0 to 1", [0.5, float("nan")], {}),
        ("expected one number per block", [], {}),
        ("expected one number per block", [[0.5]], {}),
    ],
)
def test_what_has_no_factors(text, values, options):
    with fails(text):
        article_factors(values, **options)


@pytest.mark.parametrize(
    ("dimensions", "steps"),
    [
        ((2432, 9728), (1, 2, 4, 8, 16, 19, 32, 38, 64, 77)),
        ((1,), (1,)),
        ((6, 10), (1, 2)),
        ((12, 90), (1, 2, 3, 5, 7, 9)),
    ],
)
def test_the_steps_are_the_factors_that_make_a_difference(dimensions, steps):
    assert factor_steps(dimensions) == steps
    for before, after in pairwise(steps):
        assert [split(d, before) for d in dimensions] != [split(d, after) for d in dimensions]
