"""Allocation: which step each group gets, so that the parameters keep to a budget and the value is largest.

From step to step a group's parameters p fall. The groups of a chain share their steps and stand in an order; none may
have an earlier step than the one before it. The value of an assignment is the sum of share * log(p) over the groups.

`solve` finds the best assignment with HiGHS, as an integer program with one variable per group and step: 1 if the group
has this step's parameters or more. In this form the order along chains and steps is a set of differences, which alone
would leave no fractions; only the budget cuts one group in part, so that HiGHS ends at the root in about a second.

`solve_many` is for many problems that differ in shares and order (bootstrap replicates): a price on every parameter
makes the groups independent of each other. Bisection finds the smallest price that keeps to the budget and the largest
that does not. What the first leaves over goes, step by step, to the group that gains most per parameter; what the
second has too much is taken, step by step, from the groups that lose least per parameter. The better of both counts.

Shape letters: R replicates, G groups, S steps, V variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAP = 1e-5  # of the value: HiGHS stops here
_NODES = 2_000  # subproblems that HiGHS may look at; nearly always one is enough
_ROW = 1e6  # what the budget is scaled to: HiGHS takes constraints as kept to within 1e-6
_EQUAL = 1e-9  # values that differ by less count as equal
_PRICES = 40  # halvings of the range of prices, 2^-30 to 2^30 times 1 / budget


@dataclass(frozen=True)
class Choices:
    """What each group can get; groups of one chain stand together.

    parameters_GS: (G, S) trainable numbers, falling with the step; after a group's last step they repeat. last_G: (G,)
    each group's last step. chains: the places where chains begin, and G.
    """

    parameters_GS: NDArray[np.int64]
    last_G: NDArray[np.int64]
    chains: tuple[int, ...]

    @staticmethod
    def of(chains: Sequence[NDArray[np.int64]]) -> Choices:
        """From the (groups, steps) parameters of each chain."""
        S = max(chain.shape[1] for chain in chains)
        return Choices(
            np.concatenate([np.pad(chain, ((0, 0), (0, S - chain.shape[1])), mode="edge") for chain in chains]),
            np.concatenate([np.full(len(chain), chain.shape[1] - 1) for chain in chains]),
            tuple(np.cumsum([0, *map(len, chains)]).tolist()),
        )

    @property
    def least(self) -> int:
        """The parameters of the smallest assignment."""
        return int(self.parameters_GS[:, -1].sum())

    @property
    def most(self) -> int:
        """The parameters of the largest assignment."""
        return int(self.parameters_GS[:, 0].sum())

    def total(self, step_G: NDArray[np.int64]) -> int:
        """The parameters of an assignment."""
        return int(np.take_along_axis(self.parameters_GS, step_G[:, None], axis=1).sum())

    def value(self, step_G: NDArray[np.int64], share_G: NDArray[np.float64]) -> float:
        """The value of an assignment."""
        return float(share_G @ np.log(np.take_along_axis(self.parameters_GS, step_G[:, None], axis=1)[:, 0]))

    def order(self, rank_RG: NDArray[np.float64]) -> NDArray[np.intp]:
        """(R, G) the groups, chain by chain, by falling rank; equal ones are spread over their chain."""
        G = len(self.last_G)
        spread_G = np.arange(G) * 0x9E3779B1 % 2**32  # 2^32 / golden ratio: its multiples fill the range evenly
        chain_G = np.repeat(np.arange(len(self.chains) - 1), np.diff(self.chains))
        keys = (np.broadcast_to(key, rank_RG.shape) for key in (spread_G, -rank_RG, chain_G))
        return np.lexsort(tuple(keys), axis=1)


def solve(
    choices: Choices,
    share_G: NDArray[np.float64],
    order_G: NDArray[np.intp],
    lowest: int,
    highest: int,
    known_G: NDArray[np.int64],
    price: float,
) -> tuple[NDArray[np.int64], float] | None:
    """The best assignment whose total lies between two numbers, and its slack; None if there is none.

    known_G, price: what `solve_many` finds for the same problem. If its total lies there, all choices are left out that
    no better assignment can have: at a price, the best worth of every group adds up to a bound, and a choice costs its
    loss against it. slack: no assignment asked for has a value larger by more than log(1 + slack).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    G, S = choices.parameters_GS.shape
    exists_GS = np.arange(S - 1) < choices.last_G[:, None]
    number_GS = np.cumsum(exists_GS).reshape(G, S - 1) - 1  # of the variable
    V = int(exists_GS.sum())
    value_GS = share_G[:, None] * np.log(choices.parameters_GS)
    gain_V = (value_GS[:, :-1] - value_GS[:, 1:])[exists_GS]
    more_V = (choices.parameters_GS[:, :-1] - choices.parameters_GS[:, 1:])[exists_GS]
    pairs = [np.stack([number_GS[:, :-1], number_GS[:, 1:]], axis=-1)[exists_GS[:, 1:]]]
    for first, end in pairwise(choices.chains):
        along = order_G[first:end]
        pairs.append(np.stack([number_GS[along[1:]], number_GS[along[:-1]]], axis=-1)[exists_GS[along[1:]]])
    pair_P2 = np.concatenate(pairs)
    P = len(pair_P2)
    differences = csr_array((np.tile([1.0, -1.0], P), (np.repeat(np.arange(P), 2), pair_P2.ravel())), shape=(P, V))
    earliest_G, latest_G = np.zeros(G), choices.last_G
    if lowest <= choices.total(known_G) <= highest:
        worth_GS = value_GS - price * choices.parameters_GS
        loss_GS = worth_GS.max(axis=1, keepdims=True) - worth_GS
        bound = worth_GS.max(axis=1).sum() + price * highest
        open_GS = loss_GS <= bound - choices.value(known_G, share_G) + _EQUAL
        earliest_G, latest_G = open_GS.argmax(axis=1), S - 1 - open_GS[:, ::-1].argmax(axis=1)
    step_S = np.arange(S - 1)
    within_V = Bounds((latest_G[:, None] <= step_S)[exists_GS], (earliest_G[:, None] <= step_S)[exists_GS])
    unit = _ROW / highest
    while lowest <= highest:
        total = LinearConstraint(more_V[None] * unit, (lowest - choices.least) * unit, (highest - choices.least) * unit)
        solved = milp(
            -gain_V,
            constraints=[LinearConstraint(differences, -np.inf, 0), total] if P else [total],
            integrality=np.ones(V),
            bounds=within_V,
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if solved.x is None:
            return None
        has_GS = np.zeros((G, S - 1))
        has_GS[exists_GS] = np.rint(solved.x)
        step_G = choices.last_G - has_GS.sum(axis=1).astype(np.int64)
        excess = choices.total(step_G) - highest
        if excess <= 0:
            gained = float(gain_V @ has_GS[exists_GS])
            return step_G, max(0.0, math.expm1(-solved.mip_dual_bound - gained))
        highest -= excess  # a rounding error of HiGHS's
    return None


def solve_many(
    choices: Choices, share_RG: NDArray[np.float64], order_RG: NDArray[np.intp], budget: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(R, G) steps of good assignments that keep to the budget, and the (R,) prices of a parameter.

    budget: not below the smallest total.
    """
    problems = _Problems(choices, share_RG, order_RG)
    R = len(share_RG)
    low_R, high_R = np.full(R, -30.0), np.full(R, 30.0)
    for _ in range(_PRICES):
        middle_R = (low_R + high_R) / 2
        above_R = problems.at(problems.p_RGS, problems.priced(np.exp2(middle_R) / budget)).sum(axis=1) > budget
        low_R = np.where(above_R, middle_R, low_R)
        high_R = np.where(above_R, high_R, middle_R)
    step_RG, above_RG = problems.priced(np.exp2(high_R) / budget), problems.priced(np.exp2(low_R) / budget)
    lowered_R = problems.lower(above_RG, budget, keep_RG=above_RG < step_RG)
    problems.fill(step_RG, budget)
    problems.fill(above_RG, budget)
    value_R, other_R = (problems.at(problems.value_RGS, one).sum(axis=1) for one in (step_RG, above_RG))
    step_RG = np.where((lowered_R & (other_R > value_R))[:, None], above_RG, step_RG)
    in_place_RG = np.empty_like(step_RG)
    np.put_along_axis(in_place_RG, order_RG, step_RG, axis=1)
    return in_place_RG, np.exp2(high_R) / budget


class _Problems:
    """R problems, the groups of each in its own order along the chains."""

    def __init__(self, choices: Choices, share_RG: NDArray[np.float64], order_RG: NDArray[np.intp]) -> None:
        self.chains = choices.chains
        self.p_RGS = choices.parameters_GS[order_RG]
        self.value_RGS = np.take_along_axis(share_RG, order_RG, axis=1)[:, :, None] * np.log(self.p_RGS)
        self.last_RG = choices.last_G[order_RG]

    def at(self, table_RGS: NDArray[Any], step_RG: NDArray[np.int64]) -> NDArray[Any]:
        """(R, G) the entries of a table at these steps."""
        return np.take_along_axis(table_RGS, step_RG[:, :, None], axis=2)[:, :, 0]

    def priced(self, price_R: NDArray[np.float64]) -> NDArray[np.int64]:
        """(R, G) the best step of each group at a price, the one of fewer parameters among equals."""
        worth_RGS = self.value_RGS - price_R[:, None, None] * self.p_RGS
        step_RG = np.minimum(worth_RGS.shape[2] - 1 - worth_RGS[:, :, ::-1].argmax(axis=2), self.last_RG)
        for first, end in pairwise(self.chains):
            # Groups of unlike shapes can break the order by a rounding of their steps.
            step_RG[:, first:end] = np.maximum.accumulate(step_RG[:, first:end], axis=1)
        return step_RG

    def fill(self, step_RG: NDArray[np.int64], budget: int) -> None:
        """Raise groups, in place, as long as a step fits: always the one that gains most per parameter."""
        left_R = budget - self.at(self.p_RGS, step_RG).sum(axis=1)
        while True:
            before_RG = np.roll(step_RG, 1, axis=1)
            before_RG[:, self.chains[:-1]] = 0
            up_RG = np.maximum(step_RG - 1, 0)
            more_RG = self.at(self.p_RGS, up_RG) - self.at(self.p_RGS, step_RG)
            fits_RG = (step_RG > before_RG) & (more_RG <= left_R[:, None])
            if not fits_RG.any():
                return
            gain_RG = self.at(self.value_RGS, up_RG) - self.at(self.value_RGS, step_RG)
            rate_RG = np.where(more_RG > 0, gain_RG / np.maximum(more_RG, 1), np.inf)
            best_R = np.where(fits_RG, rate_RG, -np.inf).argmax(axis=1)
            some_R = np.flatnonzero(fits_RG.any(axis=1))
            step_RG[some_R, best_R[some_R]] -= 1
            left_R[some_R] -= more_RG[some_R, best_R[some_R]]

    def lower(self, step_RG: NDArray[np.int64], budget: int, keep_RG: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Lower groups, in place, until the budget is kept: always the one that loses least per parameter needed.

        keep_RG: groups to leave as they are. Returns (R,) whether the budget is kept.
        """
        over_R = self.at(self.p_RGS, step_RG).sum(axis=1) - budget
        while True:
            after_RG = np.roll(step_RG, -1, axis=1)
            after_RG[:, np.array(self.chains[1:]) - 1] = np.iinfo(np.int64).max
            fits_RG = (step_RG < np.minimum(self.last_RG, after_RG)) & ~keep_RG & (over_R > 0)[:, None]
            if not fits_RG.any():
                return over_R <= 0
            down_RG = np.minimum(step_RG + 1, self.last_RG)
            less_RG = self.at(self.p_RGS, step_RG) - self.at(self.p_RGS, down_RG)
            loss_RG = self.at(self.value_RGS, step_RG) - self.at(self.value_RGS, down_RG)
            rate_RG = loss_RG / np.maximum(np.minimum(less_RG, over_R[:, None]), 1)
            best_R = np.where(fits_RG, rate_RG, np.inf).argmin(axis=1)
            some_R = np.flatnonzero(fits_RG.any(axis=1))
            step_RG[some_R, best_R[some_R]] += 1
            over_R[some_R] -= less_RG[some_R, best_R[some_R]]
