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
With steps it is the assignment whose split of the budget has the smallest Kullback-Leibler divergence from that one.

What is guaranteed. A total within the tolerance counts as reached: among the assignments there the contributions
decide, and another may lie nearer to the budget. If none lies there, the one whose total is nearest to the budget,
above or below, is taken, and of equally near ones the one of the largest sum. `Plan.bound` says which of both it is and
what is proved. allocation.py says how it is solved: by an exhaustive search where one ends soon, else by branch and
bound (on SD3.5 and Flux.1-dev, with contrasts from 12 to a million, the slack left was 0.002% or less).

Shape letters: R replicates, L blocks, G groups, S steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import ceil, isqrt, prod

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.allocation import Allocated, allocate
from simpletuner_layerprobe.lokr.config import Planned, layer_kind
from simpletuner_layerprobe.lokr.factors import ARTICLE_MAX_FACTOR, achieved_factor, lokr_parameters
from simpletuner_layerprobe.probe.families import Target, lies_at
from simpletuner_layerprobe.run.manifest import Module

FEED_FORWARD, ATTENTION, MODULATION = "feed-forward", "attention", "modulation"
KINDS = (FEED_FORWARD, ATTENTION, MODULATION)
ARTICLE_RATIOS = {FEED_FORWARD: 1.0, ATTENTION: 2.0, MODULATION: 1.0}
UNIFORM = "uniform"
DIRECTIONS = ("more-change-more-capacity", "more-change-less-capacity", UNIFORM)
JOINT = "joint"
"""The contributions of all streams combined: those of the modules that work on all of them at once."""

TOLERANCE = 0.001
"""A total that is no further below the budget than this fraction of it counts as reached."""

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
    the total lies within the tolerance, so that the contributions decide. slack: no assignment of the kind with a total
    of `budget` or less has a mean capacity (geometric, weighted by share) larger by more than this fraction; None where
    the total alone decides.
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
            if self.nearest == abs(self.gap):
                return "no assignment of this kind has a total nearer to the budget"
            return f"no assignment of this kind is nearer to the budget than {self.nearest:,} parameters"
        larger = f"a mean capacity (weighted by contribution) more than {ceil(self.slack * 1e4) / 1e4:.2%} larger"
        if not self.slack:
            larger = "a larger mean capacity (weighted by contribution)"
        return f"reached within {TOLERANCE:.1%}; no assignment of this kind that keeps to the budget has {larger}"


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
    """The factors that this module's docstring describes, for one set of contributions: see `Planner`."""
    planner = Planner(
        groups,
        budget,
        direction=direction,
        ratios=ratios,
        contrast=contrast,
        min_factor=min_factor,
        max_factor=max_factor,
        full=full,
    )
    return planner.plan(value_L_by_stream)


class Planner:
    """Plans of the same groups for the same budget; what does not depend on the contributions is worked out once.

    budget: trainable parameters, 1 or more. direction: more-change-less-capacity turns the contributions around,
    uniform takes them as equal; what the steps leave over is then spread over the depth. ratios: per kind, above 0.
    contrast: 1 or more. min_factor, max_factor: steps outside of them are not used. full: numbers of blocks that get
    factor 1, whatever the rest. Raises ProbeError for what is out of range, and if the limits leave a chain no step.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        budget: int,
        *,
        direction: str = DIRECTIONS[0],
        ratios: Mapping[str, float] = ARTICLE_RATIOS,
        contrast: float = ARTICLE_MAX_FACTOR,
        min_factor: int = 1,
        max_factor: int | None = None,
        full: Sequence[int] = (),
    ) -> None:
        _check(budget, direction, ratios, contrast, min_factor, max_factor)
        self.groups = tuple(groups)
        self.budget = budget
        self._direction = direction
        self._contrast = contrast
        chains: dict[tuple[str, str, str], list[int]] = {}
        for place, group in enumerate(self.groups):
            if group.number not in full:
                chains.setdefault(group.chain, []).append(place)
        self._places = [np.array(places) for places in chains.values()]
        self._steps = [
            np.array(_steps(chain, [self.groups[place] for place in places], min_factor, max_factor))
            for chain, places in chains.items()
        ]
        self._parameters = [
            np.array([[self.groups[place].parameters(step) for step in steps.tolist()] for place in places])
            for places, steps in zip(self._places, self._steps, strict=True)
        ]
        self._weight_G = np.array([group.size / ratios[group.kind] ** 2 for group in self.groups])
        self._fixed = sum(group.parameters(1) for group in self.groups if group.number in full)
        self._least = self._fixed + sum(int(parameters_GS[:, -1].sum()) for parameters_GS in self._parameters)
        self._most = self._fixed + sum(int(parameters_GS[:, 0].sum()) for parameters_GS in self._parameters)

    def plan(self, value_L_by_stream: Mapping[str, NDArray[np.float64]]) -> Plan:
        """The plan for one set of contributions. The same input gives the same plan.

        value_L_by_stream: for JOINT, and for every stream that a group goes by, (L,) contributions in [0, 1]; not
        needed where the direction is uniform. Raises ProbeError for a contribution that is out of range.
        """
        (found,) = self._allocated({name: value_L[None] for name, value_L in value_L_by_stream.items()}, 1)
        factors = tuple(self._factors(found).tolist())
        return Plan(
            groups=self.groups,
            factors=factors,
            budget=self.budget,
            reached=sum(group.parameters(factor) for group, factor in zip(self.groups, factors, strict=True)),
            least=self._least,
            most=self._most,
            nearest=found.nearest,
            slack=found.slack,
        )

    def factors(self, value_RL_by_stream: Mapping[str, NDArray[np.float64]]) -> NDArray[np.int64]:
        """(R, G) the factors of the plans for R sets of contributions, as `plan` gives each, much faster."""
        R = len(next(iter(value_RL_by_stream.values())))
        if self._direction == UNIFORM:  # no contribution counts
            (found,) = self._allocated(value_RL_by_stream, 1)
            return np.tile(self._factors(found), (R, 1))
        return np.array([self._factors(found) for found in self._allocated(value_RL_by_stream, R)])

    def _allocated(self, value_RL_by_stream: Mapping[str, NDArray[np.float64]], R: int) -> list[Allocated]:
        """What each set of contributions gives; steps per chain in the order of the groups."""
        if self.budget <= self._least or not self._places:
            last = [np.full(len(parameters_GS), parameters_GS.shape[1] - 1) for parameters_GS in self._parameters]
            return [Allocated(last, self._least, abs(self._least - self.budget), None, "list")] * R
        if self.budget >= self._most:
            first = [np.zeros(len(parameters_GS), dtype=np.int64) for parameters_GS in self._parameters]
            return [Allocated(first, self._most, self.budget - self._most, None, "list")] * R
        value_RG = self._values(value_RL_by_stream, R)
        more = self._direction != DIRECTIONS[1]
        wish_RG = 1 + (self._contrast - 1) * (1 - value_RG if more else value_RG)
        weight_RG = self._weight_G / wish_RG**2
        free_G = np.concatenate(self._places)
        share_RG = weight_RG / weight_RG[:, free_G].sum(axis=1, keepdims=True)
        order = [
            np.lexsort(
                (
                    np.broadcast_to(np.arange(len(places_G)) * _SPREAD % 2**32, (R, len(places_G))),
                    -value_RG[:, places_G] if more else value_RG[:, places_G],
                ),
                axis=1,
            )
            for places_G in self._places
        ]
        share = [share_RG[:, places_G] for places_G in self._places]
        highest = self.budget - self._fixed
        allocated = allocate(self._parameters, order, share, highest - int(self.budget * TOLERANCE), highest)
        return [
            replace(
                found, steps=[_unsorted(*pair) for pair in zip(found.steps, (one[r] for one in order), strict=True)]
            )
            for r, found in enumerate(allocated)
        ]

    def _values(self, value_RL_by_stream: Mapping[str, NDArray[np.float64]], R: int) -> NDArray[np.float64]:
        """(R, G) the contribution that each group goes by."""
        if self._direction == UNIFORM:
            return np.ones((R, len(self.groups)))
        value_RG = np.stack(
            [value_RL_by_stream[group.stream][:, group.number] for group in self.groups], axis=1, dtype=np.float64
        )
        outside_RG = ~((value_RG >= 0) & (value_RG <= 1))
        if outside_RG.any():
            r, g = np.argwhere(outside_RG)[0]
            raise ProbeError(f"the contribution of block {self.groups[g].number} is {value_RG[r, g]}; expected 0 to 1")
        return value_RG

    def _factors(self, found: Allocated) -> NDArray[np.int64]:
        """(G,) the factors of an allocation."""
        factor_G = np.ones(len(self.groups), dtype=np.int64)
        for places_G, steps_S, step_G in zip(self._places, self._steps, found.steps, strict=True):
            factor_G[places_G] = steps_S[step_G]
        return factor_G


def _unsorted(steps_G: NDArray[np.int64], order_G: NDArray[np.intp]) -> NDArray[np.int64]:
    """Steps along a chain, in the order of its groups."""
    found_G = np.empty_like(steps_G)
    found_G[order_G] = steps_G
    return found_G


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
