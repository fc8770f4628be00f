"""The search for the best allocation, against all assignments of small problems written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr import allocation
from simpletuner_layerprobe.lokr.allocation import Allocated, allocate

Problem = tuple[list[np.ndarray], list[np.ndarray]]


def problem(seed: int, chains: int, groups: int, steps: int, *, decades: float = 0) -> Problem:
    """(G, S) parameters that fall with the step, and (G,) shares, per chain.

    decades: 0, or over how many powers of ten the shares are spread.
    """
    random = np.random.default_rng(seed)
    parameters, shares = [], []
    for _ in range(chains):
        falling = np.cumprod(
            np.concatenate([[[1.0]] * groups, 0.3 + 0.5 * random.random((groups, steps - 1))], axis=1), 1
        )
        parameters.append(np.maximum(1, (random.integers(50, 4000, (groups, 1)) * falling).astype(np.int64)))
        shares.append(10 ** -(decades * random.random(groups)) if decades else random.random(groups))
    total = math.fsum(share for share_G in shares for share in share_G)
    return parameters, [share_G / total for share_G in shares]


def solved(made: Problem, lowest: int, highest: int) -> Allocated:
    parameters, shares = made
    order = [np.arange(len(share_G))[None] for share_G in shares]
    (found,) = allocate(parameters, order, [share_G[None] for share_G in shares], lowest, highest)
    return found


def every(made: Problem) -> list[tuple[int, float]]:
    """(total, value) of every assignment in which no group has an earlier step than the one before it."""
    chains = [
        [
            (
                sum(int(p_S[step]) for p_S, step in zip(p_GS, steps, strict=True)),
                math.fsum(share * math.log(p_S[step]) for p_S, share, step in zip(p_GS, share_G, steps, strict=True)),
            )
            for steps in itertools.combinations_with_replacement(range(p_GS.shape[1]), len(p_GS))
        ]
        for p_GS, share_G in zip(*made, strict=True)
    ]
    return [(sum(t for t, _ in one), math.fsum(v for _, v in one)) for one in itertools.product(*chains)]


def value(made: Problem, found: Allocated) -> float:
    return math.fsum(
        share * math.log(p_S[step])
        for p_GS, share_G, step_G in zip(*made, found.steps, strict=True)
        for p_S, share, step in zip(p_GS, share_G, step_G, strict=True)
    )


def check(made: Problem, lowest: int, highest: int, *, exact: bool) -> Allocated:
    """Whatever way it was found: monotone, counted exactly, and what is said to be proved holds."""
    found, all_of_them = solved(made, lowest, highest), every(made)
    assert all((np.diff(step_G) >= 0).all() for step_G in found.steps)
    total = sum(
        int(p_S[step])
        for p_GS, step_G in zip(made[0], found.steps, strict=True)
        for p_S, step in zip(p_GS, step_G, strict=True)
    )
    assert found.total == total
    inside = [one for t, one in all_of_them if lowest <= t <= highest]
    if found.slack is None:
        assert exact <= (not inside)
        distance = min(abs(t - highest) for t, _ in all_of_them)
        assert found.nearest <= distance <= abs(total - highest)
        assert not exact or found.nearest == abs(total - highest)
    else:
        assert lowest <= total <= highest
        best = max(one for t, one in all_of_them if t <= highest)
        reached = value(made, found)
        assert best <= reached + math.log1p(found.slack) + 1e-9
        if exact:
            assert reached == pytest.approx(max(inside), abs=1e-9)
            assert found.slack == pytest.approx(math.expm1(best - reached), abs=1e-9)
    return found


SHAPES = st.sampled_from([(1, 3, 4), (1, 6, 3), (2, 3, 3), (3, 2, 3), (2, 4, 2), (1, 1, 5)])


def ends(made: Problem) -> tuple[int, int]:
    return sum(int(p_GS[:, -1].sum()) for p_GS in made[0]), sum(int(p_GS[:, 0].sum()) for p_GS in made[0])


@settings(max_examples=150)
@given(SHAPES, st.integers(0, 10**6), st.floats(0.001, 0.999), st.sampled_from([0.0, 0.001, 0.01, 0.2]))
def test_nothing_is_better_and_nothing_nearer(shape, seed, place, width):
    made = problem(seed, *shape)
    least, most = ends(made)
    highest = int(least + place * (most - least))
    if least < highest < most:
        assert check(made, highest - int(width * highest), highest, exact=True).way == "list"


@pytest.mark.parametrize(("nodes", "cell", "way"), [(1000, 1 / 1000, "tree"), (0, 1 / 1000, "tree"), (0, 1.0, "table")])
def test_what_is_said_to_be_proved_holds_where_lists_grow_too_long(monkeypatch, nodes, cell, way):
    """Lists of at most five, then branch and bound; no splits, but cells; cells so wide that the table is left."""
    monkeypatch.setattr(allocation, "_STATES", 5)
    monkeypatch.setattr(allocation, "_FEW", 5)
    monkeypatch.setattr(allocation, "_CELL", cell)
    monkeypatch.setattr(allocation, "_NODES", nodes)
    ways = []
    for seed in range(60):
        made = problem(seed, 2, 4, 3)
        least, most = ends(made)
        highest = int(least + 0.6 * (most - least))
        ways.append(check(made, highest - highest // 100, highest, exact=False).way)
    assert ways.count(way) >= 10


@settings(max_examples=100)
@given(SHAPES, st.integers(0, 10**6), st.floats(0.001, 0.999), st.sampled_from([0, 2, 6, 12]))
def test_branch_and_bound_proves_the_best(shape, seed, place, decades):
    """By itself, however unequal the shares; they are in no order along the chains here."""
    made = problem(seed, *shape, decades=decades)
    least, most = ends(made)
    highest = int(least + place * (most - least))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_FEW", 0)
        patch.setattr(allocation, "_STATES", 0)
        patch.setattr(allocation, "_NODES", 10**6)
        if least < highest < most:
            found = check(made, 0, highest, exact=False)
            assert found.slack is not None and found.slack <= 1.001 * allocation._CLOSE
            lowest = highest - highest // 20
            narrow = check(made, lowest, highest, exact=False)
            if narrow.way == "tree":
                inside = max(v for t, v in every(made) if lowest <= t <= highest)
                assert value(made, narrow) >= inside - 1.001 * allocation._CLOSE


@pytest.mark.parametrize("nodes", [0, 8, 1000])
def test_the_bound_holds_wherever_branch_and_bound_ends(monkeypatch, nodes):
    monkeypatch.setattr(allocation, "_STATES", 0)
    monkeypatch.setattr(allocation, "_FEW", 0)
    monkeypatch.setattr(allocation, "_NODES", nodes)
    found = []
    for seed in range(60):
        made = problem(seed, 2, 4, 3, decades=4)
        least, most = ends(made)
        found.append(check(made, 0, int(least + 0.6 * (most - least)), exact=False))
    assert {one.way for one in found} <= {"tree", "list"}
    slacks = [one.slack for one in found if one.way == "tree"]
    assert len(slacks) >= 40 and (max(slacks) > 1.001 * allocation._CLOSE) == (nodes < 1000)


def test_the_tables_bound_holds_where_totals_are_rounded(monkeypatch):
    monkeypatch.setattr(allocation, "_STATES", 0)
    monkeypatch.setattr(allocation, "_FEW", 0)
    monkeypatch.setattr(allocation, "_NODES", 0)
    monkeypatch.setattr(allocation, "_CELL", 1.0)
    monkeypatch.setattr(allocation, "_CELLS_OF_WORK", 0)
    monkeypatch.setattr(allocation, "_MIN_CELLS", 40)
    found = []
    for seed in range(60):
        made = problem(seed, 2, 4, 3)
        least, most = ends(made)
        highest = int(least + 0.3 * (most - least))
        found.append(check(made, highest - highest // 300, highest, exact=False))
    assert sum(one.way == "table" for one in found) >= 20
    assert {one.slack is None for one in found if one.way == "table"} == {True, False}


def test_equal_shares_and_one_step_chains_are_no_trouble():
    parameters = [np.array([[100, 50], [100, 50], [100, 50]]), np.array([[7]])]
    made = parameters, [np.full(3, 0.3), np.array([0.1])]
    found = check(made, 257 - 10, 257, exact=True)
    assert (found.total, found.slack) == (257, 0)
    assert [step_G.tolist() for step_G in found.steps] == [[0, 0, 1], [0]]


@pytest.mark.parametrize("states", [allocation._STATES, 5])
def test_a_replicate_is_what_it_would_be_alone(monkeypatch, states):
    monkeypatch.setattr(allocation, "_STATES", states)
    monkeypatch.setattr(allocation, "_FEW", min(states, allocation._FEW))
    parameters, shares = problem(3, 2, 6, 4)
    random = np.random.default_rng(0)
    R = 20
    order = [np.argsort(random.random((R, len(share_G))), axis=1) for share_G in shares]
    share = [random.random((R, len(share_G))) / 12 for share_G in shares]
    least, most = ends((parameters, shares))
    highest = (least + most) // 3
    together = list(allocate(parameters, order, share, highest - highest // 100, highest))
    assert ("tree" in {found.way for found in together}) == (states == 5)
    for r, found in enumerate(together):
        alone = allocate(
            parameters,
            [order_RG[r : r + 1] for order_RG in order],
            [share_RG[r : r + 1] for share_RG in share],
            highest - highest // 100,
            highest,
        )
        (one,) = alone
        assert (one.total, one.slack) == (found.total, found.slack)
        assert all(np.array_equal(a, b) for a, b in zip(one.steps, found.steps, strict=True))
