"""A plan: the factor or rank of every module, from the contributions of a run; the article's recipe is one.

`make_plan` gives the plan, `decide_of` what it decides for many heatmaps at once (bootstrap replicates), so that one
recipe with one set of options answers both what the factors are and whether they are settled.

Shape letters: R replicates, L blocks, G groups, K numbers that are decided.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.contribution import Contribution, article_values, critical_of, stream_values
from simpletuner_layerprobe.analyse.settled import Decide, article_decide
from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import json_bytes, write_files
from simpletuner_layerprobe.lokr import lora
from simpletuner_layerprobe.lokr.adapter import ALGORITHMS, LOKR, LORA, Adapter, article_number
from simpletuner_layerprobe.lokr.amounts import ARTICLE, preset_parameters
from simpletuner_layerprobe.lokr.budget import MORE, Budget
from simpletuner_layerprobe.lokr.check import Check
from simpletuner_layerprobe.lokr.config import LYCORIS_CONFIG_NAME, lycoris_config
from simpletuner_layerprobe.lokr.factors import ARTICLE_CONTRAST, article_factors, checked_blocks
from simpletuner_layerprobe.lokr.groups import JOINT, RATIOS, Group, Model, module_groups
from simpletuner_layerprobe.lokr.own import Own
from simpletuner_layerprobe.lokr.proof import verify
from simpletuner_layerprobe.lokr.size import TrainingMemory, training_memory

AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """What a plan is asked for. Building one checks it and raises ConfigError.

    preset: "article" for its recipe, or the trainable parameters: a number, "400M", "800MB" in bf16.
    critical: numbers of the blocks that get factor 1; "auto" looks for them (`critical_blocks`), and raises outside the
    article's recipe the modules of the stream alone in which a block is critical; None is "auto" in the recipe, and
    nothing with a number of parameters.
    direction, per_stream: with a number of parameters only; see budget.py, and `module_groups` for streams.
    contrast: the factor of the block that contributes least, where the one that contributes most has 1; with a number
    of parameters their relation, at most MAX_CONTRAST.
    freeze: numbers of the blocks that get nothing.
    algo: one of ALGORITHMS. rank: of factor 1 in the article's recipe, for the algorithms with ranks.
    weighting: how contributions are made of heatmaps, as `article_values` takes it; `make_plan` has them already.
    """

    preset: str | int = ARTICLE
    critical: str | tuple[int, ...] | None = None
    direction: str = MORE
    per_stream: bool = False
    contrast: float = ARTICLE_CONTRAST
    freeze: tuple[int, ...] = ()
    algo: str = LOKR
    rank: int | None = None
    weighting: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.algo not in ALGORITHMS:
            raise ConfigError(f"the algorithm is {self.algo!r}; expected one of {', '.join(ALGORITHMS)}")
        if isinstance(self.critical, str) and self.critical != AUTO:
            raise ConfigError(f"the critical blocks are {self.critical!r}; expected auto, or block numbers")
        if self.parameters is None and (self.per_stream or self.direction != MORE):
            raise ConfigError("a direction, and plans per stream, need a number of parameters")
        if self.rank is not None and (self.algo == LOKR or self.parameters is not None):
            raise ConfigError("a rank is for loha, locon and lora without a number of parameters")

    @property
    def parameters(self) -> int | None:
        """The trainable parameters asked for, None for the article's recipe."""
        return preset_parameters(self.preset)

    def groups(self, model: Model, blocks: Sequence[str], streams: Mapping[str, Sequence[str]]) -> tuple[Group, ...]:
        """The groups of modules that share a number. streams: what contributions were measured of -> its blocks.

        Raises ConfigError as `module_groups` does, and with per_stream if no stream was measured by itself.
        """
        if self.per_stream and not any(stream.name in streams for stream in model.streams):
            raise ConfigError(
                "leaving out whole blocks says nothing of their streams; plans per stream go by the angle"
            )
        freeze = checked_blocks(self.freeze, len(blocks), "frozen block")
        if isinstance(self.critical, tuple):
            checked_blocks(self.critical, len(blocks), "critical block")
            both = sorted({*freeze} & {*self.critical})
            if both:
                raise ConfigError(f"block {both[0]} is frozen and critical; it can be one of them")
        return module_groups(
            model,
            blocks,
            streams=streams if self.per_stream or self._parted(model, streams) else None,
            freeze=freeze,
            kinds=("linear",) if self.algo == LORA else ("linear", "conv"),
        )

    def _parted(self, model: Model, streams: Mapping[str, Sequence[str]]) -> bool:
        """Whether critical blocks are looked for by stream, and streams were measured."""
        by_stream = self.critical == AUTO and self.parameters is not None
        return by_stream and any(stream.name in streams for stream in model.streams)

    def _full(self, groups: Sequence[Group], critical: Mapping[str, Sequence[int]]) -> list[int]:
        """The places of the groups that get factor 1, by the critical blocks of each stream."""
        if isinstance(self.critical, tuple) or self.critical is None:
            return [place for place, group in enumerate(groups) if group.number in (self.critical or ())]
        anywhere = sorted({number for numbers in critical.values() for number in numbers})
        return [place for place, group in enumerate(groups) if group.number in critical.get(group.stream, anywhere)]

    def article_number(self, group: Group, factor: int) -> int:
        """What a group gets in the article's recipe where its block has this factor."""
        return article_number(self.algo, factor * RATIOS[group.kind], self.rank)

    def budget(self, groups: Sequence[Group], parameters: int, critical: Mapping[str, Sequence[int]]) -> Budget:
        """The planner for a number of parameters. critical: per stream, the numbers of its critical blocks."""
        return Budget(
            groups,
            parameters,
            algo=self.algo,
            direction=self.direction,
            contrast=self.contrast,
            full=self._full(groups, critical),
        )


@dataclass(frozen=True)
class Plan:
    """A factor (with loha, locon and lora a rank) for every group of modules.

    blocks: all, in the model's order. groups, numbers: one factor or rank per group; frozen blocks have no group.
    block_factors: the article's factor of every block, () with a budget. budget: the parameters asked for, None in the
    article's recipe; direction: how it is split, "" in that; least, most: what the smallest and the largest plan of the
    kind have. bound: what is proved, in words, "" without a budget. differing: places of the groups that get another
    number from the method that judges replicates, which is as good (budget.py). own: what the run's own config trains,
    None without a run. check: what LyCORIS or PEFT builds, once it is verified.
    """

    model: Model = field(repr=False)
    algo: str
    blocks: tuple[str, ...]
    groups: tuple[Group, ...]
    numbers: tuple[int, ...]
    block_factors: tuple[int, ...] = ()
    budget: int | None = None
    least: int | None = None
    most: int | None = None
    bound: str = ""
    slack: float | None = None
    direction: str = ""
    differing: tuple[int, ...] = ()
    own: Own | None = field(default=None, repr=False, compare=False)
    check: Check | None = field(default=None, repr=False)

    @property
    def word(self) -> str:
        """What a number is: "factor" or "rank"."""
        return "factor" if self.algo == LOKR else "rank"

    @cached_property
    def intended(self) -> dict[str, Adapter]:
        """What every module is meant to get, worked out without LyCORIS."""
        return {
            module.name: adapter
            for group, number in zip(self.groups, self.numbers, strict=True)
            for module, adapter in zip(group.modules, group.adapters(self.algo, number), strict=True)
        }

    @cached_property
    def parameters(self) -> int:
        """Trainable numbers, exactly counted."""
        return sum(map(self.block_parameters, range(len(self.blocks))))

    @property
    def gap(self) -> int:
        """Trainable parameters above (or, if negative, below) the budget; 0 without one."""
        return 0 if self.budget is None else self.parameters - self.budget

    def block_parameters(self, number: int) -> int:
        """Trainable numbers in one block."""
        return sum(
            group.parameters(self.algo, given)
            for group, given in zip(self.groups, self.numbers, strict=True)
            if group.number == number
        )

    @property
    def times(self) -> float | None:
        """How many times what the run's own config trains; None if that is not known."""
        known = None if self.own is None else self.own.known_parameters
        return None if known is None else self.parameters / known

    @property
    def memory(self) -> TrainingMemory | None:
        """What training it with the run's own optimizer and precision holds; None where these are not known."""
        if self.own is None or not self.own.training:
            return None
        return training_memory(self.parameters, self.own.training)

    def heaviest(self, most: int = 3) -> tuple[int, ...]:
        """The numbers, ascending, of up to `most` blocks: the largest that have over twice an equal share each."""
        sizes = {number: self.block_parameters(number) for number in range(len(self.blocks))}
        heavy = sorted(sizes, key=lambda number: -sizes[number])[:most]
        return tuple(sorted(number for number in heavy if sizes[number] * len(sizes) > 2 * self.parameters))

    def config(self) -> dict[str, Any]:
        """The LyCORIS config. Raises ConfigError for PEFT's lora, which has none."""
        return lycoris_config(self.algo, self.groups, self.numbers, self.model.targets)

    def verify(self) -> Plan:
        """The same plan with its `check`. Raises ConfigError, naming the first difference, if LyCORIS (or PEFT) builds
        anything else than what is meant."""
        if self.algo == LORA:
            check = lora.verify_lora(self.intended, self.model)
        else:
            check = verify(self.config(), self.intended, self.model)
        check.require()
        return replace(self, check=check)

    def write(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the LyCORIS config, complete or not at all. Raises ConfigError if the file exists, unless `force`,
        and where nothing is ever written (docs/run-folder.md)."""
        write_files({Path(path): json_bytes(self.config())}, force=force)

    def files(self) -> dict[str, bytes]:
        """The files of a SimpleTuner environment that trains the plan, beside its options: name -> content."""
        if self.algo == LORA:
            return lora.files(self.intended, self.model.model_class)
        return {LYCORIS_CONFIG_NAME: json_bytes(self.config())}

    def options(self, folder: str) -> dict[str, Any]:
        """SimpleTuner's options that train the plan, whose files lie in `folder` (a POSIX path); None: left out."""
        if self.algo == LORA:
            return lora.options(self.intended, folder)
        return {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": f"{folder}/{LYCORIS_CONFIG_NAME}"}


def make_plan(
    model: Model,
    contribution: Contribution,
    *,
    streams: Mapping[str, NDArray[np.float64]] | None = None,
    **options: Any,
) -> Plan:
    """The plan for the contributions of a run. The same input gives the same plan.

    model: the run's manifest, or an architecture. streams: with per_stream, each stream's contributions by itself, (L,)
    for all blocks of `contribution`, as `stream_contributions` gives them. options: see `Recipe`. Raises ConfigError
    for options that do not fit, or a model without a module table.
    """
    recipe = Recipe(**options)
    if recipe.per_stream and not streams:
        raise ConfigError("a plan per stream needs the contributions of each stream")
    streams = streams if recipe.per_stream and streams else {}
    known = streams if recipe.per_stream else contribution.critical
    blocks_of = {stream.name: stream.blocks for stream in model.streams if stream.name in known}
    groups = recipe.groups(model, contribution.blocks, blocks_of)
    plan = partial(Plan, model=model, algo=recipe.algo, blocks=contribution.blocks, groups=groups)
    parameters = recipe.parameters
    if parameters is None:
        critical = recipe.critical if isinstance(recipe.critical, tuple) else contribution.critical_union()
        factor_L = article_factors(contribution.value_L, contrast=recipe.contrast, critical=critical).tolist()
        numbers = tuple(recipe.article_number(group, factor_L[group.number]) for group in groups)
        return plan(numbers=numbers, block_factors=tuple(factor_L))
    budget = recipe.budget(groups, parameters, contribution.critical)
    allotment = budget.plan(_by_group(groups, contribution.value_L) | dict(streams))
    made = plan(
        numbers=allotment.numbers,
        budget=parameters,
        least=budget.least,
        most=budget.most,
        slack=allotment.slack,
        direction=recipe.direction,
        differing=allotment.differing,
    )
    return replace(made, bound=budget.bound(allotment, made.parameters))


def decide_of(model: Model, **options: Any) -> Callable[[Bootstrap], Decide]:
    """What `make_plan` decides with the same options, for many heatmaps at once: see analyse/settled.py.

    Numbers that train alike are given as one. The article's factors are compared by name where there is no module
    table. Raises ConfigError as `make_plan` does, in part when it is called with a bootstrap.
    """
    recipe = Recipe(**options)

    def of(bootstrap: Bootstrap) -> Decide:
        parameters = recipe.parameters
        groups = recipe.groups(model, bootstrap.names, bootstrap.blocks) if model.modules or parameters else ()
        if parameters is None:
            return article_decide(
                bootstrap,
                lambda value_N: article_factors(value_N, contrast=recipe.contrast),
                critical=checked_blocks(recipe.critical, len(bootstrap.names), "critical block")
                if isinstance(recipe.critical, tuple)
                else None,
                alike=_article_alike(recipe, groups) if groups else None,
                **recipe.weighting,
            )
        critical = critical_of(bootstrap.mean_TL, bootstrap.counts_T, bootstrap.blocks)
        budget = recipe.budget(groups, parameters, critical)

        def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
            value_RL = article_values(mean_RTL, bootstrap.blocks, by_own=True, **recipe.weighting)
            values = _by_group(groups, value_RL)
            if recipe.per_stream:
                clip = {name: recipe.weighting[name] for name in ("clip_percentile",) if name in recipe.weighting}
                values |= stream_values(mean_RTL, bootstrap.blocks, **clip)
            return value_RL, budget.numbers(values)

        return decide

    return of


def _by_group(groups: Sequence[Group], value_L: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The joint contributions for all that groups go by: they count where no stream's own are asked for."""
    return dict.fromkeys((JOINT, *(group.stream for group in groups)), value_L)


def _article_alike(recipe: Recipe, groups: Sequence[Group]) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """(R, L) factors -> (R, K), per block the smallest factor with which all of its modules train alike."""
    factors = range(1, max(1, round(recipe.contrast)) + 1)
    kept = tuple(dict.fromkeys(group.number for group in groups))  # not frozen
    first: list[NDArray[np.int64]] = []
    for number in kept:
        alike_by_group = [
            group.first_alike(recipe.algo, [recipe.article_number(group, factor) for factor in factors]).tolist()
            for group in groups
            if group.number == number
        ]
        trained = list(zip(*alike_by_group, strict=True))
        first.append(np.array([0, *(1 + trained.index(each) for each in trained)]))

    def alike(factor_RL: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([first_F[factor_RL[:, number]] for number, first_F in zip(kept, first, strict=True)], axis=1)

    return alike
