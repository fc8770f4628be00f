"""Numbers, factors or ranks, that fit a budget of parameters.

What is chosen. The modules of one kind (feed-forward, attention, modulation) in one block are a group and get one
number, one of the steps that make a difference for their shapes (`adapter.steps`). A chain is the groups of one kind in
one block list (and, per stream, of one stream); along it, in the order of the contributions, capacity never rises: more
contribution never gets less capacity. That is the kind of plan meant below.

What is maximised. Let p be the trainable parameters of a group. The article's line gives each block a wish, 1 for the
one that contributes most and `contrast` for the one that contributes least, and attention twice that. With factors of
exactly these wishes p would be proportional to size / wish^2, with ranks (one wish-th of the largest) to the parameters
of rank 1 / wish; that, divided by its sum over all groups, is the group's share. The plan maximises

    sum of share * log(p)    subject to    budget * (1 - TOLERANCE) <= sum of p <= budget.

Without steps the best p is share * budget: the article's numbers, all scaled by the one number that makes them fit.
With steps it is the plan whose split of the budget has the smallest Kullback-Leibler divergence from that one.

What is proved. HiGHS finds the best plan and a bound: `slack` says by how much the mean capacity (geometric, weighted
by share) of another could be larger at most. Where none lies in the range, the first TOLERANCE above the budget is
tried, then all below it.

Replicates are decided by a price bisection, a few milliseconds each in place of up to two seconds. For the run's own
contributions its plan is the one that is given if it comes within TOLERANCE of HiGHS's bound, so that what is judged is
what is written; else HiGHS's plan is given, and `differing` names the groups in which the two differ. At contrast 12
those were 4 of 60 plans for SD3.5 Large, Medium and Flux.1-dev. The bisection lost 0.01% of mean capacity there on
average and 0.3% at most; 0.1% and 2.2% at MAX_CONTRAST; but up to 8.7% at 100, which is why no more is allowed.

Shape letters: R replicates, G groups, S steps, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import LOKR, steps
from simpletuner_layerprobe.lokr.allocation import Choices, solve, solve_many
from simpletuner_layerprobe.lokr.groups import RATIOS, Group

MORE, LESS, UNIFORM = DIRECTIONS = ("more-change-more-capacity", "more-change-less-capacity", "uniform")
MAX_CONTRAST = 30.0
TOLERANCE = 0.001
"""A total that is no further from the budget than this fraction of it counts as reached, a mean capacity that is no
further below the bound as the best."""


@dataclass(frozen=True)
class Allotment:
    """A number for every group. slack: see above, None where there was no choice. differing: places of groups."""

    numbers: tuple[int, ...]
    slack: float | None
    differing: tuple[int, ...] = ()


class Budget:
    """Plans of the same groups for the same parameters; what does not depend on the contributions is worked out once.

    parameters: trainable, 1 or more. direction: LESS turns the contributions around, UNIFORM takes them as equal; what
    the steps leave over is then spread over the depth. contrast: 1 to MAX_CONTRAST. full: places of groups that get
    factor 1 whatever the rest. least, most: the parameters of the smallest and the largest plan of the kind. Raises
    ConfigError for what is out of range.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        parameters: int,
        *,
        algo: str = LOKR,
        direction: str = MORE,
        contrast: float = 12.0,
        full: Collection[int] = (),
    ) -> None:
        if direction not in DIRECTIONS:
            raise ConfigError(f"the direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
        if not 1 <= contrast <= MAX_CONTRAST:
            raise ConfigError(f"the contrast is {contrast:g}; with a budget it can be 1 to {MAX_CONTRAST:g}")
        if full and algo != LOKR:
            raise ConfigError(f"blocks with factor 1 are for lokr; {algo} has ranks")
        self.groups = tuple(groups)
        self.parameters = parameters
        self._direction = direction
        self._contrast = contrast
        chains: dict[tuple[str, str, str], list[int]] = {}
        for place, group in enumerate(self.groups):
            if place not in full:
                chains.setdefault(group.chain, []).append(place)
        self._place_G = np.array([place for places in chains.values() for place in places], dtype=np.intp)
        # Per place: the numbers that it chooses from, and for each the place of the first that trains the same.
        self._numbers: list[NDArray[np.int64]] = [np.ones(1, dtype=np.int64)] * len(self.groups)
        self._alike: dict[int, NDArray[np.intp]] = {}
        fixed = sum(self.groups[place].parameters(algo, 1) for place in full)
        self._left = parameters - fixed
        self.least = self.most = fixed
        parameters_GS = []
        for places in chains.values():
            shapes = [module.shape for place in places for module in self.groups[place].modules]
            numbers = steps(algo, shapes)
            for place in places:
                self._numbers[place] = np.array(numbers)
                self._alike[place] = self.groups[place].first_alike(algo, numbers)
            parameters_GS.append(
                np.array([[self.groups[place].parameters(algo, number) for number in numbers] for place in places])
            )
        if chains:
            self._choices = Choices.of(parameters_GS)
            self.least += self._choices.least
            self.most += self._choices.most
        power = 2 if algo == LOKR else 1
        self._weight_G = np.array(
            [
                (group.size if algo == LOKR else group.parameters(algo, 1)) / RATIOS[group.kind] ** power
                for group in self.groups
            ]
        )[self._place_G]
        self._power = power

    def plan(self, value_L_by_stream: Mapping[str, NDArray[np.float64]]) -> Allotment:
        """The plan for one set of contributions. The same input gives the same plan.

        value_L_by_stream: for JOINT, and for every stream that a group goes by, (L,) contributions in [0, 1]; not
        needed where the direction is uniform. Raises ConfigError for a contribution that is out of range.
        """
        if (only_G := self._only()) is not None:
            return Allotment(self._given(only_G), None)
        share_1G, order_1G = self._problems({name: value_L[None] for name, value_L in value_L_by_stream.items()}, 1)
        step_1G, price_1 = solve_many(self._choices, share_1G, order_1G, self._left)
        share_G, order_G, priced_G = share_1G[0], order_1G[0], step_1G[0]
        highest, near = self._left, int(self.parameters * TOLERANCE)
        for low, high in ((highest - near, highest), (highest, highest + near), (self._choices.least, highest)):
            best = solve(self._choices, share_G, order_G, low, high, priced_G, float(price_1[0]))
            if best is not None:
                break
        assert best is not None, "the smallest plan keeps to the budget"
        best_G, best_slack = best
        lost = self._choices.value(best_G, share_G) - self._choices.value(priced_G, share_G)
        slack = max(0.0, math.expm1(math.log1p(best_slack) + lost))
        if low <= self._choices.total(priced_G) <= high and slack <= TOLERANCE:
            return Allotment(self._given(priced_G), slack)
        differing = [
            int(place)
            for place, one, other in zip(self._place_G, best_G, priced_G, strict=True)
            if self._alike[place][one] != self._alike[place][other]
        ]
        return Allotment(self._given(best_G), best_slack, tuple(sorted(differing)))

    def numbers(self, value_RL_by_stream: Mapping[str, NDArray[np.float64]]) -> NDArray[np.int64]:
        """(R, G) the numbers for R sets of contributions by the bisection, the first of those that train alike."""
        R = len(next(iter(value_RL_by_stream.values())))
        if (only_G := self._only()) is not None:
            step_RG = only_G[None]
        else:
            problems = self._problems(value_RL_by_stream, 1 if self._direction == UNIFORM else R)
            step_RG, _ = solve_many(self._choices, *problems, self._left)
        number_RG = np.ones((len(step_RG), len(self.groups)), dtype=np.int64)
        for place, step_R in zip(self._place_G, step_RG.T, strict=True):
            number_RG[:, place] = self._numbers[place][self._alike[place][step_R]]
        return np.broadcast_to(number_RG, (R, len(self.groups)))

    def bound(self, allotment: Allotment, reached: int) -> str:
        """What is proved of a plan, in words."""
        if self.parameters <= self.least:
            return f"the smallest plan of this kind has {self.least:,} parameters"
        if self.parameters >= self.most:
            return f"the largest plan of this kind has {self.most:,} parameters"
        within = abs(reached - self.parameters) <= self.parameters * TOLERANCE
        where = f"reached within {TOLERANCE:.1%}" if within else f"no plan of this kind is within {TOLERANCE:.1%}"
        more = f"more than {math.ceil(allotment.slack * 1e4) / 1e4:.2%}" if allotment.slack else "any"
        weighing = "" if self._direction == UNIFORM else " (weighted by contribution)"
        text = f"{where}; none there has a mean capacity{weighing} {more} larger"
        if allotment.differing and self._direction != UNIFORM:
            text += (
                f"; {len(allotment.differing)} of {len(self.groups)} differ from those that replicates are judged by"
            )
        return text

    def _only(self) -> NDArray[np.int64] | None:
        """The steps where there is no choice, else None."""
        if not self._place_G.size:
            return np.zeros(0, dtype=np.int64)
        if self.parameters <= self.least:
            return self._choices.last_G
        return np.zeros(len(self._place_G), dtype=np.int64) if self.parameters >= self.most else None

    def _problems(
        self, value_RL_by_stream: Mapping[str, NDArray[np.float64]], R: int
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """(R, G) the shares of the groups that are not full, and their order along the chains."""
        value_RG = self._values(value_RL_by_stream, R)
        weight_RG = self._weight_G / (1 + (self._contrast - 1) * (1 - value_RG)) ** self._power
        return weight_RG / weight_RG.sum(axis=1, keepdims=True), self._choices.order(value_RG)

    def _values(self, value_RL_by_stream: Mapping[str, NDArray[np.float64]], R: int) -> NDArray[np.float64]:
        """(R, G) the contribution that each group goes by, in the direction asked for."""
        if self._direction == UNIFORM:
            return np.ones((R, len(self._place_G)))
        groups = [self.groups[place] for place in self._place_G]
        value_RG = np.stack([value_RL_by_stream[group.stream][:, group.number] for group in groups], axis=1)
        outside_RG = ~((value_RG >= 0) & (value_RG <= 1))
        if outside_RG.any():
            r, g = np.argwhere(outside_RG)[0]
            raise ConfigError(f"the contribution of block {groups[g].number} is {value_RG[r, g]}; expected 0 to 1")
        return np.asarray(value_RG if self._direction == MORE else 1 - value_RG, dtype=np.float64)

    def _given(self, step_G: NDArray[np.int64]) -> tuple[int, ...]:
        """The numbers of steps, one per group; full ones have 1."""
        number_G = np.ones(len(self.groups), dtype=np.int64)
        for place, step in zip(self._place_G, step_G, strict=True):
            number_G[place] = self._numbers[place][step]
        return tuple(number_G.tolist())
