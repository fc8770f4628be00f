"""Decisions: the factors or ranks that a recipe gives to many sets of heatmaps at once, for analyse/confidence.py.

Compared is what trains. LyCORIS takes some factors alike (11 and 12 both split 2432 into 8 x 304), and a rank stops at
what a weight can use: where that is the same for all modules that share the number, it counts as the same number.

Shape letters: R replicates, L blocks, K numbers decided, G groups of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Decide, article_decision, interval
from simpletuner_layerprobe.analyse.contribution import article_values, stream_values
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.config import article_plan
from simpletuner_layerprobe.lokr.factors import ARTICLE_MAX_FACTOR, achieved_factor, article_factors
from simpletuner_layerprobe.lokr.plan import JOINT, Planner, module_groups
from simpletuner_layerprobe.lokr.ranks import Ladder, rank_limits, ranks_from_factors
from simpletuner_layerprobe.probe.families import FAMILIES, Target, family
from simpletuner_layerprobe.run.manifest import Manifest, Module

REPLICATES = 200
"""So many replicates judge a plan: each is a plan of its own."""


def article(
    bootstrap: Bootstrap,
    modules: Sequence[Module],
    targets: Sequence[Target],
    *,
    max_factor: int = ARTICLE_MAX_FACTOR,
    critical: tuple[int, ...] | None = None,
    **weighting: float,
) -> Decide:
    """The article's factors, one per block; compared by name where there is no module table.

    critical, weighting: as `article_decision` takes them.
    """
    return article_decision(
        bootstrap.blocks,
        bootstrap.count_T,
        lambda value_N: article_factors(value_N, max_factor=max_factor),
        critical=critical,
        alike=realised_alike(bootstrap, modules, targets) if modules else None,
        **weighting,
    )


def article_ranks(
    bootstrap: Bootstrap,
    algo: str,
    blocks: Sequence[str],
    modules: Sequence[Module],
    targets: Sequence[Target],
    *,
    largest: int,
    kept: Sequence[int],
    max_factor: int = ARTICLE_MAX_FACTOR,
    critical: tuple[int, ...] | None = None,
    **weighting: float,
) -> Decide:
    """The ranks of the article's factors: two per block that is kept, at_factor and at_double, block by block.

    blocks: all. kept: numbers of those that are not frozen.
    """
    limit_L2 = rank_limits(algo, [blocks[number] for number in kept], targets, modules)

    def alike(factor_RL: NDArray[np.int64]) -> NDArray[np.int64]:
        kept_RL = factor_RL[:, list(kept)]
        rank_RL2 = ranks_from_factors(kept_RL.ravel(), largest).reshape(*kept_RL.shape, 2)
        return np.minimum(rank_RL2, limit_L2).reshape(len(factor_RL), -1)

    return article_decision(
        bootstrap.blocks,
        bootstrap.count_T,
        lambda value_N: article_factors(value_N, max_factor=max_factor),
        critical=critical,
        alike=alike,
        **weighting,
    )


def budgeted_ranks(
    bootstrap: Bootstrap,
    ladder: Ladder,
    factors: Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    kept: Sequence[int],
    **weighting: float,
) -> Decide:
    """The ranks for a budget, as `article_ranks` orders them.

    factors: (R, L) contributions of the kept blocks -> (R, L) factors and (R, L) contributions in the direction asked.
    """

    def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        value_RL = article_values(mean_RTL, bootstrap.blocks, **weighting)
        rank_RL2 = ladder.ranks(*factors(value_RL[:, list(kept)]))
        return value_RL, np.minimum(rank_RL2, ladder.limit_L2).reshape(len(value_RL), -1)

    return decide


def planned(bootstrap: Bootstrap, planner: Planner, *, per_stream: bool = False, **weighting: float) -> Decide:
    """The planner's factors, one per group, each replicate planned as the run itself is.

    per_stream: groups go by the contributions of their streams.
    """
    alike = [
        _first_alike(tuple(sorted({(size, 1) for module in group.modules for size in module.shape[:2]})))
        for group in planner.groups
    ]

    def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        value_RL = article_values(mean_RTL, bootstrap.blocks, **weighting)
        values = {JOINT: value_RL}
        if per_stream:
            values |= stream_values(mean_RTL, bootstrap.blocks, weighting.get("clip_percentile", 90.0))
        factor_RG = planner.factors(values)
        return value_RL, np.stack(
            [table[np.minimum(factor_R, len(table) - 1)] for table, factor_R in zip(alike, factor_RG.T, strict=True)],
            axis=1,
        )

    return decide


def stream_intervals(
    bootstrap: Bootstrap, streams: Iterable[str], clip_percentile: float
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """stream -> the interval of each stream's contributions by itself, (L,) low and (L,) high."""
    found = stream_values(bootstrap.replicates(), bootstrap.blocks, clip_percentile)
    return {name: interval(found[name]) for name in streams if name in found}


def of_preset(manifest: Manifest, parameters: int | None) -> Callable[[Bootstrap], Decide]:
    """What the preset decides with its defaults: a plan of so many parameters, or the article's recipe for None.

    The article's factors are compared by name where the family's modules are not known. Raises ProbeError where a plan
    is asked for and there is no module table, or no such family.
    """
    known = any(one.name == manifest.family for one in FAMILIES)
    if parameters is None and not known:
        return lambda bootstrap: article(bootstrap, (), ())
    if not manifest.modules and parameters is not None:
        raise ProbeError("the run has no module table (imported without --model), so nothing can be planned for it")
    targets = family(manifest.family, manifest.model_class).targets

    def decide_of(bootstrap: Bootstrap) -> Decide:
        if parameters is None:
            return article(bootstrap, manifest.modules, targets)
        return planned(bootstrap, Planner(module_groups(bootstrap.names, targets, manifest.modules), parameters))

    return decide_of


def realised_alike(
    bootstrap: Bootstrap, modules: Sequence[Module], targets: Sequence[Target]
) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """(R, L) factors -> (R, L), per block the smallest factor that all of its modules realise alike."""
    names = bootstrap.names
    dimensions: dict[str, set[tuple[int, int]]] = {name: set() for name in names}
    # With factor 1 for every block, the factor of a module is the multiple that its level gives it.
    for one in article_plan(names, [1] * len(names), targets, modules):
        parts = one.name.split(".")
        block = next(path for count in range(len(parts) - 1, 0, -1) if (path := ".".join(parts[:count])) in dimensions)
        dimensions[block] |= {(size, one.factor) for size in one.shape[:2]}
    tables = [_first_alike(tuple(sorted(dimensions[name]))) for name in names]

    def alike(factor_RL: NDArray[np.int64]) -> NDArray[np.int64]:
        columns = [
            table[np.minimum(factor_R, len(table) - 1)] for table, factor_R in zip(tables, factor_RL.T, strict=True)
        ]
        return np.stack(columns, axis=1)

    return alike


@cache
def _first_alike(dimensions: tuple[tuple[int, int], ...]) -> NDArray[np.int64]:
    """For every factor the smallest one that splits all of these alike; (size, multiple of the factor) each.

    Place 0 is unused; the last place stands for all factors from there on, which divide nothing.
    """
    largest = max(size for size, _ in dimensions) + 1
    first: dict[tuple[int, ...], int] = {}
    table = np.zeros(largest + 1, dtype=np.int64)
    for factor in range(1, largest + 1):
        split = tuple(achieved_factor(size, factor * multiple) for size, multiple in dimensions)
        table[factor] = first.setdefault(split, factor)
    return table
