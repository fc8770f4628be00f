"""Contributions to factors that fit a budget of parameters.

What is chosen. The modules of one kind (feed-forward, attention, modulation) in one block are a group and get one
factor. A factor counts if it is a step: it splits every dimension in the group's chain as finely as a factor of its
size can, and otherwise than the step before it. On SD3.5 Large's attention the steps are 1, 2, 4, 8, 16, 19, 32 and 38.
A chain is the groups of one kind in one block list (and, per stream, of one stream); along it, in the order of the
contributions, capacity never rises: more contribution never gets less capacity. That is the kind of assignment meant
below.

What is maximised. Let p be the trainable parameters of a group and

    share = size / (ratio * wish)^2, divided by the sum over all groups,

where size is the number of weights in the group, ratio that of its kind (attention 2, the others 1) and wish the
article's line from contribution to factor: 1 for the block that contributes most, `contrast` (12) for the one that
contributes least. The plan maximises

    sum of share * log(p)    subject to    budget * (1 - TOLERANCE) <= sum of p <= budget.

Without steps the best p is share * budget: the article's factors, all multiplied by the one number that makes them fit.
With steps it is the assignment whose split of the budget has the smallest Kullback-Leibler divergence from that one. If
no assignment lies within the tolerance, the one whose total is nearest to the budget is taken.

How it is solved. Dynamic programming over (group, step, total), the totals in cells of one unit. Where the unit is one
parameter the answer is exact; where it is larger, each group's parameters are rounded to it, so that a total is off by
half a unit per group at most, and the exact total of a solution is counted before it is taken. The bound holds
for the exact problem: it is taken over all cells that the rounding could have moved into the range.

Shape letters: L blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from math import isqrt, log, prod

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.families import Target, lies_at
from simpletuner_layerprobe.lokr.config import Planned, layer_kind
from simpletuner_layerprobe.lokr.factors import ARTICLE_MAX_FACTOR, achieved_factor, lokr_parameters
from simpletuner_layerprobe.run.manifest import Module

FEED_FORWARD, ATTENTION, MODULATION = "feed-forward", "attention", "modulation"
KINDS = (FEED_FORWARD, ATTENTION, MODULATION)
ARTICLE_RATIOS = {FEED_FORWARD: 1.0, ATTENTION: 2.0, MODULATION: 1.0}
DIRECTIONS = ("more-change-more-capacity", "more-change-less-capacity", "uniform")
JOINT = "joint"
"""The contributions of all streams combined: those of the modules that work on all of them at once."""

TOLERANCE = 0.001
"""A total that is no further below the budget than this fraction of it counts as reached."""

_CELLS_OF_WORK = 45_000_000  # groups x steps x cells: about half a second, and as many bytes
_MIN_CELLS, _MAX_CELLS = 20_000, 100_000
_TRIES = 300
_SPREAD = 0x9E3779B1  # 2^32 / golden ratio: its multiples, modulo 2^32, fill the range evenly

_MODULATION_WORDS = re.compile(r"norm|mod|adaln", re.IGNORECASE)
# Parts of module names that say which stream a module of a double-stream block works on.
_IMAGE_WORDS = frozenset({"img", "image", "i"})
_STREAM_WORDS = {
    "text": frozenset({"context", "txt", "text", "add", "added", "instruct", "t"}),
    "audio": frozenset({"audio"}),
}


@dataclass(frozen=True)
class Group:
    """The modules of one kind in one block, which share a factor.

    number: the block's, counted from 0. chain: what tells its monotone chain from others. stream: whose contributions
    it goes by, JOINT for those of all streams combined.
    """

    number: int
    block: str
    kind: str
    stream: str
    chain: tuple[str, str, str]
    modules: tuple[Module, ...]

    @property
    def size(self) -> int:
        """The weights of its modules."""
        return sum(prod(module.shape) for module in self.modules)

    def parameters(self, factor: int) -> int:
        """Trainable numbers at this factor."""
        return sum(lokr_parameters(module.shape, factor) for module in self.modules)


@dataclass(frozen=True)
class Plan:
    """A factor for every group.

    groups, factors: one factor per group, in the model's order; blocks that are frozen have no group. budget, reached:
    trainable parameters, wished and exactly counted. least, most: what the smallest and the largest assignment of the
    kind have. nearest: no assignment of the kind has a total nearer to the budget than this, as far as proved; 0 where
    the total lies within the tolerance, so that the contributions decide. slack: no assignment of the kind that keeps
    to the budget has a mean capacity (geometric, weighted by share) larger by more than this fraction; None where the
    total alone decides.
    """

    groups: tuple[Group, ...]
    factors: tuple[int, ...]
    budget: int
    reached: int
    least: int
    most: int
    nearest: int
    slack: float | None

    @property
    def gap(self) -> int:
        """Trainable parameters above (or, if negative, below) the budget."""
        return self.reached - self.budget

    @cached_property
    def planned(self) -> tuple[Planned, ...]:
        """The factor of every module, group by group."""
        return tuple(
            Planned(module.name, module.shape, factor)
            for group, factor in zip(self.groups, self.factors, strict=True)
            for module in group.modules
        )

    def bound(self) -> str:
        """What is proved, in words."""
        if self.budget <= self.least:
            return f"the smallest assignment of this kind has {self.least:,} parameters"
        if self.budget >= self.most:
            return f"the largest assignment of this kind has {self.most:,} parameters"
        if self.slack is None:
            return f"no assignment of this kind is nearer to the budget than {self.nearest:,} parameters"
        return (
            f"no assignment of this kind within the budget has a mean capacity (weighted by contribution) "
            f"more than {self.slack:.2%} larger"
        )


def module_groups(
    blocks: Sequence[str],
    targets: Sequence[Target],
    modules: Sequence[Module],
    *,
    streams: Mapping[str, Sequence[str]] | None = None,
    freeze: Sequence[int] = (),
) -> tuple[Group, ...]:
    """The groups of a model, in the order of its blocks.

    blocks: block paths, in order. targets: the family's rules; a module that the first level matches is feed-forward,
    or modulation if the pattern says so (norm, mod, adaln), one that the second matches is attention. streams: None, or
    for each recorded stream the blocks that update it: then image and text modules of a block are groups of their own,
    told apart by their names. A block whose modules do not differ so goes by its only stream, or by JOINT. freeze:
    numbers of blocks to leave out. Raises ProbeError for a block outside of the block lists or without modules, and if
    all blocks are frozen.
    """
    inside: dict[str, list[tuple[str, Module]]] = {block: [] for block in blocks}
    for module in modules:
        if layer_kind(module) in ("linear", "conv"):
            parts = module.name.split(".")
            parents = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
            block = next((path for path in parents if path in inside), None)
            if block is not None:
                inside[block].append((module.name[len(block) + 1 :], module))
    groups = []
    for number, block in enumerate(blocks):
        if number in freeze:
            continue
        target = next((one for one in targets if lies_at(block, one.blocks)), None)
        if target is None:
            raise ProbeError(
                f"block {block!r} lies in none of the block lists that the config has rules for: "
                f"{', '.join(one.blocks for one in targets) or 'none'}"
            )
        stream_of = _streams_of(block, [name for name, _ in inside[block]], streams)
        members: dict[tuple[str, str], list[Module]] = {}
        for name, module in inside[block]:
            kind = _kind(name, target)
            if kind:
                members.setdefault((kind, stream_of[name]), []).append(module)
        if not members:
            raise ProbeError(
                f"the module table has no linear layer or convolution that LyCORIS can adapt in block {block!r}; "
                "the run and the model do not fit together"
            )
        groups += [
            Group(number, block, kind, stream, (target.blocks, kind, stream), tuple(found))
            for (kind, stream), found in sorted(members.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
        ]
    if not groups:
        raise ProbeError("all blocks are frozen, so nothing would train; leave at least one out of --freeze")
    return tuple(groups)


def plan(
    groups: Sequence[Group],
    value_L_by_stream: Mapping[str, NDArray[np.float64]],
    budget: int,
    *,
    direction: str = DIRECTIONS[0],
    ratios: Mapping[str, float] = ARTICLE_RATIOS,
    contrast: float = ARTICLE_MAX_FACTOR,
    min_factor: int = 1,
    max_factor: int | None = None,
    full: Sequence[int] = (),
) -> Plan:
    """The factors that this module's docstring describes.

    value_L_by_stream: for JOINT, and for every stream that a group goes by, (L,) contributions in [0, 1]; not needed
    where the direction is uniform. budget: trainable parameters, 1 or more. direction: more-change-less-capacity turns
    the contributions around, uniform takes them as equal; what the steps leave over is then spread over the depth.
    ratios: per kind, above 0. contrast: 1 or more. min_factor, max_factor: steps outside of them are not used. full:
    numbers of blocks that get factor 1, whatever the rest. The same input gives the same plan. Raises ProbeError for
    what is out of range, and if the limits leave a chain no step.
    """
    _check(budget, direction, ratios, contrast, min_factor, max_factor)
    free = [group for group in groups if group.number not in full]
    fixed = sum(group.parameters(1) for group in groups if group.number in full)
    chains: dict[tuple[str, str, str], list[Group]] = {}
    for group in free:
        chains.setdefault(group.chain, []).append(group)
    lack = {group: _lack(group, value_L_by_stream, direction) for group in free}
    wish = {group: 1 + (contrast - 1) * float(lack[group]) for group in free}
    weight = {group: group.size / (ratios[group.kind] * wish[group]) ** 2 for group in free}
    total_weight = sum(weight.values())
    ordered = []
    for chain, members in chains.items():
        factors = _steps(chain, members, min_factor, max_factor)
        tie_break = {group: place * _SPREAD % 2**32 for place, group in enumerate(members)}
        members.sort(key=lambda group: (lack[group], tie_break[group]))
        ordered.append(_Chain(members, factors, [weight[group] / total_weight for group in members]))
    least = fixed + sum(chain.parameters(-1) for chain in ordered)
    most = fixed + sum(chain.parameters(0) for chain in ordered)
    nearest, slack = 0, None
    if budget <= least or not free:
        steps = [[len(chain.factors) - 1] * len(chain.groups) for chain in ordered]
        nearest = abs(least - budget)
    elif budget >= most:
        steps = [[0] * len(chain.groups) for chain in ordered]
        nearest = budget - most
    else:
        steps, nearest, slack = _solve(ordered, budget - fixed, budget)
    factor_of = {
        group: chain.factors[step]
        for chain, chosen in zip(ordered, steps, strict=True)
        for group, step in zip(chain.groups, chosen, strict=True)
    }
    factors = tuple(factor_of.get(group, 1) for group in groups)
    return Plan(
        groups=tuple(groups),
        factors=factors,
        budget=budget,
        reached=sum(group.parameters(factor) for group, factor in zip(groups, factors, strict=True)),
        least=least,
        most=most,
        nearest=nearest,
        slack=slack,
    )


def factor_steps(dimensions: Sequence[int]) -> tuple[int, ...]:
    """The factors that make a difference for weights of these dimensions, ascending.

    A step splits every dimension at its largest divisor up to the factor and the dimension's square root. Factors
    that LyCORIS takes otherwise for one of them are left out: those above the root that divide the dimension (64 turns
    2432 into 38 x 64, but 76 into 32 x 76). From step to step no parts become smaller, so that the parameters fall.
    """
    found: list[int] = []
    last: tuple[int, ...] = ()
    distinct = sorted(set(dimensions))
    for factor in range(1, max(isqrt(dimension) for dimension in distinct) + 1):
        split = tuple(achieved_factor(dimension, factor) for dimension in distinct)
        if split != last and split == tuple(_largest_part(dimension, factor) for dimension in distinct):
            found.append(factor)
            last = split
    return tuple(found)


@dataclass(frozen=True)
class _Chain:
    """Groups of which each may have no smaller factor than the one before it. share: one per group."""

    groups: list[Group]
    factors: tuple[int, ...]
    share: list[float]

    def parameters(self, step: int) -> int:
        """Trainable numbers with all groups at this step."""
        return sum(group.parameters(self.factors[step]) for group in self.groups)


def _solve(chains: list[_Chain], budget: int, tolerated: int) -> tuple[list[list[int]], int, float | None]:
    """The steps per chain, the distance that is proved for the total, and the slack (see Plan).

    tolerated: the number that TOLERANCE is a fraction of.
    """
    lowest = budget - int(tolerated * TOLERANCE)
    table = _Table(chains, budget)
    best = table.best(lowest, budget)
    if best is not None:
        value = table.value(best)
        return best, 0, max(0.0, float(np.expm1(table.bound(lowest, budget) - value)))
    below = table.nearest(budget, lambda total: total <= budget)
    reach = budget - (0 if below is None else table.count(below))
    table = _Table(chains, budget + reach)
    found = table.nearest(budget, lambda total: True)
    assert found is not None, "the smallest assignment lies below the budget"
    if below is not None and abs(table.count(below) - budget) <= abs(table.count(found) - budget):
        found = below
    return found, min(table.proved_distance(budget), abs(table.count(found) - budget)), None


class _Table:
    """The best value for every total up to `limit`, and the way to it.

    Totals are counted in units; the last cell holds those of up to `limit` and half a unit per group.
    """

    def __init__(self, chains: list[_Chain], limit: int) -> None:
        self.chains = chains
        groups = sum(len(chain.groups) for chain in chains)
        widest = max(len(chain.factors) for chain in chains)
        cells = min(max(_CELLS_OF_WORK // (groups * widest), _MIN_CELLS), _MAX_CELLS)
        self.unit = max(1, -(-limit // cells))
        self.rounding = 0 if self.unit == 1 else groups * self.unit / 2
        self.cells = int((limit + self.rounding) // self.unit) + 1
        self._step_type = np.min_scalar_type(widest)
        self._back: list[NDArray[np.integer]] = []
        ended = np.full(self.cells, -np.inf)
        ended[0] = 0.0
        self._last_step = np.zeros(self.cells, dtype=self._step_type)
        for chain in chains:
            ended = self._add_chain(chain, ended)
        self.ended = ended

    def _add_chain(self, chain: _Chain, ended: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = len(chain.factors)
        values: list[NDArray[np.float64]] = []
        for place, (group, share) in enumerate(zip(chain.groups, chain.share, strict=True)):
            came_from = np.zeros((steps, self.cells), dtype=self._step_type)
            now = []
            best = ended if place == 0 else values[0]
            source = self._last_step if place == 0 else np.zeros(self.cells, dtype=self._step_type)
            for step, factor in enumerate(chain.factors):
                if place and step:
                    better = values[step] > best
                    best = np.where(better, values[step], best)
                    source = np.where(better, self._step_type.type(step), source)
                parameters = group.parameters(factor)
                shift = int(parameters / self.unit + 0.5)
                value = np.full(self.cells, -np.inf)
                if shift < self.cells:
                    value[shift:] = best[: self.cells - shift] + share * log(parameters)
                    came_from[step, shift:] = source[: self.cells - shift]
                now.append(value)
            values = now
            self._back.append(came_from)
        best, source = values[0], np.zeros(self.cells, dtype=self._step_type)
        for step in range(1, steps):
            better = values[step] > best
            best = np.where(better, values[step], best)
            source = np.where(better, self._step_type.type(step), source)
        self._last_step = source
        return best

    def best(self, lowest: int, highest: int) -> list[list[int]] | None:
        """The most valuable assignment whose exact total lies in the range, among the first that are tried."""
        cells = self._cells_of(lowest, highest)
        for cell in cells[np.argsort(-self.ended[cells], kind="stable")][:_TRIES].tolist():
            found = self._steps_to(cell)
            if lowest <= self.count(found) <= highest:
                return found
        return None

    def bound(self, lowest: int, highest: int) -> float:
        """No assignment whose exact total lies in the range is more valuable."""
        return float(self.ended[self._cells_of(lowest, highest)].max())

    def nearest(self, total: int, allowed: Callable[[int], bool]) -> list[list[int]] | None:
        """The assignment whose exact total is nearest to `total`, among the first that are tried and allowed."""
        cells = np.flatnonzero(np.isfinite(self.ended))
        order = np.argsort(np.abs(cells * self.unit - total), kind="stable")[:_TRIES]
        found = [self._steps_to(cell) for cell in cells[order].tolist()]
        found = [steps for steps in found if allowed(self.count(steps))]
        return min(found, key=lambda steps: abs(self.count(steps) - total), default=None)

    def proved_distance(self, total: int) -> int:
        """No assignment has an exact total nearer to `total` than this."""
        cells = np.flatnonzero(np.isfinite(self.ended))
        return max(0, int(np.abs(cells * self.unit - total).min() - self.rounding))

    def count(self, steps: list[list[int]]) -> int:
        """The exact total of an assignment."""
        return sum(
            group.parameters(chain.factors[step])
            for chain, chosen in zip(self.chains, steps, strict=True)
            for group, step in zip(chain.groups, chosen, strict=True)
        )

    def value(self, steps: list[list[int]]) -> float:
        """The sum of share * log(parameters) of an assignment."""
        return sum(
            share * log(group.parameters(chain.factors[step]))
            for chain, chosen in zip(self.chains, steps, strict=True)
            for group, share, step in zip(chain.groups, chain.share, chosen, strict=True)
        )

    def _cells_of(self, lowest: int, highest: int) -> NDArray[np.intp]:
        """The cells that can hold an assignment whose exact total lies in the range."""
        cells = np.flatnonzero(np.isfinite(self.ended))
        totals = cells * self.unit
        return cells[(totals >= lowest - self.rounding) & (totals <= highest + self.rounding)]

    def _steps_to(self, cell: int) -> list[list[int]]:
        """The steps of every chain on the best way to a cell."""
        step = int(self._last_step[cell])
        place = len(self._back)
        steps: list[list[int]] = []
        for chain in reversed(self.chains):
            chosen = []
            for group in reversed(chain.groups):
                place -= 1
                chosen.append(step)
                came_from = int(self._back[place][step, cell])
                cell -= int(group.parameters(chain.factors[step]) / self.unit + 0.5)
                step = came_from
            steps.append(chosen[::-1])
        return steps[::-1]


def _check(
    budget: int,
    direction: str,
    ratios: Mapping[str, float],
    contrast: float,
    min_factor: int,
    max_factor: int | None,
) -> None:
    if budget < 1:
        raise ProbeError(f"the budget is {budget} parameters; expected 1 or more")
    if direction not in DIRECTIONS:
        raise ProbeError(f"the direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    for kind in KINDS:
        if not 0 < ratios[kind] < float("inf"):
            raise ProbeError(f"the ratio of {kind} is {ratios[kind]}; expected a number above 0")
    if not 1 <= contrast < float("inf"):
        raise ProbeError(f"the contrast is {contrast}; expected a number, 1 or more")
    if min_factor < 1 or (max_factor is not None and max_factor < min_factor):
        raise ProbeError(
            f"factors from {min_factor} to {max_factor} are asked for; expected whole numbers, the smallest 1 or more "
            "and not above the largest"
        )


def _steps(
    chain: tuple[str, str, str], groups: Sequence[Group], min_factor: int, max_factor: int | None
) -> tuple[int, ...]:
    """The steps of a chain within the limits."""
    steps = factor_steps([size for group in groups for module in group.modules for size in module.shape[:2]])
    within = tuple(step for step in steps if min_factor <= step and (max_factor is None or step <= max_factor))
    if not within:
        raise ProbeError(
            f"no factor from {min_factor} to {'any' if max_factor is None else max_factor} makes a difference for the "
            f"{chain[1]} of {chain[0]}; those that do: {', '.join(map(str, steps))}"
        )
    return within


def _lack(group: Group, value_L_by_stream: Mapping[str, NDArray[np.float64]], direction: str) -> Fraction:
    """How far a group is from the most capacity, 0 .. 1, exactly: 1 - contribution, or the contribution itself."""
    if direction == "uniform":
        return Fraction(0)
    value = float(value_L_by_stream[group.stream][group.number])
    if not 0 <= value <= 1:
        raise ProbeError(f"the contribution of block {group.number} is {value}; expected 0 to 1")
    return 1 - Fraction(value) if direction == DIRECTIONS[0] else Fraction(value)


def _kind(name: str, target: Target) -> str:
    """The kind of a module by its name inside the block, "" if the target leaves it out."""
    for pattern in target.at_factor:
        if fnmatchcase(name, pattern):
            return MODULATION if _MODULATION_WORDS.search(pattern) else FEED_FORWARD
    return ATTENTION if any(fnmatchcase(name, pattern) for pattern in target.at_double) else ""


def _streams_of(block: str, names: Sequence[str], streams: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    """Whose contributions each module of a block goes by, by the module's name inside the block."""
    if streams is None:
        return dict.fromkeys(names, JOINT)
    said = {name: _named_stream(name, streams) for name in names}
    if any(stream != "image" for stream in said.values()):
        return said
    updated = [stream for stream, blocks in streams.items() if block in blocks]
    return dict.fromkeys(names, updated[0] if len(updated) == 1 else JOINT)


def _named_stream(name: str, streams: Mapping[str, Sequence[str]]) -> str:
    """The stream that a module's name tells of, the innermost part first; "image" if none does."""
    for part in reversed(name.split(".")):
        words = set(part.lower().split("_"))
        words |= {word.rstrip("0123456789") for word in words}
        told = [stream for stream, known in _STREAM_WORDS.items() if stream in streams and words & known]
        if words & _IMAGE_WORDS:
            if not told:
                return "image"
        elif told:
            return told[0]
    return "image"


def _largest_part(dimension: int, factor: int) -> int:
    """The largest divisor of a dimension up to the factor and the square root."""
    return next(part for part in range(min(factor, isqrt(dimension)), 0, -1) if dimension % part == 0)
