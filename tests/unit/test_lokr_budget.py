"""Plans for a budget: the best of their kind, in the right order, counted exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from failing import fails
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lokr_models import (
    SMALL_TARGETS,
    Model,
    monotone,
    numbers,
    sd3_blocks,
    sd3_model,
    small_blocks,
    wavy,
)

from simpletuner_layerprobe.lokr.budget import (
    DIRECTIONS,
    LESS,
    MAX_CONTRAST,
    MORE,
    TOLERANCE,
    UNIFORM,
    Allotment,
    Budget,
)
from simpletuner_layerprobe.lokr.factors import factor_steps
from simpletuner_layerprobe.lokr.groups import ATTENTION, FEED_FORWARD, JOINT, MODULATION, RATIOS, Group, module_groups
from simpletuner_layerprobe.run.manifest import Module

LARGE = module_groups(sd3_model(38, 2432), sd3_blocks(38))


def reached(groups: Sequence[Group], found: Allotment) -> int:
    return sum(numbers(group, factor) for group, factor in zip(groups, found.numbers, strict=True))


def shares(groups: Sequence[Group], value_L: np.ndarray, contrast: float = 12.0) -> np.ndarray:
    """As the docstring of budget.py defines them."""
    ratio = {FEED_FORWARD: 1.0, ATTENTION: 2.0, MODULATION: 1.0}
    raw_G = [
        sum(math.prod(module.shape) for module in group.modules)
        / (ratio[group.kind] * (contrast - (contrast - 1) * float(value_L[group.number]))) ** 2
        for group in groups
    ]
    return np.array(raw_G) / math.fsum(raw_G)


def capacity(groups: Sequence[Group], factors: Sequence[int], share_G: np.ndarray) -> float:
    """The logarithm of the mean capacity."""
    return math.fsum(
        share * math.log(numbers(group, factor)) for share, group, factor in zip(share_G, groups, factors, strict=True)
    )


def steps_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    chains: dict[tuple[str, str, str], list[int]] = {}
    for group in groups:
        chains.setdefault(group.chain, []).extend(size for module in group.modules for size in module.shape[:2])
    return [factor_steps(chains[group.chain]) for group in groups]


# The optimum


def small_groups(kinds: int, width: int) -> tuple[Group, ...]:
    """Three blocks of one or two kinds; the last block is smaller."""
    modules = []
    for number in range(3):
        rows = width * (1 if number == 2 else 2)
        modules.append(Module(f"blocks.{number}.ff", "Linear", (rows, width)))
        if kinds == 2:
            modules.append(Module(f"blocks.{number}.attn", "Linear", (width, width)))
    return module_groups(Model(tuple(modules), SMALL_TARGETS), small_blocks(3))


@settings(max_examples=80)
@given(
    st.sampled_from([(1, 36), (1, 64), (2, 16), (2, 30)]),
    st.lists(st.floats(0, 1), min_size=3, max_size=3, unique=True),
    st.floats(0, 1.1),
    st.sampled_from([12.0, MAX_CONTRAST]),
)
def test_nothing_of_the_kind_is_better(shape, values, place, contrast):
    """Against all plans of the kind, tried one by one."""
    groups, value_L = small_groups(*shape), np.array(values)
    share_G = shares(groups, value_L, contrast)
    every = [
        (sum(numbers(group, factor) for group, factor in zip(groups, factors, strict=True)), factors)
        for factors in itertools.product(*steps_of(groups))
        if monotone(groups, factors, value_L)
    ]
    least, most = min(every)[0], max(every)[0]
    parameters = int(least * 0.9 + (most - least * 0.9) * place)
    budget = Budget(groups, parameters, contrast=contrast)
    found = budget.plan({JOINT: value_L})
    total = reached(groups, found)
    assert (budget.least, budget.most) == (least, most)
    assert monotone(groups, found.numbers, value_L)
    near = int(parameters * TOLERANCE)
    ranges = [(parameters - near, parameters), (parameters, parameters + near), (least, parameters)]
    if least < parameters < most:
        low, high = next((low, high) for low, high in ranges if any(low <= total <= high for total, _ in every))
        best = max(capacity(groups, factors, share_G) for total, factors in every if low <= total <= high)
        assert low <= total <= high
        assert found.slack is not None and found.slack <= TOLERANCE
        assert best - TOLERANCE <= capacity(groups, found.numbers, share_G) <= best + 1e-12
        assert best <= capacity(groups, found.numbers, share_G) + math.log1p(found.slack) + 1e-9
    else:
        assert total == (least if parameters <= least else most) and found.slack is None


@pytest.mark.parametrize(
    ("algo", "direction"), [*(("lokr", each) for each in DIRECTIONS), ("locon", MORE), ("loha", MORE), ("lora", MORE)]
)
def test_sd35_large_at_budgets_of_all_sizes(algo, direction):
    """loha's full rank needs no more than 458M parameters."""
    most, count = (2e9, 20 if direction == MORE else 2) if algo == "lokr" else (4e8, 3)
    for parameters in np.geomspace(20e6, most, count).astype(int).tolist():
        found = Budget(LARGE, parameters, algo=algo, direction=direction).plan({JOINT: wavy(38)})
        given_to = zip(LARGE, found.numbers, strict=True)
        total = sum(numbers(*each) if algo == "lokr" else each[0].parameters(algo, each[1]) for each in given_to)
        assert parameters - int(parameters * TOLERANCE) <= total <= parameters
        assert found.slack is not None and found.slack <= TOLERANCE
        falling = [number if algo == "lokr" else -number for number in found.numbers]
        assert monotone(LARGE, falling, {MORE: 1, LESS: -1, UNIFORM: 0}[direction] * wavy(38))


def test_the_bound_holds():
    """Against the continuous optimum, share * budget, and against the plan of a smaller budget, which keeps to it."""
    share_G = shares(LARGE, wavy(38))
    for parameters in (30_000_000, 400_000_000, 1_500_000_000):
        found = Budget(LARGE, parameters).plan({JOINT: wavy(38)})
        value = capacity(LARGE, found.numbers, share_G)
        assert found.slack is not None
        assert value <= math.log(parameters) + float(share_G @ np.log(share_G))
        smaller = Budget(LARGE, int(parameters * 0.9995)).plan({JOINT: wavy(38)})
        assert capacity(LARGE, smaller.numbers, share_G) <= value + math.log1p(found.slack) + 1e-9


@settings(max_examples=25)
@given(
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    st.integers(3_000, 300_000),
    st.sampled_from(DIRECTIONS),
    st.booleans(),
)
@example([1.0, 0.0, 2e-48, 0.0, 0.0, 1.0, 0.0], 50_000, LESS, False)
@example([1.0, 1e-300, 0.0, 1e-17, 0.0, 0.5, 0.0], 50_000, MORE, True)
def test_more_contribution_never_gets_less_capacity(values, parameters, direction, per_stream):
    blocks = sd3_blocks(7)
    streams = {"image": blocks, "text": blocks[:-1]} if per_stream else None
    groups = module_groups(sd3_model(7, 48), blocks, streams=streams)
    value_L = np.array(values)
    values_L = {JOINT: value_L, "image": value_L, "text": value_L[::-1]}
    budget = Budget(groups, parameters, direction=direction)
    found = budget.plan(values_L)
    turned = {MORE: 1, LESS: -1, UNIFORM: 0}[direction]
    for stream in {group.stream for group in groups}:
        chosen = [(one, factor) for one, factor in zip(groups, found.numbers, strict=True) if one.stream == stream]
        assert monotone(*zip(*chosen, strict=True), turned * values_L[stream])
    assert budget.plan(values_L) == found
    if found.slack is not None:
        assert reached(groups, found) <= parameters * (1 + TOLERANCE)


# Replicates


def test_what_judges_the_replicates_is_the_plan_but_for_the_groups_that_are_named():
    differing = 0
    for parameters in np.geomspace(20e6, 2e9, 6).astype(int).tolist():
        budget = Budget(LARGE, parameters)
        found = budget.plan({JOINT: wavy(38)})
        (replicate_G,) = budget.numbers({JOINT: wavy(38)[None]})
        both = zip(LARGE, found.numbers, replicate_G.tolist(), strict=True)
        tensors = [
            [[adapter.tensors for adapter in group.adapters("lokr", number)] for number in numbers]
            for group, *numbers in both
        ]
        assert tuple(place for place, (one, other) in enumerate(tensors) if one != other) == found.differing
        differing += bool(found.differing)
    assert differing <= 2


# Directions, contrast, blocks with factor 1


def test_uniform_needs_no_contributions_and_spreads_what_is_left_over_the_depth():
    budget = Budget(LARGE, 400_000_000, direction=UNIFORM)
    found = budget.plan({})
    number_RG = budget.numbers({JOINT: np.stack([wavy(38), wavy(38)[::-1]])})
    assert number_RG.shape == (2, len(LARGE)) and (number_RG[0] == number_RG[1]).all()
    for kind in RATIOS:
        factors = [factor for group, factor in zip(LARGE, found.numbers, strict=True) if group.kind == kind]
        common = min(factors)
        # The blocks of any stretch of the depth are served about alike.
        larger = np.array([factor <= common for factor in factors], dtype=float)
        assert abs(larger[:19].sum() - larger[19:].sum()) <= 2


def test_full_blocks_get_factor_one_and_the_rest_what_is_left():
    found = Budget(LARGE, 600_000_000, full=[place for place, group in enumerate(LARGE) if group.number == 5]).plan(
        {JOINT: wavy(38)}
    )
    assert {f for group, f in zip(LARGE, found.numbers, strict=True) if group.number == 5} == {1}
    assert 0 <= 600_000_000 - reached(LARGE, found) <= 600_000_000 * TOLERANCE
    everything = Budget(LARGE, 1, full=range(len(LARGE)))
    assert everything.plan({}) == Allotment((1,) * len(LARGE), None)
    assert (everything.numbers({JOINT: wavy(38)[None]}) == 1).all()


def test_a_budget_out_of_reach_gets_the_nearest_end():
    for parameters, word in ((1, "smallest"), (10**12, "largest")):
        budget = Budget(LARGE, parameters)
        found = budget.plan({JOINT: wavy(38)})
        end = budget.least if parameters == 1 else budget.most
        assert reached(LARGE, found) == end
        assert budget.bound(found, end) == f"the {word} plan of this kind has {end:,} parameters"
        assert budget.numbers({JOINT: wavy(38)[None]})[0].tolist() == list(found.numbers)
    assert end == sum(numbers(group, 1) for group in LARGE)


def test_the_bound_in_words():
    budget = Budget(LARGE, 400_000_000)
    for slack, said in ((0.00012, "more than 0.02%"), (0.0123, "more than 1.23%"), (0.0, "any")):
        text = budget.bound(Allotment((), slack), 399_900_000)
        assert text == f"reached within 0.1%; none there has a mean capacity (weighted by contribution) {said} larger"
    equal = Budget(LARGE, 400_000_000, direction="uniform").bound(Allotment((), 0.0), 399_900_000)
    assert equal == "reached within 0.1%; none there has a mean capacity any larger"
    text = budget.bound(Allotment((), 0.0, (3, 4)), 399_900_000)
    assert text.endswith("any larger; 2 of 114 differ from those that replicates are judged by")
    assert budget.bound(Allotment((), 0.0), 300_000_000).startswith("no plan of this kind is within 0.1%; none there")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("the direction is 'up'", {"direction": "up"}),
        ("the contrast is 31; with a budget it can be 1 to 30", {"contrast": 31}),
        ("the contrast is nan", {"contrast": float("nan")}),
        ("blocks with factor 1 are for lokr; loha has ranks", {"algo": "loha", "full": [1]}),
    ],
)
def test_what_is_out_of_range(text, options):
    with fails(text):
        Budget(LARGE, 400_000_000, **options)


def test_a_contribution_that_is_no_number():
    with fails("the contribution of block 3 is nan; expected 0 to 1"):
        Budget(LARGE, 400_000_000).plan({JOINT: np.where(np.arange(38) == 3, np.nan, wavy(38))})


# Ranks


def test_ranks_are_in_proportion_where_steps_allow_it():
    """Half the wish, twice the rank; attention half of the rest: to within a step of ranks, a fifth."""
    value_L = np.linspace(0, 1, 38)
    found = Budget(LARGE, 300_000_000, algo="locon").plan({JOINT: value_L})
    wish_L = 12 - 11 * value_L
    scaled = [
        rank * wish_L[group.number] * RATIOS[group.kind] for group, rank in zip(LARGE, found.numbers, strict=True)
    ]
    middle = float(np.median(scaled))
    assert np.mean([0.7 * middle < each < 1.4 * middle for each in scaled]) > 0.9
