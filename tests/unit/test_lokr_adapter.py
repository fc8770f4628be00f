"""What a factor or a rank means for a weight, counted here."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr.adapter import (
    ALGORITHMS,
    Adapter,
    article_number,
    planned_adapter,
    rank_limit,
    steps,
)

SIZES = st.integers(1, 400)


def test_adapters_in_words():
    assert str(planned_adapter("lokr", (24, 36), 5)) == "lokr factor 5 (4x4 + 6x9)"
    assert str(planned_adapter("locon", (8, 4, 3, 3), 2)) == "lora (2x4x3x3 + 8x2x1x1)"
    assert str(Adapter("lora", None, (("a", (4, 36)),), 0.25)) == "lora (4x36) scale 0.25"
    assert planned_adapter("lokr", (24, 36), 5).same_as(planned_adapter("lokr", (24, 36), 4))
    assert not planned_adapter("lokr", (24, 36), 5).same_as(planned_adapter("lokr", (24, 36), 3))
    assert planned_adapter("locon", (24, 36), 5).factorisation is None


@pytest.mark.parametrize("algo", ["locon", "loha", "lora"])
def test_a_rank_stops_where_a_weight_can_use_no_more(algo):
    for rank in range(1, 20):
        used = min(rank, 4 if algo == "loha" else 12)
        twice = 2 if algo == "loha" else 1
        assert planned_adapter(algo, (12, 30), rank).parameters == twice * used * (12 + 30)
    assert planned_adapter("locon", (64, 4, 3, 3), 5).parameters == 5 * (64 + 36)
    assert planned_adapter("loha", (64, 4, 3, 3), 5).parameters == 2 * 5 * (64 + 36)
    assert rank_limit(algo, (64, 4, 3, 3)) == rank_limit(algo, (36, 100)) == (6 if algo == "loha" else 36)
    assert rank_limit(algo, (37, 100)) == (7 if algo == "loha" else 37)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4), st.sampled_from(ALGORITHMS))
def test_from_step_to_step_parameters_fall(shapes, algo):
    chosen = steps(algo, shapes)
    counts = [sum(planned_adapter(algo, shape, number).parameters for shape in shapes) for number in chosen]
    assert counts == sorted(counts, reverse=True)
    assert list(chosen) == sorted(chosen, reverse=algo != "lokr")
    trained = [[planned_adapter(algo, shape, number).tensors for shape in shapes] for number in chosen]
    assert all(before != after for before, after in pairwise(trained))
    if algo != "lokr":
        assert chosen[-1] == 1 and chosen[0] == max(rank_limit(algo, shape) for shape in shapes)


def test_ranks_come_four_to_an_octave():
    assert steps("locon", [(40, 50), (7, 7)]) == (40, 32, 28, 24, 20, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1)
    assert steps("loha", [(40, 50)]) == (7, 6, 5, 4, 3, 2, 1)


def test_a_factor_is_a_fraction_of_the_rank():
    ranks = [[article_number("locon", factor * level, None) for level in (1, 2)] for factor in (1, 2, 5, 12, 200)]
    assert ranks == [[64, 32], [32, 16], [13, 6], [5, 3], [1, 1]]
    assert article_number("loha", 1, None) == 32 and article_number("lokr", 7, None) == 7
    for factor, largest in product(range(1, 30), (1, 7, 100)):
        exact = Fraction(largest, factor)
        whole, rest = divmod(exact, 1)
        expected = whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2))
        assert article_number("lora", factor, largest) == max(1, expected)
    with fails("the largest rank is 0"):
        article_number("lora", 1, 0)
