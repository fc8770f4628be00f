"""Ways to split a budget that the product does not have: by kind, and module by module. Shape letters: G groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.lokr.adapter import LOKR, planned_adapter, steps
from simpletuner_layerprobe.lokr.allocation import Choices, solve, solve_many
from simpletuner_layerprobe.lokr.budget import TOLERANCE
from simpletuner_layerprobe.lokr.groups import RATIOS, Group


def split_by_weight(groups: Sequence[Group], budget: int, more: Callable[[Group], float]) -> tuple[int, ...]:
    """The planner's equal plan with the share of each group multiplied by more(group): a factor for every group."""
    chains = [list(members) for _, members in itertools.groupby(sorted(groups, key=_chain), key=_chain)]
    numbers = [steps(LOKR, [module.shape for group in chain for module in group.modules]) for chain in chains]
    choices = Choices.of(
        [
            np.array([[group.parameters(LOKR, number) for number in given] for group in chain])
            for chain, given in zip(chains, numbers, strict=True)
        ]
    )
    ordered = [group for chain in chains for group in chain]
    weight_G = np.array([more(group) * group.size / RATIOS[group.kind] ** 2 for group in ordered])
    share_1G = (weight_G / weight_G.sum())[None]
    order_1G = choices.order(np.ones((1, len(ordered))))
    known_1G, price_1 = solve_many(choices, share_1G, order_1G, budget)
    near = int(budget * TOLERANCE)
    bounds = (budget - near, budget + near)
    best = solve(choices, share_1G[0], order_1G[0], *bounds, known_1G[0], float(price_1[0]))
    step_G = known_1G[0] if best is None else best[0]
    of = [given for chain, given in zip(chains, numbers, strict=True) for _ in chain]
    number_of = {
        (group.block, group.kind, group.stream): given[step]
        for group, given, step in zip(ordered, of, step_G.tolist(), strict=True)
    }
    return tuple(int(number_of[group.block, group.kind, group.stream]) for group in groups)


def _chain(group: Group) -> tuple[str, str, str]:
    return group.chain


def split_by_energy(
    groups: Sequence[Group],
    budget: int,
    energy: Mapping[str, Mapping[str, float]],
    allowed: Callable[[Group, int], bool],
) -> tuple[int, ...]:
    """A factor for every one-module group, so that the sum of energy[module][factor] is largest under the budget.

    A choice per group with one sum to keep to, solved exactly by HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [
        (place, number)
        for place, group in enumerate(groups)
        for number in steps(LOKR, [group.modules[0].shape])
        if allowed(group, number)
    ]
    shapes = [groups[place].modules[0].shape for place, _ in options]
    parameters = np.array(
        [planned_adapter(LOKR, shape, number).parameters for shape, (_, number) in zip(shapes, options, strict=True)]
    )
    gain = np.array([energy[groups[place].modules[0].name][str(number)] for place, number in options])
    one: csr_array = csr_array(
        (np.ones(len(options)), ([place for place, _ in options], range(len(options)))),
        shape=(len(groups), len(options)),
    )
    near = budget * TOLERANCE
    solved = milp(
        -gain / gain.max(),
        constraints=[
            LinearConstraint(one, 1, 1),
            LinearConstraint(parameters[None] / budget, 1 - near / budget, 1 + near / budget),
        ],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 30},
    )
    if solved.x is None:
        raise ValueError("no choice of factors reaches the budget")
    chosen: NDArray[np.int64] = np.zeros(len(groups), dtype=np.int64)
    for (place, number), taken in zip(options, solved.x, strict=True):
        if taken > 0.5:
            chosen[place] = number
    return tuple(chosen.tolist())
