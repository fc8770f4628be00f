"""What the options of `layerprobe lokr` ask for: which go together, the budget, the plan, the files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.imports import lycoris_for_proofs
from simpletuner_layerprobe.commands.output import quiet, warn
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.heatmap import Heatmap
    from simpletuner_layerprobe.lokr.plan import Planner
    from simpletuner_layerprobe.run.manifest import Manifest, Module

ARTICLE_MAX_FACTOR = 12
BUDGET_OPTIONS = ("params", "size", "like")
PLANNER_OPTIONS = (
    "direction",
    "per_stream",
    "ratio_feed_forward",
    "ratio_attention",
    "ratio_modulation",
    "contrast",
    "min_factor",
    "freeze",
    "full",
)


def check_options(arguments: argparse.Namespace) -> bool:
    """Whether a budget is given; options that belong to the other way of choosing factors are wrong usage."""
    budgeted = any(getattr(arguments, name) is not None for name in BUDGET_OPTIONS)
    _check_algo_options(arguments, budgeted)
    others = ("preset", "critical") if budgeted else PLANNER_OPTIONS
    for name in others:
        if getattr(arguments, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            arguments.wrong_usage(
                f"{option} is for the article's recipe; with a budget, --full names blocks that get factor 1"
                if budgeted
                else f"{option} needs a budget: --params, --size or --like"
            )
    if arguments.critical is None:
        arguments.critical = "auto"
    return budgeted


def _check_algo_options(arguments: argparse.Namespace, budgeted: bool) -> None:
    """Wrong usage where options do not go with --algo, --rank or --model."""
    wrong = arguments.wrong_usage
    given = [name for name in vars(arguments) if getattr(arguments, name) not in (None, False)]
    if (arguments.run is None) == (arguments.model is None):
        wrong("give RUN, or --model for a plan without a run")
    if arguments.model is not None:
        if not budgeted and not (arguments.algo != "lokr" and arguments.rank):
            wrong("--model needs a budget: --params, --size or --like")
        if arguments.direction not in (None, "uniform") or arguments.env is not None or arguments.per_stream:
            wrong("--model knows no contributions: all blocks get the same (--direction uniform), with --out only")
        arguments.direction = "uniform" if budgeted else None
    if arguments.algo == "lokr":
        if arguments.rank is not None:
            wrong("--rank is for --algo locon, loha and lora")
        return
    if budgeted and arguments.rank is not None:
        wrong("--rank and a budget exclude each other")
    not_for_ranks = {*PLANNER_OPTIONS, "unverified"} - {"direction", "contrast", "freeze"}
    not_for_ranks |= {"max_factor"} if budgeted else set()
    for name in given:
        if name in not_for_ranks:
            wrong(f"--{name.replace('_', '-')} does not go with --algo {arguments.algo}")
    if arguments.algo == "lora" and arguments.out is not None:
        wrong("SimpleTuner takes ranks of a standard LoRA only from files that its options name: use --env, not --out")


def budget_of(arguments: argparse.Namespace, modules: Sequence[Module], model_class: str) -> int:
    """The trainable parameters that --params, --size or --like ask for."""
    if arguments.params is not None:
        return int(arguments.params)
    if arguments.size is not None:
        return int(arguments.size) // BF16_BYTES
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.proof import check_config

    with quiet(), lycoris_for_proofs(arguments):
        like = check_config(read_config(arguments.like), modules, model_class=model_class, where=arguments.like)
    if not like.parameters:
        raise ProbeError(f"{arguments.like} gives no module of this model an adapter, so there is no budget to match")
    return like.parameters


def weighting_of(arguments: argparse.Namespace) -> dict[str, float]:
    """How the options weigh the streams, as the contributions take it."""
    return {name: getattr(arguments, name) for name in ("clip_percentile", "text_weight", "image_weight")}


def planner_of(
    arguments: argparse.Namespace,
    budget: int,
    manifest: Manifest,
    streams: Mapping[str, Heatmap],
    contribution: Contribution,
) -> tuple[Planner, dict[str, NDArray[np.float64]]]:
    """The planner that the options of `lokr` ask for, and the contributions that it goes by, by stream."""
    from simpletuner_layerprobe.analyse.contribution import stream_contributions
    from simpletuner_layerprobe.lokr import plan as planner
    from simpletuner_layerprobe.probe import families

    freeze, full = arguments.freeze or (), arguments.full or ()
    for option, numbers in (("--freeze", freeze), ("--full", full)):
        for number in numbers:
            if number >= len(contribution.blocks):
                raise ProbeError(
                    f"{option} names block {number}, which does not exist; "
                    f"the blocks are 0 to {len(contribution.blocks) - 1}"
                )
    both = sorted(set(freeze) & set(full))
    if both:
        raise ProbeError(f"block {both[0]} is named by --freeze and by --full; it can be one of them")
    values = {planner.JOINT: contribution.value_L}
    if arguments.per_stream:
        values |= stream_contributions(streams, clip_percentile=arguments.clip_percentile)
    groups = planner.module_groups(
        contribution.blocks,
        families.family(manifest.family, manifest.model_class).targets,
        manifest.modules,
        streams={name: heatmap.blocks for name, heatmap in streams.items() if name in values}
        if arguments.per_stream
        else None,
        freeze=freeze,
    )
    ratios = {
        planner.FEED_FORWARD: arguments.ratio_feed_forward,
        planner.ATTENTION: arguments.ratio_attention,
        planner.MODULATION: arguments.ratio_modulation,
    }
    made = planner.Planner(
        groups,
        budget,
        direction=arguments.direction or planner.DIRECTIONS[0],
        ratios=planner.ARTICLE_RATIOS | {kind: ratio for kind, ratio in ratios.items() if ratio is not None},
        contrast=arguments.contrast or ARTICLE_MAX_FACTOR,
        min_factor=arguments.min_factor or 1,
        max_factor=arguments.max_factor,
        full=full,
    )
    return made, values


def options_of_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The probe run's SimpleTuner options, with a warning for each that no follow-up takes over."""
    from simpletuner_layerprobe.lokr import config as lokr_config

    options = lokr_config.read_options(arguments.run)
    for name in lokr_config.programs(options):
        warn(f"{name} starts a program and is left out of the new config; add it there yourself if it is yours")
    return options


def write(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[list[str], str]:
    """Write what --out or --env ask for. Returns the paths written and the line that says what comes next."""
    from simpletuner_layerprobe.lokr import config as lokr_config

    if arguments.dry_run:
        return [], "nothing written: --dry-run"
    if arguments.env is not None:
        made = lokr_config.environment(
            arguments.env,
            options_of_run(arguments),
            config,
            config_dir=arguments.config_dir,
            force=arguments.force,
        )
        return [str(made.options), str(made.lycoris_config)], f"next: simpletuner train env={made.name}"
    if arguments.out is not None:
        lokr_config.write_config(arguments.out, config, force=arguments.force)
        return [arguments.out], (
            f'next: set "lycoris_config": "{arguments.out}", "lora_type": "lycoris" and "model_type": "lora" '
            "in your SimpleTuner config, then simpletuner train"
        )
    return (
        [],
        "nothing written: add --env NAME for a SimpleTuner environment, or --out FILE for the config alone",
    )
