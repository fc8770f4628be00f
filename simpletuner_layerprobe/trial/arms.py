"""The arms of a trial: plans of one run with equally many parameters, each proved by LyCORIS.

uniform          equal factors: what the others are compared with
uniform-110      the same with 10% more parameters: what a difference is worth
plan, inverse    more for the blocks that turn the hidden states more; turned around
ablation         more for the blocks that the loss needs more
article          the article's line from contribution to factor, with its critical blocks at the top
shuffle-1 ...    the plan's factors handed to other blocks of the same shape: the same sizes, without what was measured
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from simpletuner_layerprobe.api.plans import plan
from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.budget import LESS, MORE, UNIFORM

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.lokr.groups import Group
    from simpletuner_layerprobe.lokr.plan import Plan

REFERENCE, LARGER, PLAN = "uniform", "uniform-110", "plan"
NAMES = (REFERENCE, LARGER, PLAN, "inverse", "ablation", "article")
SHUFFLE = "shuffle"
MORE_PARAMETERS = 1.1
TOLERANCE = 0.001
MOST_SHUFFLES = 99
TRIES = 1000


@dataclass(frozen=True)
class Arm:
    """plan: verified. note: what the name does not say."""

    name: str
    plan: Plan
    note: str = ""


def arm_names(text: str) -> tuple[str, ...]:
    """ "plan,shuffle:2" -> ("uniform", "uniform-110", "plan", "shuffle-1", "shuffle-2"), the first two always.

    Raises ConfigError for a name that is none.
    """
    asked, shuffles = [REFERENCE, LARGER], 0
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(rf"{SHUFFLE}(?::([1-9]\d?))?", part, re.ASCII)
        if match:
            shuffles = int(match[1] or 1)
        elif part in NAMES:
            asked.append(part)
        else:
            raise ConfigError(
                f"there is no arm {part!r}; expected some of {', '.join(NAMES)}, and {SHUFFLE}:N with N up to "
                f"{MOST_SHUFFLES}"
            )
    if shuffles:
        asked.append(PLAN)
    return (*dict.fromkeys(asked), *(f"{SHUFFLE}-{number + 1}" for number in range(shuffles)))


def is_shuffle(name: str) -> bool:
    return name.startswith(f"{SHUFFLE}-")


def make_arms(run: Run, names: Sequence[str], parameters: int, contrast: float) -> tuple[Arm, ...]:
    """The arms of these names, verified, each within 0.1% of its number of parameters. contrast: of all but `article`.

    Raises ConfigError, naming the arm, where the factors of LyCORIS do not allow that.
    """
    made: dict[str, Arm] = {}
    for name in names:
        if not is_shuffle(name):
            made[name] = _checked(name, _plan(run, name, parameters, contrast), parameters)
    shuffles = sum(map(is_shuffle, names))
    if shuffles:
        for number, (shuffled, order) in enumerate(shuffled_plans(made[PLAN].plan, shuffles)):
            name = f"{SHUFFLE}-{number + 1}"
            made[name] = _checked(name, shuffled, parameters, f"factors of blocks {' '.join(map(str, order))}")
    return tuple(made[name] for name in names)


def _plan(run: Run, name: str, parameters: int, contrast: float) -> Plan:
    if name in (REFERENCE, LARGER):
        wanted = parameters if name == REFERENCE else round(parameters * MORE_PARAMETERS)
        return plan(run, params=wanted, direction=UNIFORM)
    if name == "article":
        return _article(run, parameters)
    if name == "ablation" and name not in run.readings:
        raise ConfigError(
            f"the arm 'ablation' goes by what the loss needs, and {run.path} was recorded without; record it with "
            "layerprobe_ablation: blocks, or leave the arm out"
        )
    return plan(
        run,
        reading="ablation" if name == "ablation" else None,
        params=parameters,
        direction=LESS if name == "inverse" else MORE,
        contrast=contrast,
    )


def _article(run: Run, parameters: int) -> Plan:
    """The article's recipe at another size: its critical blocks count as those that contribute most."""
    from simpletuner_layerprobe.lokr.plan import make_plan

    contribution = run.contribution()
    value_L = contribution.value_L.copy()
    value_L[list(contribution.critical_union())] = 1.0
    return make_plan(run.manifest, replace(contribution, value_L=value_L), preset=parameters)


def _checked(name: str, made: Plan, parameters: int, note: str = "") -> Arm:
    wanted = round(parameters * MORE_PARAMETERS) if name == LARGER else parameters
    if abs(made.parameters / wanted - 1) > TOLERANCE:
        span = f"; plans of its kind have {made.least:,} to {made.most:,}" if made.most else ""
        raise ConfigError(
            f"the arm {name!r} has {made.parameters:,} parameters at best, and {wanted:,} are asked for: arms are "
            f"compared at equal sizes, within 0.1%{span}. Choose another --params, or leave the arm out"
        )
    return Arm(name, made.verify(), note)


def shuffled_plans(of: Plan, count: int) -> list[tuple[Plan, list[int]]]:
    """`count` different plans with the factors of `of` permuted over blocks of equal shape, and their orders.

    The same plan gives the same shuffles. Raises ConfigError if there are not so many.
    """
    rng = np.random.default_rng(0)
    shapes = [_shape(of, number) for number in range(len(of.blocks))]
    alike = [[n for n, shape in enumerate(shapes) if shape == kind] for kind in dict.fromkeys(shapes)]
    number_of = {_place(group): number for group, number in zip(of.groups, of.numbers, strict=True)}
    made: dict[tuple[int, ...], list[int]] = {of.numbers: []}
    for _ in range(TRIES):
        if len(made) > count:
            break
        order = list(range(len(of.blocks)))
        for members in alike:
            for member, source in zip(members, rng.permutation(members).tolist(), strict=True):
                order[member] = source
        numbers = tuple(number_of[(order[group.number], *_place(group)[1:])] for group in of.groups)
        made.setdefault(numbers, order)
    if len(made) <= count:
        raise ConfigError(
            f"{count} shuffles are asked for, and there are {len(made) - 1}: too few blocks of equal shape have other "
            f"factors in the plan. Ask for fewer, or for a larger --contrast"
        )
    return [
        (replace(of, numbers=numbers, slack=None, bound="", differing=()), order)
        for numbers, order in list(made.items())[1:]
    ]


def _place(group: Group) -> tuple[int, str, str]:
    return group.number, group.kind, group.stream


def _shape(of: Plan, number: int) -> tuple[tuple[str, str, tuple[tuple[int, ...], ...]], ...]:
    """What a block is made of; equal for blocks that can take each other's factors."""
    return tuple(
        (group.kind, group.stream, tuple(module.shape for module in group.modules))
        for group in of.groups
        if group.number == number
    )
