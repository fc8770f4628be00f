"""Plans and proofs: from a run, or from a model alone, to a config that does what it says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from simpletuner_layerprobe.api.options import PlanOptions, asked_of, sized
from simpletuner_layerprobe.api.run import Run
from simpletuner_layerprobe.errors import ConfigError, ModelError
from simpletuner_layerprobe.lokr.amounts import ARTICLE
from simpletuner_layerprobe.models import NAMED, Architecture, architecture
from simpletuner_layerprobe.readings import WHOLE, all_blocks, parse_reading

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.lokr.aims import Aim
    from simpletuner_layerprobe.lokr.check import Check
    from simpletuner_layerprobe.lokr.origin import Origin
    from simpletuner_layerprobe.lokr.plan import Plan
    from simpletuner_layerprobe.training.environment import Environment

__all__ = [
    "NAMED",
    "Architecture",
    "adapter_origin",
    "aims",
    "alike",
    "architecture",
    "check_config",
    "environment",
    "free_environment",
    "plan",
    "programs",
    "written_twice",
]

PathLike = str | os.PathLike[str]


def plan(
    run: Run | Architecture | PathLike,
    *,
    reading: str | None = None,
    bins: int = 10,
    **options: Unpack[PlanOptions],
) -> Plan:
    """A weighted LoKr (or LoHa, LoCon, LoRA) for a run's model; options: see PlanOptions.

    Without a size it has as many parameters as the run's own config trains. A budget gives equal factors unless it is
    asked to weigh the blocks: by a reading, a direction, a contrast or per stream. reading: what the contributions are
    of, `Run.plan_reading` unless "ablation" or another is named.
    run: with an `architecture`, or what names one, in its place all blocks count the same and a budget is needed. The
    plan's .numbers are a factor or rank for each of its .groups of modules, .parameters the trainable ones, .own what
    the run's own config trains; .verify() proves with LyCORIS that every module gets what is meant, .write(path) writes
    the config. Raises ConfigError for options that do not fit, without a module table, and where no size is given and
    that of the run's own config is not known.
    """
    from simpletuner_layerprobe.analyse.contribution import stream_contributions
    from simpletuner_layerprobe.lokr.plan import make_plan

    if not isinstance(run, Run):
        return _plan_alike(known_model(run), options)
    if reading in run.readings and parse_reading(reading).stream not in ("", WHOLE):
        raise ConfigError(
            f"{reading} is of the {parse_reading(reading).stream} stream alone; a plan is of whole blocks"
        )
    options = sized(options, lambda: run.plan_size)
    contribution = run.plan_contribution(reading, bins, **options)
    streams = None
    if options.get("per_stream"):
        clip = {name: value for name, value in options.get("weighting", {}).items() if name == "clip_percentile"}
        streams = stream_contributions(run.heatmaps(run.plan_reading(reading, **options), bins), **clip)
    asked = asked_of(options, ARTICLE, weighed=reading is not None)
    return replace(make_plan(run.manifest, contribution, streams=streams, **asked), own=run.own)


def _plan_alike(model: Architecture, options: PlanOptions) -> Plan:
    """A plan in which all blocks count the same."""
    from simpletuner_layerprobe.lokr.plan import Recipe, make_plan

    if options.get("direction", "uniform") != "uniform" or options.get("per_stream"):
        raise ConfigError("without a run no contributions are known: all blocks get the same, in no other direction")
    asked = asked_of({**options, "direction": None}, ARTICLE)  # type: ignore[typeddict-item]
    if Recipe(**asked).parameters is not None:
        asked["direction"] = "uniform"
    elif asked.get("rank") is None:
        raise ConfigError("a plan without a run needs a budget (params), or another algorithm than lokr and a rank")
    return make_plan(model, alike(model), **asked)


def alike(model: Architecture) -> Contribution:
    """The contributions of a model without a run: all the same."""
    import numpy as np

    from simpletuner_layerprobe.analyse.contribution import Contribution

    blocks = all_blocks([stream.blocks for stream in model.streams])
    return Contribution(blocks, np.ones(len(blocks)), np.ones(len(blocks), dtype=np.bool_), {})


def check_config(config: Mapping[str, Any] | PathLike, run: Run | Architecture | PathLike) -> Check:
    """What each module gets from a LyCORIS config, by LyCORIS itself, and was meant to get.

    config: the file, or what it holds. run: whose model it is, a run or an `architecture` or what names one. The
    check's .rows are the modules with what was intended and what they got, .wrong those where it differs; .require()
    raises ConfigError if there are any. Raises ConfigError for what LyCORIS or SimpleTuner refuse.
    """
    from simpletuner_layerprobe.lokr import proof

    return proof.check_config(config, run.manifest if isinstance(run, Run) else known_model(run))


def adapter_origin(file: PathLike, config: Mapping[str, Any] | PathLike, run: Run | Architecture | PathLike) -> Origin:
    """Whether an adapter file comes from a LyCORIS config: .fits, .missing, .strange, .different.

    run: whose model it is, as for `check_config`. Raises ConfigError for files that are none.
    """
    from simpletuner_layerprobe.lokr.origin import origin

    return origin(config, run.manifest if isinstance(run, Run) else known_model(run), file)


def aims(run: Run | Architecture | PathLike) -> tuple[tuple[Aim, ...], tuple[Aim, ...]]:
    """The class names, and the name patterns, that a LyCORIS config can aim at in a model; see lokr/aims.py.

    run: whose model it is, as for `check_config`. Raises ConfigError for a run without a module table.
    """
    from simpletuner_layerprobe.lokr import aims

    model = run.manifest if isinstance(run, Run) else known_model(run)
    if not model.modules:
        raise ConfigError("the run has no module table (it was imported without --model); name the model with --model")
    return aims.classes(model), aims.names(model)


def environment(name: str, run: Run, plan: Plan, *, force: bool = False, dry_run: bool = False) -> Environment:
    """Write the SimpleTuner environment config/NAME that trains a plan with the probe run's own options.

    The result's .written are the files. dry_run: write nothing. Raises ConfigError for a name that SimpleTuner does not
    find, for files that exist (unless `force`), and if the run's options are not known.
    """
    from simpletuner_layerprobe.training import environment

    return environment.environment(name, environment.read_options(run.path), plan, force=force, dry_run=dry_run)


def free_environment(name: str, *, force: bool = False) -> None:
    """Raises ConfigError if `environment` would not write config/NAME, whatever the plan."""
    from simpletuner_layerprobe.training import environment

    environment.free_environment(name, force=force)


def programs(run: Run) -> list[str]:
    """The options of a probe run that start a program: no environment takes them over."""
    from simpletuner_layerprobe.training import environment

    return environment.programs(environment.read_options(run.path))


def written_twice(file: PathLike) -> list[str]:
    """One line for each key that an object in a JSON file has more than once: all but the last are lost."""
    from simpletuner_layerprobe.lokr import proof

    return proof.written_twice(file)


def known_model(model: Architecture | PathLike) -> Architecture:
    """The architecture, also by its name. Raises ModelError for a model made by hand without blocks."""
    known = model if isinstance(model, Architecture) else architecture(model)
    if not known.streams:
        raise ModelError(f"{model} is a {known.model_class}; the layer probe does not know its blocks")
    return known
