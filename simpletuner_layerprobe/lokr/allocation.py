"""Allocation: which step each group gets, so that the total keeps to a budget and the value is largest.

A chain is a row of groups that share a list of steps; from step to step a group's parameters p fall, and along the
chain no group may have an earlier step than the one before it. The value of an assignment is the sum of
share * log(p) over the groups. Asked for is the largest value among the assignments whose total, the sum of p, lies
between two numbers; if there is none, a total as near to the upper number as there can be.

How it is solved. A price on every parameter makes the groups independent of each other: the best assignment at the
price, L* = max(value - price * total), is found chain by chain, and for every group and step the loss of the best
assignment through it against L*. Since value = L* - loss + price * total, an assignment falls short of
L* + price * highest by its loss and by price * (highest - total); neither is negative up to the highest total. The
chains are dealt to two sides. On each side all partial assignments are listed that lose no more than a threshold, and
every one is joined to the best of the other side that brings the total into the range. Once the best so found falls
short by no more than the threshold, it is the best of all; else the threshold rises.

Where a list grows beyond _STATES, as it does if a few groups have most of the share and one price for all leaves too
much open, branch and bound takes over. It splits sets of assignments in two by the step of one group, always the set
with the largest bound. The bound of a set disregards the order along the chains and allows changes of step in part: log
is concave, so the changes are made in the order of what they gain per parameter, as far as the highest total goes. The
set is split at the change that the total cuts in part (if there is none, where the order along a chain is violated).
The changes made as a whole, brought in order, are an assignment, which counts if its total lies in the range. This ends
when no bound is more than _CLOSE above the best found, or after _NODES sets; the largest bound left is what is proved.

Where that leaves more than _FAIR and the lists had nothing in the range, as it may be if many shares are equal, lists
are made once more in which only the best of those stays whose totals lie in the same narrow cell, and branch and bound
starts again from what they find. If nothing in the range was found until then, all totals are rounded and dynamic
programming goes over (group, step, rounded total). Totals of what is found are always counted exactly; what the
rounding may hide is part of the slack.

All floating-point sums are those of about a hundred numbers around 1: shortfalls that differ by less than 1e-12 count
as equal. Shape letters: R replicates (problems that differ in shares and order only), G groups of a chain, S its steps,
K partial assignments, N changes of a group from a step to the one before it, C cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Steps = list[NDArray[np.int64]]
"""Per chain, (G,) the step of every group, along the chain."""

_EQUAL = 1e-12
_STATES = 2_000  # partial assignments that a side may have
_CELL = 1 / 10_000  # of the highest total
_FEW = 400  # so many need no search for equals among them
_FIRST_OPEN = 24  # the first threshold leaves so many (group, step) open beside the best assignment
_RISE = 2.0
_PRICES = 26  # halvings of the range of prices, 2^-30 to 2^30 times 1 / highest
_CLOSE = 1e-6  # a slack that is not worth more work
_FAIR = 1e-4  # a slack that is worth a list with cells
_NODES = 400  # sets of assignments that branch and bound may look at
_CELLS_OF_WORK = 45_000_000  # groups x steps x cells: about half a second, and as many bytes
_MIN_CELLS, _MAX_CELLS = 20_000, 100_000
_TRIES = 300


@dataclass(frozen=True)
class Allocated:
    """A step for every group.

    steps: along each chain, as ordered. total: the sum of p. nearest: no assignment has a total nearer to the upper
    number than this; 0 if the total lies in the range. slack: no assignment with a total up to the upper number has a
    value larger by more than log(1 + slack); None if the total lies outside of the range. way: the last of the
    three searches that was needed.
    """

    steps: Steps
    total: int
    nearest: int
    slack: float | None
    way: Literal["list", "tree", "table"]


def allocate(
    parameters: Sequence[NDArray[np.int64]],
    order: Sequence[NDArray[np.intp]],
    share: Sequence[NDArray[np.float64]],
    lowest: int,
    highest: int,
) -> Iterator[Allocated]:
    """The best assignment of each replicate.

    parameters: per chain (G, S), falling with the step. order, share: per chain (R, G); share in the order of the
    parameters. lowest, highest: the range of totals; the smallest assignment must lie below `highest`, the largest
    above it.
    """
    value = [np.log(parameters_GS) for parameters_GS in parameters]
    row_R1 = np.arange(len(order[0]))[:, None]
    ordered = [parameters_GS[order_RG] for parameters_GS, order_RG in zip(parameters, order, strict=True)]
    valued = [
        value_GS[order_RG] * share_RG[row_R1, order_RG][:, :, None]
        for value_GS, order_RG, share_RG in zip(value, order, share, strict=True)
    ]
    price_R = _prices(ordered, valued, highest)
    chains = [
        _Priced.of(p_RGS, v_RGS - price_R[:, None, None] * p_RGS) for p_RGS, v_RGS in zip(ordered, valued, strict=True)
    ]
    for r in range(len(price_R)):
        parts = [(p_RGS[r], v_RGS[r]) for p_RGS, v_RGS in zip(ordered, valued, strict=True)]
        at_price = _List([chain.replicate(r) for chain in chains], float(price_R[r]), lowest, highest)
        listed, ended = at_price.solve()
        found = listed if ended else _Tree(parts, lowest, highest).solve(listed)
        if listed is None and not ended and (found is None or (found.slack or 0.0) > _FAIR):
            alike, _ = at_price.solve(max(2, int(highest * _CELL)))
            found = _Tree(parts, lowest, highest).solve(found, alike)
        yield found or _Table.solve(parts, lowest, highest)


def _prices(
    ordered: Sequence[NDArray[np.int64]], valued: Sequence[NDArray[np.float64]], highest: int
) -> NDArray[np.float64]:
    """(R,) the smallest price found at which the best assignment keeps to the highest total."""
    R = len(ordered[0])
    low_R, high_R = np.full(R, -30.0), np.full(R, 30.0)
    for _ in range(_PRICES):
        middle_R = (low_R + high_R) / 2
        price_R = np.exp2(middle_R) / highest
        total_R = np.zeros(R)
        for p_RGS, v_RGS in zip(ordered, valued, strict=True):
            total_R += _total_at(p_RGS, v_RGS - price_R[:, None, None] * p_RGS)
        above_R = total_R > highest
        low_R = np.where(above_R, middle_R, low_R)
        high_R = np.where(above_R, high_R, middle_R)
    return np.asarray(np.exp2(high_R) / highest)


def _total_at(p_RGS: NDArray[np.int64], worth_RGS: NDArray[np.float64]) -> NDArray[np.int64]:
    """(R,) the total of a chain's best assignment; the smaller one among equals."""
    R, G, S = p_RGS.shape
    worth_GRS, p_GRS = np.ascontiguousarray(worth_RGS.transpose(1, 0, 2)), p_RGS.transpose(1, 0, 2)
    step_S = np.arange(S)
    best_RS, total_RS = worth_GRS[0], p_GRS[0]
    for g in range(1, G):
        so_far_RS = np.maximum.accumulate(best_RS, axis=1)
        source_RS = np.maximum.accumulate(np.where(best_RS == so_far_RS, step_S, 0), axis=1)
        total_RS = np.take_along_axis(total_RS, source_RS, axis=1) + p_GRS[g]
        best_RS = so_far_RS + worth_GRS[g]
    last_R = S - 1 - best_RS[:, ::-1].argmax(axis=1)
    return np.asarray(total_RS[np.arange(R), last_R])


@dataclass(frozen=True)
class _Priced:
    """A chain at a price; every array once per replicate, or of one replicate.

    worth: share * log(p) - price * p. to_go: the worth of the best rest of the chain behind a group and step. loss: by
    how much the best assignment through a group and step is worth less than the best of all. best: the worth of that.
    """

    parameters: NDArray[np.int64]
    worth: NDArray[np.float64]
    to_go: NDArray[np.float64]
    loss: NDArray[np.float64]
    best: NDArray[np.float64]

    @staticmethod
    def of(p_RGS: NDArray[np.int64], worth_RGS: NDArray[np.float64]) -> _Priced:
        G = p_RGS.shape[1]
        reached_RGS, to_go_RGS = worth_RGS.copy(), np.zeros_like(worth_RGS)
        for g in range(1, G):
            reached_RGS[:, g] += np.maximum.accumulate(reached_RGS[:, g - 1], axis=1)
        for g in range(G - 2, -1, -1):
            behind_RS = worth_RGS[:, g + 1] + to_go_RGS[:, g + 1]
            to_go_RGS[:, g] = np.maximum.accumulate(behind_RS[:, ::-1], axis=1)[:, ::-1]
        best_R = reached_RGS[:, -1].max(axis=1)
        return _Priced(p_RGS, worth_RGS, to_go_RGS, best_R[:, None, None] - (reached_RGS + to_go_RGS), best_R)

    def replicate(self, r: int) -> _Priced:
        return _Priced(self.parameters[r], self.worth[r], self.to_go[r], self.loss[r], self.best[r])


@dataclass(frozen=True)
class _Side:
    """Partial assignments: those of some of the chains, in the order of their totals.

    total_K: sums of p. loss_K: against the best of these chains. way: per open group its chain, its place, (K,) the
    step and the parent of each partial assignment; then the order that the last ones were brought into.
    """

    total_K: NDArray[np.int64]
    loss_K: NDArray[np.float64]
    way: list[tuple[int, int, NDArray[np.intp], NDArray[np.intp]]]


class _List:
    """The search for one replicate."""

    def __init__(self, chains: Sequence[_Priced], price: float, lowest: int, highest: int) -> None:
        self.chains = chains
        self.price = price
        self.lowest = lowest
        self.highest = highest

    def solve(self, cell: int = 1) -> tuple[Allocated | None, bool]:
        """What is found, and whether it is the best: not if a list grows too long.

        cell: above 1, only the best of those whose totals lie in the same cell of this width is kept, so that no list
        grows too long; what is found need not be the best then.
        """
        worst = sum(float(chain.best - chain.worth.min(axis=1).sum()) for chain in self.chains)
        everything = worst + self.price * self.highest
        loss_N = np.sort(np.concatenate([chain.loss.ravel() for chain in self.chains]))
        loss_N = loss_N[loss_N > _EQUAL]
        threshold = float(loss_N[min(_FIRST_OPEN, len(loss_N) - 1)]) if loss_N.size else everything
        found = None
        while (sides := self._sides(threshold, self.highest, cell)) is not None:
            short, shortest, pair = self._join(*sides)
            if short < np.inf:
                slack = _slack(short - (min(shortest, threshold) if cell == 1 else 0.0))
                found = Allocated(*self._assignment(*sides, pair), 0, slack, "list")
                if short <= threshold + _EQUAL:
                    return found, cell == 1
            elif threshold >= everything:
                return self._nearest(), True
            threshold = min(threshold * _RISE, short)
        return found, False

    def _join(self, one: _Side, other: _Side) -> tuple[float, float, tuple[int, int]]:
        """How far the best assignment listed in the range falls short, and the best up to `highest`; the parts.

        Infinite, and no parts that mean anything, where none is listed.
        """
        gain_K = other.loss_K - self.price * other.total_K
        first_J = np.searchsorted(other.total_K, self.lowest - one.total_K)
        after_J = np.searchsorted(other.total_K, self.highest - one.total_K, side="right")
        base_J = one.loss_K + self.price * (self.highest - one.total_K)
        best_J = _range_minima(gain_K, first_J, after_J)
        short_J = base_J + np.where(best_J >= 0, gain_K[best_J], np.inf)
        j = int(short_J.argmin())
        least_K = np.minimum.accumulate(gain_K)
        shortest_J = base_J + np.where(after_J > 0, least_K[after_J - 1], np.inf)
        return float(short_J[j]), float(shortest_J.min()), (j, int(best_J[j]))

    def _nearest(self) -> Allocated | None:
        """The assignment whose total is nearest to `highest`, the most valuable among equals."""
        sides = self._sides(np.inf, np.iinfo(np.int64).max, 1)
        if sides is None:
            return None
        one, other = sides
        above_J = np.searchsorted(other.total_K, self.highest - one.total_K)
        candidates = []
        for place_J in (above_J - 1, above_J):
            place_J = place_J.clip(0, len(other.total_K) - 1)
            total_J = one.total_K + other.total_K[place_J]
            short_J = one.loss_K + other.loss_K[place_J] - self.price * total_J
            distance_J = np.abs(total_J - self.highest)
            j = int(np.lexsort((short_J, distance_J))[0])
            candidates.append((int(distance_J[j]), float(short_J[j]), (j, int(place_J[j]))))
        distance, _, pair = min(candidates)
        return Allocated(*self._assignment(one, other, pair), distance, None, "list")

    def _assignment(self, one: _Side, other: _Side, pair: tuple[int, int]) -> tuple[Steps, int]:
        """The steps and the total of two partial assignments together."""
        steps = [fixed_G.astype(np.int64) for fixed_G in self._fixed]
        for side, k in zip((one, other), pair, strict=True):
            for number, g, step_K, parent_K in reversed(side.way):
                if number >= 0:
                    steps[number][g] = step_K[k]
                k = int(parent_K[k])
        return steps, int(one.total_K[pair[0]] + other.total_K[pair[1]])

    def _sides(self, threshold: float, highest: int, cell: int) -> tuple[_Side, _Side] | None:
        """All partial assignments of each side that lose no more than the threshold and can keep to `highest`.

        Of those of a side with the same total, or in the same cell, only the best is kept. None for more than _STATES
        on a side, unless there are cells.
        """
        keeps = [chain.loss <= threshold + _EQUAL for chain in self.chains]
        self._fixed = [keep_GS.argmax(axis=1) for keep_GS in keeps]
        dealt: tuple[list[int], list[int]] = ([], [])
        options = [int((keep_GS.sum(axis=1) - 1).sum()) for keep_GS in keeps]
        for number in sorted(range(len(keeps)), key=lambda number: -options[number]):
            min(dealt, key=lambda numbers: sum(options[one] for one in numbers)).append(number)
        smallest = [
            int(np.where(keep_GS, chain.parameters, np.iinfo(np.int64).max).min(axis=1).sum())
            for chain, keep_GS in zip(self.chains, keeps, strict=True)
        ]
        sides = [
            self._side(
                numbers,
                keeps,
                threshold,
                cell,
                highest - sum(smallest[one] for one in range(len(keeps)) if one not in numbers),
            )
            for numbers in dealt
        ]
        one, other = sides
        return None if one is None or other is None else (one, other)

    def _side(
        self, numbers: Sequence[int], keeps: Sequence[NDArray[np.bool_]], threshold: float, cell: int, highest: int
    ) -> _Side | None:
        total_K, loss_K = np.zeros(1, dtype=np.int64), np.zeros(1)
        way: list[tuple[int, int, NDArray[np.intp], NDArray[np.intp]]] = []
        for number in numbers:
            chain, keep_GS, fixed_G = self.chains[number], keeps[number], self._fixed[number]
            open_G = np.flatnonzero(keep_GS.sum(axis=1) > 1)
            place_G = np.arange(len(fixed_G))
            fixed_p_G, fixed_w_G = chain.parameters[place_G, fixed_G], chain.worth[place_G, fixed_G]
            step_K, before = np.zeros(len(total_K), dtype=np.intp), 0
            # What the chain's best assignment is worth against what was chosen so far and the best that can follow.
            short_K = loss_K + float(chain.best)
            for g in open_G.tolist():
                fixed_p, fixed_w = int(fixed_p_G[before:g].sum()), float(fixed_w_G[before:g].sum())
                before = g + 1
                step_S = np.flatnonzero(keep_GS[g])
                total_KS = (total_K + fixed_p)[:, None] + chain.parameters[g, step_S]
                short_KS = (short_K - fixed_w)[:, None] - chain.worth[g, step_S]
                keep_KS = (short_KS - chain.to_go[g, step_S] <= threshold + _EQUAL) & (total_KS <= highest)
                if before > 1:
                    keep_KS &= step_S >= step_K[:, None]
                parent_K, chosen_K = np.nonzero(keep_KS)
                total_K, short_K, step_K = total_KS[keep_KS], short_KS[keep_KS], step_S[chosen_K]
                if len(total_K) > _FEW:
                    kept_K = _best_of_equals(total_K // cell, short_K, None if g == open_G[-1] else step_K)
                    parent_K, step_K = parent_K[kept_K], step_K[kept_K]
                    total_K, short_K = total_K[kept_K], short_K[kept_K]
                    if len(total_K) > _STATES and cell == 1:
                        return None
                way.append((number, g, step_K, parent_K))
            total_K = total_K + int(fixed_p_G[before:].sum())
            loss_K = short_K - float(fixed_w_G[before:].sum())
        kept_K = _best_of_equals(total_K, loss_K, None)
        way.append((-1, -1, kept_K, kept_K))
        return _Side(total_K[kept_K], loss_K[kept_K], way)


def _range_minima(
    value_K: NDArray[np.float64], first_J: NDArray[np.intp], after_J: NDArray[np.intp]
) -> NDArray[np.intp]:
    """(J,) the place of the smallest value from first to before after; -1 where there is none."""
    place_K = np.arange(len(value_K))
    levels = [place_K]
    width = 1
    while 2 * width <= int((after_J - first_J).max(initial=0)):
        last = levels[-1]
        one_K, other_K = last[:-width], last[width:]
        levels.append(np.where(value_K[other_K] < value_K[one_K], other_K, one_K))
        width *= 2
    found_J = np.full(len(first_J), -1)
    length_J = after_J - first_J
    for level, place_K in enumerate(levels):
        of_J = (length_J >= 1 << level) & (length_J < 2 << level)
        one_J, other_J = place_K[first_J[of_J]], place_K[after_J[of_J] - (1 << level)]
        found_J[of_J] = np.where(value_K[other_J] < value_K[one_J], other_J, one_J)
    return found_J


def _best_of_equals(
    total_K: NDArray[np.int64], loss_K: NDArray[np.float64], step_K: NDArray[np.intp] | None
) -> NDArray[np.intp]:
    """Which to keep, by total: of those with the same total (and step, if given) the one that loses least."""
    keys = (loss_K, total_K) if step_K is None else (loss_K, step_K, total_K)
    order_K = np.lexsort(keys)
    new_K = np.ones(len(order_K), dtype=np.bool_)
    sorted_K = total_K[order_K]
    new_K[1:] = sorted_K[1:] != sorted_K[:-1]
    if step_K is not None:
        sorted_K = step_K[order_K]
        new_K[1:] |= sorted_K[1:] != sorted_K[:-1]
    return order_K[new_K]


@dataclass(frozen=True)
class _Node:
    """A set of assignments: every group has a step from first to last.

    bound: none of them with a total up to the highest is more valuable. split: a group and step; the set is to be split
    into those up to the step and those behind it. None if the bound is the value of one of them.
    """

    first_G: NDArray[np.intp]
    last_G: NDArray[np.intp]
    bound: float
    split: tuple[int, int] | None


class _Tree:
    """Branch and bound for one replicate; the groups of all chains are in one row."""

    def __init__(
        self, parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], lowest: int, highest: int
    ) -> None:
        self.lowest = lowest
        self.highest = highest
        ends = np.cumsum([len(p_GS) for p_GS, _ in parts]).tolist()
        self.chains = [slice(end - len(p_GS), end) for (p_GS, _), end in zip(parts, ends, strict=True)]
        self.final_G = np.concatenate([np.full(len(p_GS), p_GS.shape[1] - 1) for p_GS, _ in parts])
        self.place_G = np.arange(len(self.final_G))
        widest = int(self.final_G.max()) + 1
        self.p_GS, self.value_GS = (
            np.concatenate([np.pad(one, ((0, 0), (0, widest - one.shape[1])), mode="edge") for one in of_chains])
            for of_chains in zip(*parts, strict=True)
        )
        group_N, step_N = np.nonzero(np.arange(widest - 1) < self.final_G[:, None])
        p_N, gain_N = (-np.diff(one, axis=1)[group_N, step_N] for one in (self.p_GS, self.value_GS))
        rate_N = np.divide(gain_N, p_N, out=np.full(len(p_N), np.inf), where=p_N > 0)
        order_N = np.argsort(-rate_N, kind="stable")
        self.group_N, self.step_N = group_N[order_N], step_N[order_N]
        self.p_N, self.gain_N, self.rate_N = p_N[order_N], gain_N[order_N], rate_N[order_N]
        self.best_G: NDArray[np.intp] | None = None
        self.reached = -np.inf
        self.nodes = 0
        self.open: list[tuple[float, int, _Node]] = []

    def solve(self, *before: Allocated | None) -> Allocated | None:
        """The best of what comes up and of what was found and proved before; None if nothing is in the range."""
        proved = np.inf
        for found in before:
            if found is not None and found.slack is not None:
                step_G = np.concatenate(found.steps)
                self._consider(step_G)
                proved = min(proved, self._value(step_G) + float(np.log1p(found.slack)))
        self._add(np.zeros_like(self.final_G), self.final_G, proved)
        settled = -np.inf
        while self.open and self.nodes < _NODES and -self.open[0][0] > self.reached + _CLOSE:
            _, _, node = heappop(self.open)
            if node.split is None:
                settled = max(settled, node.bound)
                continue
            group, step = node.split
            chain = next(chain for chain in self.chains if group < chain.stop)
            last_G, first_G = node.last_G.copy(), node.first_G.copy()
            last_G[chain.start : group + 1] = last_G[chain.start : group + 1].clip(max=step)
            first_G[group : chain.stop] = first_G[group : chain.stop].clip(min=step + 1)
            self._add(node.first_G, last_G, node.bound)
            self._add(first_G, node.last_G, node.bound)
        if self.best_G is None:
            return None
        bound = max(settled, -self.open[0][0] if self.open else -np.inf)
        steps = [self.best_G[chain].astype(np.int64) for chain in self.chains]
        return Allocated(steps, self._total(self.best_G), 0, _slack(bound - self.reached), "tree")

    def _add(self, first_G: NDArray[np.intp], last_G: NDArray[np.intp], proved: float) -> None:
        """Bounds a set, unless it is empty, and considers the assignment that the bound leads to.

        proved: a bound that is known already.
        """
        total = self._total(last_G)
        if total > self.highest or (first_G > last_G).any():
            return
        change_N = np.flatnonzero((self.step_N >= first_G[self.group_N]) & (self.step_N < last_G[self.group_N]))
        total_N = total + np.cumsum(self.p_N[change_N])
        whole = int(np.searchsorted(total_N, self.highest, side="right"))
        made_N = change_N[:whole]
        total = int(total_N[whole - 1]) if whole else total
        bound = self._value(last_G) + float(self.gain_N[made_N].sum())
        step_G = last_G - np.bincount(self.group_N[made_N], minlength=len(last_G))
        if total >= self.lowest:
            self._consider(step_G)
        if whole < len(change_N):
            cut = change_N[whole]
            bound += (self.highest - total) * float(self.rate_N[cut])
            split: tuple[int, int] | None = (int(self.group_N[cut]), int(self.step_N[cut]))
        else:
            split = self._violation(step_G)
        node = _Node(first_G, last_G, min(proved, bound), split)
        heappush(self.open, (-node.bound, self.nodes, node))
        self.nodes += 1

    def _consider(self, step_G: NDArray[np.intp]) -> None:
        """Keeps an assignment, brought in order along the chains, if it is the best so far in the range."""
        ordered_G = np.concatenate([np.maximum.accumulate(step_G[chain]) for chain in self.chains])
        value = self._value(ordered_G)
        if value > self.reached and self.lowest <= self._total(ordered_G) <= self.highest:
            self.best_G, self.reached = ordered_G, value

    def _violation(self, step_G: NDArray[np.intp]) -> tuple[int, int] | None:
        """A group that has a later step than the one behind it in its chain, and the step of that one."""
        for chain in self.chains:
            falls = np.flatnonzero(np.diff(step_G[chain]) < 0)
            if len(falls):
                group = chain.start + int(falls[0])
                return group, int(step_G[group + 1])
        return None

    def _total(self, step_G: NDArray[np.intp]) -> int:
        return int(self.p_GS[self.place_G, step_G].sum())

    def _value(self, step_G: NDArray[np.intp]) -> float:
        return float(self.value_GS[self.place_G, step_G].sum())


def _slack(difference: float) -> float:
    """By which fraction a mean capacity is larger whose logarithm is larger by so much."""
    slack = float(np.expm1(difference))
    return slack if slack > _EQUAL else 0.0


class _Table:
    """The largest value for every total up to `limit`, and the way to it.

    Totals are counted in units; the last cell holds those of up to `limit` and half a unit per group. parts: per chain
    (G, S) parameters and values.
    """

    @staticmethod
    def solve(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], lowest: int, highest: int) -> Allocated:
        table = _Table(parts, highest)
        best = table.best(lowest, highest)
        if best is not None:
            return Allocated(best, table.count(best), 0, _slack(table.bound(highest) - table.value(best)), "table")
        below = table.nearest(highest, lambda total: total <= highest)
        reach = highest - (0 if below is None else table.count(below))
        table = _Table(parts, highest + reach)
        found = table.nearest(highest, lambda total: True)
        assert found is not None, "the smallest assignment lies below the range"
        if below is not None and abs(table.count(below) - highest) <= abs(table.count(found) - highest):
            found = below
        total = table.count(found)
        return Allocated(found, total, min(table.proved_distance(highest), abs(total - highest)), None, "table")

    def __init__(self, parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], limit: int) -> None:
        self.parts = parts
        groups = sum(len(p_GS) for p_GS, _ in parts)
        widest = max(p_GS.shape[1] for p_GS, _ in parts)
        cells = min(max(_CELLS_OF_WORK // (groups * widest), _MIN_CELLS), _MAX_CELLS)
        self.unit = max(1, -(-limit // cells))
        self.rounding = 0 if self.unit == 1 else groups * self.unit / 2
        self.cells = int((limit + self.rounding) // self.unit) + 1
        self._step_type = np.min_scalar_type(widest)
        self._back: list[NDArray[np.integer]] = []
        ended_C = np.full(self.cells, -np.inf)
        ended_C[0] = 0.0
        self._last_step_C = np.zeros(self.cells, dtype=self._step_type)
        for p_GS, value_GS in parts:
            ended_C = self._add_chain(p_GS, value_GS, ended_C)
        self.ended_C = ended_C

    def _add_chain(
        self, p_GS: NDArray[np.int64], value_GS: NDArray[np.float64], ended_C: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        steps = p_GS.shape[1]
        values: list[NDArray[np.float64]] = []
        for place, (p_S, value_S) in enumerate(zip(p_GS.tolist(), value_GS.tolist(), strict=True)):
            came_from_SC = np.zeros((steps, self.cells), dtype=self._step_type)
            now = []
            best_C = values[0] if place else ended_C
            source_C = np.zeros(self.cells, dtype=self._step_type) if place else self._last_step_C
            for step in range(steps):
                if place and step:
                    better_C = values[step] > best_C
                    best_C = np.where(better_C, values[step], best_C)
                    source_C = np.where(better_C, self._step_type.type(step), source_C)
                shift = self._units(p_S[step])
                value_C = np.full(self.cells, -np.inf)
                if shift < self.cells:
                    value_C[shift:] = best_C[: self.cells - shift] + value_S[step]
                    came_from_SC[step, shift:] = source_C[: self.cells - shift]
                now.append(value_C)
            values = now
            self._back.append(came_from_SC)
        best_C, source_C = values[0], np.zeros(self.cells, dtype=self._step_type)
        for step in range(1, steps):
            better_C = values[step] > best_C
            best_C = np.where(better_C, values[step], best_C)
            source_C = np.where(better_C, self._step_type.type(step), source_C)
        self._last_step_C = source_C
        return best_C

    def _units(self, parameters: int) -> int:
        return int(parameters / self.unit + 0.5)

    def best(self, lowest: int, highest: int) -> Steps | None:
        """The most valuable assignment whose exact total lies in the range, among the first that are tried."""
        cells = self._cells_of(lowest, highest)
        for cell in cells[np.argsort(-self.ended_C[cells], kind="stable")][:_TRIES].tolist():
            found = self._steps_to(cell)
            if lowest <= self.count(found) <= highest:
                return found
        return None

    def bound(self, highest: int) -> float:
        """No assignment whose exact total is `highest` or less is more valuable."""
        return float(self.ended_C[self._cells_of(0, highest)].max())

    def nearest(self, total: int, allowed: Callable[[int], bool]) -> Steps | None:
        """The assignment whose exact total is nearest to `total`, among the first that are tried and allowed."""
        cells = np.flatnonzero(np.isfinite(self.ended_C))
        order = np.argsort(np.abs(cells * self.unit - total), kind="stable")[:_TRIES]
        found = [self._steps_to(cell) for cell in cells[order].tolist()]
        found = [steps for steps in found if allowed(self.count(steps))]
        return min(found, key=lambda steps: abs(self.count(steps) - total), default=None)

    def proved_distance(self, total: int) -> int:
        """No assignment has an exact total nearer to `total` than this."""
        cells = np.flatnonzero(np.isfinite(self.ended_C))
        return max(0, int(np.abs(cells * self.unit - total).min() - self.rounding))

    def count(self, steps: Steps) -> int:
        """The exact total of an assignment."""
        return sum(
            int(np.take_along_axis(p_GS, step_G[:, None], axis=1).sum())
            for (p_GS, _), step_G in zip(self.parts, steps, strict=True)
        )

    def value(self, steps: Steps) -> float:
        """The value of an assignment."""
        return sum(
            float(np.take_along_axis(value_GS, step_G[:, None], axis=1).sum())
            for (_, value_GS), step_G in zip(self.parts, steps, strict=True)
        )

    def _cells_of(self, lowest: int, highest: int) -> NDArray[np.intp]:
        """The cells that can hold an assignment whose exact total lies in the range."""
        cells = np.flatnonzero(np.isfinite(self.ended_C))
        totals = cells * self.unit
        return cells[(totals >= lowest - self.rounding) & (totals <= highest + self.rounding)]

    def _steps_to(self, cell: int) -> Steps:
        """The steps of every chain on the best way to a cell."""
        step = int(self._last_step_C[cell])
        place = len(self._back)
        steps: Steps = []
        for p_GS, _ in reversed(self.parts):
            chosen = []
            for p_S in reversed(p_GS.tolist()):
                place -= 1
                chosen.append(step)
                came_from = int(self._back[place][step, cell])
                cell -= self._units(p_S[step])
                step = came_from
            steps.append(np.array(chosen[::-1], dtype=np.int64))
        return steps[::-1]
