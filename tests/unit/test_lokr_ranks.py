"""Plans by ranks, against parameters counted here and against LyCORIS's own network."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from failing import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr.config import config_bytes
from simpletuner_layerprobe.lokr.proof import check_config, verify
from simpletuner_layerprobe.lokr.ranks import (
    PlannedRank,
    rank_config,
    rank_limit,
    rank_plan,
    ranks_for_budget,
    ranks_from_factors,
)
from simpletuner_layerprobe.models import Architecture, architecture
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.families import Target
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

SD3 = families.family("sd3").targets
TARGETS = (Target("blocks.*", ("ff*",), ("*",)),)


def table(count: int) -> tuple[Module, ...]:
    """Blocks with a feed-forward of 12 x 30, an attention of 12 x 12, a gate of 3 x 12 and a 3 x 3 convolution."""
    modules = [Module("blocks", "ModuleList", ())]
    for number in range(count):
        block = f"blocks.{number}"
        modules += [
            Module(block, "Block", ()),
            Module(f"{block}.ff", "Linear", (12, 30)),
            Module(f"{block}.attn", "Linear", (12, 12)),
            Module(f"{block}.gate", "Linear", (3, 12)),
            Module(f"{block}.mix", "Conv2d", (8, 4, 3, 3)),
        ]
    return tuple(modules)


def names(count: int) -> list[str]:
    return [f"blocks.{number}" for number in range(count)]


@pytest.fixture(scope="module")
def large() -> Architecture:
    return architecture("sd35-large")


def test_a_factor_is_a_fraction_of_the_rank():
    assert ranks_from_factors([1, 2, 5, 12, 200], 64).tolist() == [[64, 32], [32, 16], [13, 6], [5, 3], [1, 1]]
    with fails("the largest rank is 0"):
        ranks_from_factors([1], 0)
    with fails("factors must be one number per block"):
        ranks_from_factors([0.5], 4)


@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_lycoris_gives_every_module_its_rank_and_no_more_than_it_can_use(algo):
    modules, rank_L2 = table(3), np.array([[20, 10], [9, 5], [1, 1]])
    plan = rank_plan(algo, names(3), rank_L2, TARGETS, modules)
    config = rank_config(algo, names(3), rank_L2, TARGETS, modules)
    check = verify(config, plan, modules)
    assert check.wrong == () and len(check.rows) == 12 and check.unmatched == ()
    at = {one.name.removeprefix("blocks."): one.rank for one in plan}
    if algo == "locon":
        assert [at["0.ff"], at["0.attn"], at["0.gate"], at["0.mix"]] == [12, 10, 3, 8]
    else:
        assert [at["0.ff"], at["0.attn"], at["0.gate"], at["0.mix"]] == [4, 4, 2, 3]
    twice = 2 if algo == "loha" else 1
    numbers = {"ff": 12 + 30, "attn": 12 + 12, "gate": 3 + 12, "mix": 8 + 4 * 9}
    assert check.parameters == twice * sum(rank * numbers[name.split(".")[1]] for name, rank in at.items())
    assert all(row.got is not None and row.got.scale == 1 for row in check.rows)


def test_another_rank_or_algorithm_is_found():
    modules, rank_L2 = table(2), np.array([[4, 2], [2, 1]])
    plan = rank_plan("locon", names(2), rank_L2, TARGETS, modules)
    config = rank_config("locon", names(2), rank_L2, TARGETS, modules)
    config["apply_preset"]["name_algo_map"]["blocks.1.ff*"]["dim"] = 3
    assert [row.name for row in verify(config, plan, modules).wrong] == ["blocks.1.ff"]
    other = rank_config("loha", names(2), rank_L2, TARGETS, modules)
    assert len(verify(other, plan, modules).wrong) == 8
    with fails("expected locon or loha"):
        rank_config("lora", names(2), rank_L2, TARGETS, modules)


@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_budgets_on_sd35_large(algo, large):
    """Up to the largest that the shapes allow; loha's full rank needs no more than 458M parameters."""
    blocks = large.streams[0].blocks
    value = np.random.default_rng(5).random(38)
    factors = 1 + 11 * (1 - value)
    for budget in np.geomspace(20e6, 2e9 if algo == "locon" else 4e8, 20).astype(int).tolist():
        found = ranks_for_budget(algo, factors, value, blocks, SD3, large.modules, budget)
        assert abs(found.reached - budget) <= 0.005 * budget
        assert found.lower < found.reached < found.upper
        assert abs(found.reached - budget) <= min(abs(found.lower - budget), abs(found.upper - budget))
        plan = rank_plan(algo, blocks, found.rank_L2, SD3, large.modules)
        assert sum(one.parameters for one in plan) == found.reached
    config = rank_config(algo, blocks, found.rank_L2, SD3, large.modules)
    check = verify(config, plan, large.modules, model_class=large.model_class)
    assert (check.wrong, check.parameters) == ((), found.reached)
    again = check_config(config, large.modules, model_class=large.model_class)
    assert (again.wrong, again.intended_parameters, again.notes) == ((), found.reached, ())


VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@settings(max_examples=60)
@given(VALUES, st.integers(0, 6000), st.sampled_from(["locon", "loha", "lora"]), st.floats(1, 30))
def test_more_contribution_never_gets_the_smaller_rank(values, more, algo, contrast):
    blocks, modules, value = names(len(values)), table(len(values)), np.array(values)
    least = sum(one.parameters for one in rank_plan(algo, blocks, [[1, 1]] * len(values), TARGETS, modules))
    factors = 1 + (contrast - 1) * (1 - value)
    found = ranks_for_budget(algo, factors, value, blocks, TARGETS, modules, least + more)
    order = np.argsort(value, kind="stable")
    for level in (0, 1):
        for low, high in pairwise(order):
            if value[low] < value[high]:
                assert found.rank_L2[low, level] <= found.rank_L2[high, level]
    plan = rank_plan(algo, blocks, found.rank_L2, TARGETS, modules)
    assert sum(one.parameters for one in plan) == found.reached
    again = ranks_for_budget(algo, factors, value, blocks, TARGETS, modules, least + more)
    assert np.array_equal(again.rank_L2, found.rank_L2)
    if algo != "lora":
        first, second = (rank_config(algo, blocks, one.rank_L2, TARGETS, modules) for one in (found, again))
        assert config_bytes(first) == config_bytes(second)


def test_the_nearest_total_of_the_chain():
    """One block of one 12 x 30 module: every rank is 42 parameters."""
    modules = (
        Module("blocks", "ModuleList", ()),
        Module("blocks.0", "Block", ()),
        Module("blocks.0.ff", "Linear", (12, 30)),
    )
    for budget in range(42, 600):
        found = ranks_for_budget("locon", [1.0], [1.0], ["blocks.0"], TARGETS, modules, budget)
        assert abs(found.reached - budget) == min(abs(42 * rank - budget) for rank in range(1, 13))
        assert found.rank_L2[0, 0] == found.reached // 42
    assert (found.reached, found.lower, found.upper) == (504, 462, None)
    with fails("41 parameters are fewer than rank 1 everywhere has, 42"):
        ranks_for_budget("locon", [1.0], [1.0], ["blocks.0"], TARGETS, modules, 41)


def test_the_largest_rank_of_use():
    assert [rank_limit("locon", shape) for shape in ((12, 30), (30, 12), (64, 4, 3, 3))] == [12, 12, 36]
    assert [rank_limit("loha", shape) for shape in ((9, 30), (10, 30), (1, 5))] == [3, 4, 1]
    assert PlannedRank("a", (64, 4, 3, 3), "locon", 5).parameters == 5 * (64 + 36)
