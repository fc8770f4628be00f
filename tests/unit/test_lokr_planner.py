from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from failing import fails
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

from simpletuner_layerprobe.analyse.heatmap import all_blocks
from simpletuner_layerprobe.lokr.config import config_bytes, planned_config
from simpletuner_layerprobe.lokr.plan import (
    ARTICLE_RATIOS,
    ATTENTION,
    DIRECTIONS,
    FEED_FORWARD,
    JOINT,
    KINDS,
    MODULATION,
    TOLERANCE,
    Group,
    Plan,
    Planner,
    factor_steps,
    module_groups,
    plan,
)
from simpletuner_layerprobe.lokr.proof import verify
from simpletuner_layerprobe.models import architecture
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.families import Target
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

SD3 = families.family("sd3").targets
MORE, LESS, UNIFORM = DIRECTIONS


def sd3_blocks(count: int) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{number}" for number in range(count))


def sd3_table(blocks: int, width: int) -> tuple[Module, ...]:
    """The linear layers of an SD3 denoiser's blocks; the last does not update the text."""
    found = []
    for number in range(blocks):
        last = number == blocks - 1
        attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
        attention += [] if last else ["to_add_out"]
        shapes = {"norm1.linear": (6 * width, width), "norm1_context.linear": ((2 if last else 6) * width, width)}
        shapes |= {f"attn.{name}": (width, width) for name in attention}
        for name in ("ff",) if last else ("ff", "ff_context"):
            shapes |= {f"{name}.net.0.proj": (4 * width, width), f"{name}.net.2": (width, 4 * width)}
        found += [Module(f"transformer_blocks.{number}.{name}", "Linear", shape) for name, shape in shapes.items()]
    return tuple(found)


LARGE = module_groups(sd3_blocks(38), SD3, sd3_table(38, 2432))


def wavy(count: int) -> np.ndarray:
    """Contributions of `count` blocks, 0 and 1 among them."""
    value_L = np.sin(np.arange(count) / 2.3) + np.linspace(0, 0.1, count)
    return (value_L - value_L.min()) / (value_L.max() - value_L.min())


# A reference that knows neither the factors' code nor the planner's


def split(dimension: int, factor: int) -> int:
    """The small part of LyCORIS's split."""
    if dimension % factor == 0:
        return min(factor, dimension // factor)
    return max(d for d in range(1, factor + 1) if dimension % d == 0 and d * d <= dimension)


def numbers(group: Group, factor: int) -> int:
    total = 0
    for module in group.modules:
        (rows, columns), rest = module.shape[:2], math.prod(module.shape[2:])
        a, b = split(rows, factor), split(columns, factor)
        total += a * b + (rows // a) * (columns // b) * rest
    return total


def shares(groups: Sequence[Group], value_L: np.ndarray, contrast: float = 12.0) -> list[float]:
    ratio = {FEED_FORWARD: 1.0, ATTENTION: 2.0, MODULATION: 1.0}
    raw = [
        sum(math.prod(module.shape) for module in group.modules)
        / (ratio[group.kind] * (contrast - (contrast - 1) * float(value_L[group.number]))) ** 2
        for group in groups
    ]
    return [one / math.fsum(raw) for one in raw]


def enumerated(groups: Sequence[Group], value_L: np.ndarray) -> list[tuple[int, float]]:
    """(total, value) of every assignment of the kind, by trying all of them."""
    steps = {}
    for group in groups:
        chain = [one for one in groups if one.chain == group.chain]
        sizes = [size for one in chain for module in one.modules for size in module.shape[:2]]
        steps[group] = factor_steps(sizes)
    share = shares(groups, value_L)
    found = []
    for factors in itertools.product(*(steps[group] for group in groups)):
        given_to = list(zip(groups, factors, strict=True))
        if is_monotone(given_to, value_L):
            parameters = [numbers(group, factor) for group, factor in given_to]
            value = math.fsum(part * math.log(count) for part, count in zip(share, parameters, strict=True))
            found.append((sum(parameters), value))
    return found


def is_monotone(given_to: Sequence[tuple[Group, int]], value_L: np.ndarray) -> bool:
    return all(
        mine <= other
        for one, mine in given_to
        for two, other in given_to
        if one.chain == two.chain and value_L[one.number] > value_L[two.number]
    )


# The steps


@pytest.mark.parametrize(
    ("dimensions", "steps"),
    [
        ((2432,), (1, 2, 4, 8, 16, 19, 32, 38)),
        ((2432, 9728), (1, 2, 4, 8, 16, 19, 32, 38, 64, 77)),
        ((7,), (1,)),
        ((1,), (1,)),
        ((6, 10), (1, 2)),
        ((12, 90), (1, 2, 3, 5, 7, 9)),
    ],
)
def test_the_steps_are_the_factors_that_make_a_difference(dimensions, steps):
    assert factor_steps(dimensions) == steps


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_from_step_to_step_parameters_fall(dimensions):
    steps = factor_steps(dimensions)
    for out_dimension, in_dimension in itertools.product(dimensions, repeat=2):
        module = Module("transformer_blocks.0.ff", "Linear", (out_dimension, in_dimension))
        group = Group(0, "transformer_blocks.0", FEED_FORWARD, JOINT, ("", "", ""), (module,))
        counts = [numbers(group, step) for step in steps]
        assert counts == sorted(counts, reverse=True)
        assert counts == [group.parameters(step) for step in steps]
    for before, after in itertools.pairwise(steps):
        assert [split(d, before) for d in dimensions] != [split(d, after) for d in dimensions]


# The groups


def test_the_groups_of_sd3():
    assert len(LARGE) == 38 * 3
    assert [(group.number, group.kind, len(group.modules)) for group in LARGE[:3]] == [
        (0, FEED_FORWARD, 4),
        (0, ATTENTION, 8),
        (0, MODULATION, 2),
    ]
    assert sum(len(group.modules) for group in LARGE) == 529
    assert {group.stream for group in LARGE} == {JOINT}


def names_by_stream(groups: Sequence[Group], number: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group in groups:
        if group.number == number:
            found.setdefault(group.stream, []).extend(one.name[len(group.block) + 1 :] for one in group.modules)
    return {stream: sorted(names) for stream, names in found.items()}


def test_text_modules_are_told_by_their_names():
    blocks = sd3_blocks(2)
    groups = module_groups(blocks, SD3, sd3_table(2, 64), streams={"image": blocks, "text": blocks[:1]})
    found = names_by_stream(groups, 0)
    text = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]
    assert found["text"] == [
        *(f"attn.{name}" for name in text),
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "norm1_context.linear",
    ]
    assert len(found["image"]) == 7 and set(found) == {"image", "text"}
    assert "norm1_context.linear" in names_by_stream(groups, 1)["text"]


@pytest.mark.parametrize(
    ("names", "streams", "expected"),
    [
        # One sequence of both: nothing tells the modules apart.
        (["to_q", "ff.0"], {"image": ["blocks.0"], "text": ["blocks.0"]}, {JOINT: ["ff.0", "to_q"]}),
        # Blocks of one stream only.
        (["to_q", "ff.0"], {"image": ["blocks.1"], "text": ["blocks.0"]}, {"text": ["ff.0", "to_q"]}),
        # No text was recorded: what its modules are called does not count.
        (["to_q", "add_k_proj"], {"image": ["blocks.0"]}, {"image": ["add_k_proj", "to_q"]}),
        (
            [
                "img_instruct_attn.processor.img_to_q",
                "img_instruct_attn.processor.instruct_to_q",
                "img_instruct_attn.o",
            ],
            {"image": ["blocks.0"], "text": ["blocks.0"]},
            {
                "image": ["img_instruct_attn.o", "img_instruct_attn.processor.img_to_q"],
                "text": ["img_instruct_attn.processor.instruct_to_q"],
            },
        ),
        (
            ["attn.to_q_t", "ff_t.w1", "ff_i.w1", "audio_ff.0", "txt_mod.1", "mlp_text"],
            {"image": ["blocks.0"], "text": ["blocks.0"], "audio": ["blocks.0"]},
            {
                "image": ["ff_i.w1"],
                "text": ["attn.to_q_t", "ff_t.w1", "mlp_text", "txt_mod.1"],
                "audio": ["audio_ff.0"],
            },
        ),
    ],
)
def test_the_stream_of_a_module(names, streams, expected):
    modules = [Module(f"blocks.0.{name}", "Linear", (8, 8)) for name in names]
    groups = module_groups(["blocks.0"], [Target("blocks.*", (), ("*",))], modules, streams=streams)
    assert names_by_stream(groups, 0) == expected


def test_frozen_blocks_have_no_group():
    groups = module_groups(sd3_blocks(3), SD3, sd3_table(3, 64), freeze=[0, 2])
    assert {group.number for group in groups} == {1}
    with fails("all blocks are frozen"):
        module_groups(sd3_blocks(3), SD3, sd3_table(3, 64), freeze=[0, 1, 2])


def test_blocks_that_do_not_fit_the_table():
    with fails("block 'blocks.0' lies in none of the block lists"):
        module_groups(["blocks.0"], SD3, sd3_table(1, 64))
    with fails("no linear layer or convolution that LyCORIS can adapt in block 'transformer_blocks.1'"):
        module_groups(sd3_blocks(2), SD3, sd3_table(1, 64))


# The optimum


def small_groups(kinds: int, width: int) -> tuple[Group, ...]:
    """Three blocks of one or two kinds; the last block is smaller."""
    modules = []
    for number in range(3):
        rows = width * (1 if number == 2 else 2)
        modules.append(Module(f"blocks.{number}.ff", "Linear", (rows, width)))
        if kinds == 2:
            modules.append(Module(f"blocks.{number}.attn", "Linear", (width, width)))
    blocks = [f"blocks.{number}" for number in range(3)]
    return module_groups(blocks, [Target("blocks.*", ("ff*",), ("*",))], modules)


@settings(max_examples=40)
@given(
    st.sampled_from([(1, 36), (1, 64), (2, 16), (2, 30)]),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.floats(0, 1.1),
)
def test_nothing_of_the_kind_is_better(shape, values, place):
    groups, value_L = small_groups(*shape), np.array(values)
    every = enumerated(groups, value_L)
    least, most = min(every)[0], max(every)[0]
    budget = int(least * 0.9 + (most - least * 0.9) * place)
    found = plan(groups, {JOINT: value_L}, budget)
    assert (found.least, found.most) == (least, most)
    given_to = list(zip(groups, found.factors, strict=True))
    assert found.reached == sum(numbers(group, factor) for group, factor in given_to)
    assert is_monotone(given_to, value_L)
    within = [value for total, value in every if budget - int(budget * TOLERANCE) <= total <= budget]
    if least < budget < most and within:
        value = math.fsum(
            share * math.log(numbers(group, factor))
            for share, (group, factor) in zip(shares(groups, value_L), given_to, strict=True)
        )
        # Equal contributions may be served in any order, and only one of them is considered.
        if len(set(values)) == 3:
            assert value == pytest.approx(max(within), abs=1e-12)
            # The bound is about all that keep to the budget, however little of it they use.
            best = max(value for total, value in every if total <= budget)
            assert found.slack == pytest.approx(math.expm1(best - value), abs=1e-9)
    elif len(set(values)) == 3:
        distance = min(abs(total - budget) for total, _ in every)
        assert abs(found.gap) == found.nearest == distance


@settings(max_examples=25)
@given(
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    st.integers(3_000, 300_000),
    st.sampled_from(DIRECTIONS),
    st.booleans(),
)
@example([1.0, 0.0, 2e-48, 0.0, 0.0, 1.0, 0.0], 50_000, LESS, False)
@example([1.0, 1e-300, 0.0, 1e-17, 0.0, 0.5, 0.0], 50_000, MORE, True)
def test_more_contribution_never_gets_less_capacity(values, budget, direction, per_stream):
    blocks = sd3_blocks(7)
    streams = {"image": blocks, "text": blocks[:-1]} if per_stream else None
    groups = module_groups(blocks, SD3, sd3_table(7, 48), streams=streams)
    value_L = np.array(values)
    values_L = {JOINT: value_L, "image": value_L, "text": value_L[::-1]}
    found = plan(groups, values_L, budget, direction=direction)
    turned = {MORE: 1, LESS: -1, UNIFORM: 0}[direction]
    for stream in {group.stream for group in groups}:
        chosen = [(one, f) for one, f in zip(groups, found.factors, strict=True) if one.stream == stream]
        assert is_monotone(chosen, turned * values_L[stream])
    assert found.reached == sum(numbers(group, f) for group, f in zip(groups, found.factors, strict=True))
    if found.slack is not None:
        assert budget - int(budget * TOLERANCE) <= found.reached <= budget
    assert plan(groups, values_L, budget, direction=direction) == found


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sd35_large_at_twenty_budgets(direction):
    seconds, gaps = [], []
    for budget in np.geomspace(20e6, 2e9, 20 if direction == MORE else 2).astype(int).tolist():
        began = time.process_time()
        found = plan(LARGE, {JOINT: wavy(38)}, budget, direction=direction)
        seconds.append(time.process_time() - began)
        gaps.append(abs(found.reached - budget) / budget)
        assert found.reached == sum(numbers(group, f) for group, f in zip(LARGE, found.factors, strict=True))
        assert found.slack is not None and found.slack < 0.01
    assert max(gaps) <= 0.001
    assert max(seconds) < 2


def test_the_bound_holds_where_totals_are_rounded():
    """Against the continuous optimum, share * budget: no assignment has a larger mean capacity."""
    for budget in (30_000_000, 400_000_000, 1_500_000_000):
        found = plan(LARGE, {JOINT: wavy(38)}, budget)
        share = np.array(shares(LARGE, wavy(38)))
        reached = np.array([numbers(group, f) for group, f in zip(LARGE, found.factors, strict=True)])
        value = float(share @ np.log(reached))
        assert value <= math.log(budget) + float(share @ np.log(share))
        assert found.slack is not None
        # A plan that keeps to a smaller budget keeps to this one, so the bound covers it as well.
        smaller = plan(LARGE, {JOINT: wavy(38)}, int(budget * 0.9995))
        other = np.array([numbers(group, f) for group, f in zip(LARGE, smaller.factors, strict=True)])
        assert float(share @ np.log(other)) <= value + math.log1p(found.slack) + 1e-12


def test_the_bound_is_rounded_up():
    found = plan(LARGE, {JOINT: wavy(38)}, 400_000_000)
    for slack, said in ((1e-9, "0.01%"), (0.00012, "0.02%"), (0.0123, "1.23%"), (0.012301, "1.24%")):
        assert f"more than {said} larger" in replace(found, slack=slack).bound()


def at_random(groups: Sequence[Group], value_L: np.ndarray, share_G: np.ndarray, budget: int, seed: int) -> float:
    """The value of an assignment that keeps to the budget.

    From the smallest one upwards: always the group that gains most per parameter, its share changed at random, as long
    as it fits and no block that contributes more falls behind.
    """
    random = np.random.default_rng(seed)
    guided_G = share_G * np.exp(random.normal(0, 0.5, len(groups)) * (seed > 0))
    counts, before = [], {}
    for place in sorted(range(len(groups)), key=lambda place: -value_L[groups[place].number]):
        group = groups[place]
        same = [one for one in groups if one.chain == group.chain]
        steps = factor_steps([size for one in same for module in one.modules for size in module.shape[:2]])
        counts.append((place, before.get(group.chain), [numbers(group, factor) for factor in steps]))
        before[group.chain] = place
    p_of = {place: count_S for place, _, count_S in counts}
    ahead = {place: other for place, other, _ in counts}
    at = {place: len(count_S) - 1 for place, count_S in p_of.items()}
    left = budget - sum(count_S[-1] for count_S in p_of.values())
    while True:
        moves = []
        for place, step in at.items():
            count_S, other = p_of[place], ahead[place]
            more = count_S[step - 1] - count_S[step] if step else 0
            if step and more <= left and (other is None or at[other] < step):
                moves.append(
                    (guided_G[place] * math.log(count_S[step - 1] / count_S[step]) / max(more, 1), place, more)
                )
        if not moves:
            return math.fsum(share_G[place] * math.log(p_of[place][step]) for place, step in at.items())
        _, place, more = max(moves)
        at[place] -= 1
        left -= more


@pytest.mark.parametrize("name", ["sd35-large", "sd35-medium", "flux-dev"])
def test_extreme_contrasts_are_proved_as_well(name):
    """A few blocks have nearly all of the share then, and their steps are coarse."""
    found = architecture(name)
    targets = families.family(found.family).targets
    groups = module_groups(all_blocks([one.blocks for one in found.streams]), targets, found.modules)
    value_L = np.random.default_rng(0).random(groups[-1].number + 1)
    value_L = (value_L - value_L.min()) / np.ptp(value_L)
    seconds = []
    for budget, contrast in itertools.product((32_000_000, 85_000_000, 288_000_000), (100.0, 1000.0, 1e6)):
        began = time.process_time()
        planned = plan(groups, {JOINT: value_L}, budget, contrast=contrast)
        seconds.append(time.process_time() - began)
        assert is_monotone(list(zip(groups, planned.factors, strict=True)), value_L)
        assert budget - int(budget * TOLERANCE) <= planned.reached <= budget
        assert planned.slack is not None and planned.slack < 0.0001
        if budget == 85_000_000:
            share_G = np.array(shares(groups, value_L, contrast))
            reached = math.fsum(
                share * math.log(numbers(group, factor))
                for share, group, factor in zip(share_G, groups, planned.factors, strict=True)
            )
            for seed in range(3):
                other = at_random(groups, value_L, share_G, budget, seed)
                assert other <= reached + math.log1p(planned.slack) + 1e-9
    assert max(seconds) < 2


def integer_program(
    groups: Sequence[Group], value_L: np.ndarray, share_G: np.ndarray, budget: int
) -> tuple[float, float]:
    """The value of the best assignment that HiGHS finds within the tolerance, and its proof of what none exceeds."""
    chains: dict[tuple[str, str, str], list[int]] = {}
    for place, group in enumerate(groups):
        chains.setdefault(group.chain, []).append(place)
    steps: dict[int, tuple[int, ...]] = {}
    for places in chains.values():
        sizes = [size for place in places for module in groups[place].modules for size in module.shape[:2]]
        steps |= dict.fromkeys(places, factor_steps(sizes))
    # One variable for each step of each group: 1 if it is the group's.
    first = np.cumsum([0, *(len(steps[place]) for place in range(len(groups)))])
    count_V = np.array([numbers(group, step) for place, group in enumerate(groups) for step in steps[place]])
    value_V = np.repeat(share_G, np.diff(first)) * np.log(count_V)
    one_step = lil_matrix((len(groups), first[-1]))
    for place in range(len(groups)):
        one_step[place, first[place] : first[place + 1]] = 1
    pairs = []
    for places in chains.values():
        order = sorted(places, key=lambda place: -value_L[groups[place].number])
        pairs += list(itertools.pairwise(order))
    in_order = lil_matrix((len(pairs), first[-1]))
    for row, (more, less) in enumerate(pairs):
        for step in range(len(steps[more])):
            in_order[row, first[more] + step] = -step
            in_order[row, first[less] + step] = step
    found = milp(
        -value_V,
        constraints=[
            LinearConstraint(one_step.tocsr(), 1, 1),
            LinearConstraint(in_order.tocsr(), 0, np.inf),
            LinearConstraint(count_V / budget, 1 - TOLERANCE, 1),
        ],
        integrality=np.ones(first[-1]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9, "time_limit": 60},
    )
    return -float(found.fun), -float(found.mip_dual_bound)


@pytest.mark.parametrize("contrast", [12.0, 1000.0])
@pytest.mark.parametrize("budget", [40_000_000, 333_000_000, 1_100_000_000])
def test_an_integer_program_finds_no_better_plan(budget, contrast):
    """An independent solver, on SD3.5 Large's shapes; it takes constraints as kept to within 1e-6."""
    value_L = np.random.default_rng(budget).random(38)
    value_L = (value_L - value_L.min()) / np.ptp(value_L)
    planned = plan(LARGE, {JOINT: value_L}, budget, contrast=contrast)
    share_G = np.array(shares(LARGE, value_L, contrast))
    value = math.fsum(
        share * math.log(numbers(group, factor))
        for share, group, factor in zip(share_G, LARGE, planned.factors, strict=True)
    )
    found, none_above = integer_program(LARGE, value_L, share_G, budget)
    assert planned.slack is not None
    assert found - 1e-6 <= value + math.log1p(planned.slack)
    assert value <= none_above + 1e-6
    assert value == pytest.approx(found, abs=1e-5)


def test_replicates_are_planned_as_each_would_be_alone():
    random = np.random.default_rng(0)
    value_RL = np.clip(wavy(38) + random.normal(0, 0.05, (4, 38)), 0, 1)
    for contrast, direction in ((12.0, MORE), (1000.0, MORE), (12.0, UNIFORM)):
        options = {"contrast": contrast, "direction": direction}
        factor_RG = Planner(LARGE, 85_000_000, **options).factors({JOINT: value_RL})
        assert factor_RG.shape == (4, len(LARGE))
        for value_L, factor_G in zip(value_RL, factor_RG, strict=True):
            assert plan(LARGE, {JOINT: value_L}, 85_000_000, **options).factors == tuple(factor_G.tolist())


# Directions, ratios, limits


def capacity(found: Plan, kind: str) -> dict[int, int]:
    return {
        group.number: factor for group, factor in zip(found.groups, found.factors, strict=True) if group.kind == kind
    }


def test_the_direction_turns_the_assumption_around_at_equal_size():
    value_L = wavy(38)
    most, least = int(value_L.argmax()), int(value_L.argmin())
    more = plan(LARGE, {JOINT: value_L}, 400_000_000)
    less = plan(LARGE, {JOINT: value_L}, 400_000_000, direction=LESS)
    for kind in KINDS:
        assert capacity(more, kind)[most] < capacity(more, kind)[least]
        assert capacity(less, kind)[most] > capacity(less, kind)[least]
    assert abs(more.reached - less.reached) < 0.001 * 400_000_000


def test_uniform_needs_no_contributions_and_spreads_what_is_left_over_the_depth():
    found = plan(LARGE, {}, 400_000_000, direction=UNIFORM)
    for kind in KINDS:
        factors = list(capacity(found, kind).values())
        common = sorted(set(factors))
        # The blocks of any stretch of the depth are served about alike.
        larger = np.array([factor <= common[0] for factor in factors], dtype=float)
        halves = larger[:19].sum(), larger[19:].sum()
        assert abs(halves[0] - halves[1]) <= 2


def test_ratios_move_capacity_between_kinds():
    def parameters(found: Plan, kind: str) -> int:
        return sum(
            numbers(group, factor)
            for group, factor in zip(found.groups, found.factors, strict=True)
            if group.kind == kind
        )

    usual = plan(LARGE, {JOINT: wavy(38)}, 400_000_000)
    for kind in KINDS:
        starved = plan(LARGE, {JOINT: wavy(38)}, 400_000_000, ratios=ARTICLE_RATIOS | {kind: 8.0})
        assert parameters(starved, kind) < 0.5 * parameters(usual, kind)


def test_contrast_one_is_even():
    """All blocks but the odd one that takes up the rest have two neighbouring factors."""
    even = plan(LARGE, {JOINT: wavy(38)}, 400_000_000, contrast=1)
    for kind in KINDS:
        counts = Counter(capacity(even, kind).values())
        common = [factor for factor, count in counts.items() if count > 1]
        assert sum(counts[factor] for factor in common) >= 36
        assert max(common) <= 2 * min(common)


def test_factors_stay_within_the_limits():
    found = plan(LARGE, {JOINT: wavy(38)}, 400_000_000, min_factor=4, max_factor=16)
    assert min(found.factors) >= 4 and max(found.factors) <= 16
    assert abs(found.gap) <= 400_000_000 * TOLERANCE


def test_full_blocks_get_factor_one_and_the_rest_what_is_left():
    found = plan(LARGE, {JOINT: wavy(38)}, 600_000_000, full=[5], min_factor=2)
    assert {f for group, f in zip(LARGE, found.factors, strict=True) if group.number == 5} == {1}
    assert 1 not in {f for group, f in zip(LARGE, found.factors, strict=True) if group.number != 5}
    assert abs(found.gap) <= 600_000_000 * TOLERANCE


def test_a_budget_out_of_reach_gets_the_nearest_end():
    tiny = plan(LARGE, {JOINT: wavy(38)}, 1)
    assert tiny.reached == tiny.least == tiny.gap + 1
    assert tiny.bound() == f"the smallest assignment of this kind has {tiny.least:,} parameters"
    vast = plan(LARGE, {JOINT: wavy(38)}, 10**12)
    assert vast.reached == vast.most == sum(group.parameters(1) for group in LARGE)
    assert vast.bound() == f"the largest assignment of this kind has {vast.most:,} parameters"
    full = plan(LARGE, {JOINT: wavy(38)}, 1, full=range(38))
    assert full.reached == vast.most


def test_what_is_out_of_range_is_said():
    cases: dict[str, dict[str, Any]] = {
        "the direction is 'up'": {"direction": "up"},
        "the ratio of attention is 0": {"ratios": ARTICLE_RATIOS | {ATTENTION: 0}},
        "the contrast is 0.5": {"contrast": 0.5},
        "factors from 0 to None": {"min_factor": 0},
        "factors from 4 to 2": {"min_factor": 4, "max_factor": 2},
        "no factor from 5 to 7 makes a difference for the feed-forward": {"min_factor": 5, "max_factor": 7},
        "the contribution of block 3 is 1.5": {},
    }
    value_L = wavy(38)
    for text, options in cases.items():
        values = value_L if options else np.where(np.arange(38) == 3, 1.5, value_L)
        with fails(text):
            plan(LARGE, {JOINT: values}, 400_000_000, **options)
    with fails("the budget is 0 parameters"):
        plan(LARGE, {JOINT: value_L}, 0)


# The config


def test_the_config_has_patterns_where_modules_agree_and_names_where_not():
    blocks = sd3_blocks(1)
    modules = sd3_table(2, 64)[:14]
    groups = module_groups(blocks, SD3, modules, streams={"image": blocks, "text": blocks})
    found = plan(groups, {"image": np.array([1.0]), "text": np.array([0.0])}, 80_000)
    names = planned_config(found.planned, blocks, SD3)["apply_preset"]["name_algo_map"]
    assert {name.removeprefix("transformer_blocks.0."): settings["factor"] for name, settings in names.items()} == {
        "norm1*": 2,
        "ff.net.0.proj": 1,
        "ff.net.2": 1,
        "ff_context.net.0.proj": 4,
        "ff_context.net.2": 4,
        "*": 1,
    }
    joint = plan(module_groups(blocks, SD3, modules), {JOINT: np.array([1.0])}, 80_000)
    names = planned_config(joint.planned, blocks, SD3)["apply_preset"]["name_algo_map"]
    assert list(names) == [f"transformer_blocks.0.{pattern}" for pattern in ("norm1*", "ff*", "*")]


@pytest.mark.parametrize("name", ["sd35-large", "sd35-medium", "flux-dev"])
def test_lycoris_makes_exactly_the_parameters_counted(name):
    found = architecture(name)
    targets = families.family(found.family).targets
    blocks = found.streams[0].blocks
    streams = {one.name: one.blocks for one in found.streams}
    if name == "sd35-large":
        assert [(group.block, group.kind, group.size) for group in module_groups(blocks, targets, found.modules)] == [
            (group.block, group.kind, group.size) for group in LARGE
        ]
    groups = module_groups(blocks, targets, found.modules, streams=streams, freeze=[1])
    values = {"image": wavy(len(blocks)), "text": wavy(len(blocks))[::-1], JOINT: wavy(len(blocks))}
    planned = plan(groups, values, 300_000_000, full=[2])
    config = planned_config(planned.planned, blocks, targets)
    check = verify(config, planned.planned, found.modules, model_class=found.model_class)
    check.require()
    assert check.parameters == planned.reached
    assert check.block_parameters(blocks[1]) == 0
    assert check.unmatched == ()
    assert config_bytes(config) == config_bytes(planned_config(planned.planned, blocks, targets))
