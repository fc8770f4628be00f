"""Allocations by a price against the best by HiGHS, which test_lokr_budget.py compares with all there are."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr.allocation import Choices, solve, solve_many


class Problem(NamedTuple):
    chains: list[np.ndarray]
    shares: list[np.ndarray]

    @property
    def choices(self) -> Choices:
        return Choices.of(self.chains)

    @property
    def share_G(self) -> np.ndarray:
        return np.concatenate(self.shares)

    @property
    def order_G(self) -> np.ndarray:
        return np.arange(len(self.share_G))


def problem(seed: int, chains: int, groups: int, steps: int, decades: float = 0) -> Problem:
    """(G, S) parameters that fall with the step, and (G,) shares, per chain; the second chain has a step less.

    decades: 0, or over how many powers of ten the shares are spread.
    """
    random = np.random.default_rng(seed)
    parameters, shares = [], []
    for number in range(chains):
        falls = 0.3 + 0.5 * random.random((groups, steps - 1 - (number == 1)))
        falling = np.cumprod(np.concatenate([np.ones((groups, 1)), falls], axis=1), axis=1)
        parameters.append(np.maximum(1, (random.integers(50, 4000, (groups, 1)) * falling).astype(np.int64)))
        shares.append(10 ** -(decades * random.random(groups)) if decades else random.random(groups))
    total = math.fsum(share for share_G in shares for share in share_G)
    return Problem(parameters, [share_G / total for share_G in shares])


def value(made: Problem, step_G: np.ndarray) -> tuple[int, float]:
    """Counted here, and whether the order along the chains is kept."""
    total, worth, first = 0, 0.0, 0
    for p_GS, share_G in zip(*made, strict=True):
        steps = step_G[first : first + len(p_GS)]
        assert (np.diff(steps) >= 0).all() and steps.min() >= 0
        for p_S, share, step in zip(p_GS, share_G, steps, strict=True):
            total += int(p_S[step])
            worth += share * math.log(p_S[step])
        first += len(p_GS)
    return total, worth


def priced(made: Problem, budget: int) -> tuple[np.ndarray, float]:
    step_RG, price_R = solve_many(made.choices, made.share_G[None], made.order_G[None], budget)
    return step_RG[0], float(price_R[0])


PLACES = st.floats(0.001, 0.999)


@settings(max_examples=60)
@given(
    st.sampled_from([(1, 3, 4), (1, 6, 3), (3, 2, 3), (2, 4, 2), (1, 1, 5)]),
    st.integers(0, 10**6),
    PLACES,
    st.sampled_from([0, 2]),
)
def test_the_price_keeps_to_the_budget_and_leaves_no_step_that_fits(shape, seed, place, decades):
    made = problem(seed, *shape, decades)
    choices = made.choices
    highest = int(choices.least + place * (choices.most - choices.least))
    step_G = priced(made, highest)[0]
    total, worth = value(made, step_G)
    assert total == choices.total(step_G) <= highest
    assert worth == pytest.approx(choices.value(step_G, made.share_G), abs=1e-12)
    before = np.concatenate([np.concatenate([[0], step_G[a : b - 1]]) for a, b in itertools.pairwise(choices.chains)])
    for g in np.flatnonzero(step_G > before):
        raised = step_G.copy()
        raised[g] -= 1
        assert choices.total(raised) > highest


def like_a_models(seed: int) -> Problem:
    """Two chains of 20 groups with a share and parameters in proportion to their sizes, by falling wishes."""
    random = np.random.default_rng(seed)
    chains, shares = [], []
    for _ in range(2):
        size_G = random.integers(2, 5, 20) * 100_000
        chains.append((size_G[:, None] / np.array([1, 4, 16, 64, 256, 361])).astype(np.int64))
        shares.append(size_G / np.sort(1 + 11 * random.random(20)) ** 2)
    total = sum(share_G.sum() for share_G in shares)
    return Problem(chains, [share_G / total for share_G in shares])


def test_the_price_comes_close_to_the_best():
    """The loss is that of mean capacity."""
    losses = []
    for seed in range(20):
        made = like_a_models(seed)
        choices = made.choices
        highest = int(choices.least * (choices.most / choices.least) ** (0.1 + 0.04 * seed))
        known = priced(made, highest)
        best = solve(choices, made.share_G, made.order_G, int(0.99 * highest), highest, *known)
        assert best is not None and best[1] < 1e-3
        losses.append(math.expm1(value(made, best[0])[1] - value(made, known[0])[1]))
    assert max(losses) < 0.02 and np.mean(losses) < 0.003


def test_a_total_that_a_rounding_brought_above_is_tried_again(monkeypatch):
    """HiGHS takes a constraint as kept to within a tolerance: made wide here, the first time."""
    made = problem(1, 1, 6, 4)
    highest = int(0.5 * made.choices.most)
    known = priced(made, highest)
    real, upper = scipy.optimize.milp, []

    def loose(cost, *, constraints, **settings):
        upper.append(float(constraints[-1].ub[0]))
        if len(upper) == 1:
            constraints[-1].ub = constraints[-1].ub * 1.3
            settings["bounds"] = scipy.optimize.Bounds(0, 1)
        return real(cost, constraints=constraints, **settings)

    monkeypatch.setattr(scipy.optimize, "milp", loose)
    best = solve(made.choices, made.share_G, made.order_G, 0, highest, *known)
    assert len(upper) == 2 and upper[1] < upper[0]
    assert best is None or value(made, best[0])[0] <= highest
