from __future__ import annotations

from fractions import Fraction
from math import prod

import numpy as np
import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr.factors import (
    achieved_factor,
    article_factors,
    factorisation,
    lokr_parameters,
)

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

contributions = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def rounded_half_to_even(number: Fraction) -> int:
    whole, rest = divmod(number, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    return int(whole) + bool(up)


@given(contributions, st.integers(1, 40))
def test_factors_are_the_articles(values, max_factor):
    factors = article_factors(values, max_factor=max_factor).tolist()
    for value, factor in zip(values, factors, strict=True):
        # The article computes in float64: so does the sum here, only the rounding is exact.
        assert factor == rounded_half_to_even(Fraction((1 - value) * (max_factor - 1) + 1))
        assert 1 <= factor <= max_factor


def test_the_ends_and_the_halves():
    assert article_factors([0, 1]).tolist() == [12, 1]
    assert article_factors([0, 0.25, 0.5, 0.75, 1], max_factor=3).tolist() == [3, 2, 2, 2, 1]
    assert article_factors([0.5], max_factor=4).tolist() == [2]
    assert article_factors([0.3, 0.9], max_factor=1).tolist() == [1, 1]
    assert article_factors([0.0]).dtype == np.int64


def test_critical_blocks_get_factor_1():
    assert article_factors([0, 0, 0, 0], critical=(0, 3)).tolist() == [1, 12, 12, 1]
    assert article_factors([0, 0], critical=[np.int64(1), 1]).tolist() == [12, 1]


@pytest.mark.parametrize("max_factor", [0, -3, 2.5, True, "12"])
def test_max_factor_below_one_or_no_number(max_factor):
    with fails("the largest factor is"):
        article_factors([0.5], max_factor=max_factor)


@pytest.mark.parametrize("critical", [-1, 38, 100])
def test_critical_block_that_does_not_exist(critical):
    with fails(f"critical block {critical} does not exist; the blocks are 0 to 37"):
        article_factors(np.zeros(38), critical=[0, critical])


@pytest.mark.parametrize("critical", [1.0, True, "1"])
def test_critical_block_that_is_no_number(critical):
    with fails("is not a whole number"):
        article_factors([0.1, 0.2], critical=[critical])


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_contribution_outside_0_to_1(value):
    with fails("the contribution of block 1 is"):
        article_factors([0.5, value])


@pytest.mark.parametrize("values", [[], [[0.5]], 0.5])
def test_contributions_of_another_shape(values):
    with fails("expected one number per block"):
        article_factors(values)


def test_achieved_factor_is_lycoris_factorization():
    from lycoris.functional.general import factorization

    of_models = (640, 768, 1152, 1280, 1536, 2304, 2432, 3072, 4096, 4864, 9728, 12288, 14592, 15360, 21504)
    for dimension in (*range(1, 301), *of_models):
        for factor in (-1, *range(1, 41), 50, 64, 100, 1216, 2432):
            expected = factorization(dimension, factor)
            part = achieved_factor(dimension, factor)
            assert (part, dimension // part) == expected, (dimension, factor)


@given(st.integers(1, 50_000), st.integers(1, 500))
def test_achieved_factor_is_lycoris_factorization_anywhere(dimension, factor):
    from lycoris.functional.general import factorization

    assert achieved_factor(dimension, factor) == factorization(dimension, factor)[0]


def test_the_twelve_levels_of_sd35_large_collapse():
    for dimension in (2432, 9728):
        assert [achieved_factor(dimension, f) for f in range(1, 13)] == [1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8]
        assert {achieved_factor(dimension, f) for f in range(1, 25)} == {1, 2, 4, 8, 16, 19}


@pytest.mark.parametrize("factor", [0, -2])
def test_factor_below_one(factor):
    with fails(f"the factor is {factor}"):
        achieved_factor(64, factor)


SHAPES = [(2432, 2432), (14592, 2432), (9728, 2432), (2432, 9728), (64, 96), (7, 13), (1, 5), (60, 84)]
KERNELS = [(), (3,), (1, 1), (3, 3), (2, 3, 3)]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_parameters_are_those_of_lycoris_modules(kernel):
    import torch
    from lycoris.modules.lokr import LokrModule

    for out_dimension, in_dimension in SHAPES:
        for factor in (-1, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 64):
            with torch.device("meta"):
                if kernel:
                    layer_class = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(kernel) - 1]
                    layer = layer_class(in_dimension, out_dimension, kernel)
                else:
                    layer = torch.nn.Linear(in_dimension, out_dimension)
                module = LokrModule("one", layer, lora_dim=10**6, factor=factor, full_matrix=True)
            parts = factorisation((out_dimension, in_dimension, *kernel), factor)
            assert parts.w1_shape == tuple(module.lokr_w1.shape)
            assert parts.w2_shape == tuple(module.lokr_w2.shape)
            counted = sum(parameter.numel() for parameter in module.parameters())
            assert lokr_parameters((out_dimension, in_dimension, *kernel), factor) == counted


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64))
def test_a_factorisation_multiplies_back(out_dimension, in_dimension, factor):
    parts = factorisation((out_dimension, in_dimension), factor)
    assert prod(parts.out_parts) == out_dimension
    assert prod(parts.in_parts) == in_dimension
    assert parts.parameters >= lokr_parameters((out_dimension, in_dimension), -1)
    assert lokr_parameters((out_dimension, in_dimension), 1) == out_dimension * in_dimension + 1
