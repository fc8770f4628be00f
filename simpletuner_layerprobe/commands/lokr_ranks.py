"""`layerprobe lokr --algo`: ranks in place of factors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.imports import lycoris_for_proofs, peft_for_proofs
from simpletuner_layerprobe.commands.lokr_options import (
    ARTICLE_MAX_FACTOR,
    BUDGET_OPTIONS,
    budget_of,
    options_of_run,
    weighting_of,
    write,
)
from simpletuner_layerprobe.commands.lokr_output import print_written
from simpletuner_layerprobe.commands.output import OK, print_json, quiet, size_text
from simpletuner_layerprobe.commands.settled import confidence_of, settled_text, share_text
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Decide
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.lokr.ranks import PlannedRank
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.records import Run

LEVEL_NAMES = ("at_factor", "at_double")


def lokr_by_ranks(
    arguments: argparse.Namespace,
    manifest: Manifest,
    contribution: Contribution,
    critical: Sequence[int],
    run: Run | None,
) -> int:
    """`lokr --algo` with an algorithm that has ranks. run: None for a plan without one."""
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr import decision, lora, ranks
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.lokr.proof import verify
    from simpletuner_layerprobe.probe import families

    algo, modules = arguments.algo, manifest.modules
    if not modules:
        raise ProbeError(
            f"{arguments.run} has no module table (imported without --model), so no ranks can be given; "
            "import it again with --model"
        )
    targets = families.family(manifest.family, manifest.model_class).targets
    kept = [number for number in range(len(contribution.blocks)) if number not in (arguments.freeze or ())]
    blocks = [contribution.blocks[number] for number in kept]
    value = contribution.value_L[kept]
    budgeted = None
    if any(getattr(arguments, name) is not None for name in BUDGET_OPTIONS):
        budget = budget_of(arguments, modules, manifest.model_class)
        ladder = ranks.Ladder(algo, blocks, targets, modules, budget)
        directed = partial(_directed, arguments)
        budgeted = ladder.nearest(*directed(value))
        rank_L2 = budgeted.rank_L2

        def decide_of(bootstrap: Bootstrap) -> Decide:
            return decision.budgeted_ranks(bootstrap, ladder, directed, kept=kept, **weighting_of(arguments))

    else:
        factors = article_factors(value, max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR, critical=critical)
        largest = arguments.rank or ranks.LARGEST_RANK[algo]
        rank_L2 = ranks.ranks_from_factors(factors, largest)

        def decide_of(bootstrap: Bootstrap) -> Decide:
            return decision.article_ranks(
                bootstrap,
                algo,
                contribution.blocks,
                modules,
                targets,
                largest=largest,
                kept=kept,
                max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR,
                critical=None if arguments.critical == "auto" else arguments.critical,
                **weighting_of(arguments),
            )

    sure = None
    if run is not None:
        sure, _ = confidence_of(run, arguments, decide_of, replicates=decision.REPLICATES if budgeted else None)
    plan = ranks.rank_plan(algo, blocks, rank_L2, targets, modules)
    config: dict[str, Any] = {}
    if algo == "lora":
        with quiet(), peft_for_proofs(arguments):
            check = lora.verify_lora(plan, modules, model_class=manifest.model_class)
    else:
        config = ranks.rank_config(algo, blocks, rank_L2, targets, modules)
        with quiet(), lycoris_for_proofs(arguments):
            check = verify(config, plan, modules, model_class=manifest.model_class)
    check.require()
    if algo == "lora":
        written, following = _write_lora(arguments, plan, manifest.model_class)
    else:
        written, following = write(arguments, config)
    rank_of = {number: tuple(map(int, rank_L2[place])) for place, number in enumerate(kept)}
    place_of = {number: place for place, number in enumerate(kept)}
    unsettled = set(sure.unsettled()) if sure else set()
    reached: dict[str, int | None] | None = None
    if budgeted is not None:
        reached = {"parameters": budget, "reached": budgeted.reached, "gap": budgeted.reached - budget}
        reached |= {"lower": budgeted.lower, "upper": budgeted.upper}
    if arguments.json:
        print_json(
            {
                "run": arguments.run,
                "model": arguments.model,
                "family": manifest.family,
                "flavour": manifest.flavour,
                "algo": algo,
                "budget": reached,
                "replicates": sure.replicates if sure else None,
                "blocks": [
                    {
                        "number": number,
                        "block": block,
                        "contribution": None if arguments.model else float(contribution.value_L[number]),
                        "interval": [float(sure.low_L[number]), float(sure.high_L[number])] if sure else None,
                        "ranks": dict(zip(LEVEL_NAMES, rank_of[number], strict=True)) if number in rank_of else {},
                        "agreement": {
                            name: float(sure.agreement_K[2 * place_of[number] + level])
                            for level, name in enumerate(LEVEL_NAMES)
                        }
                        if sure and number in place_of
                        else None,
                        "settled": not {2 * place_of[number], 2 * place_of[number] + 1} & unsettled
                        if sure and number in place_of
                        else None,
                        "parameters": check.block_parameters(block),
                    }
                    for number, block in enumerate(contribution.blocks)
                ],
                "parameters": check.parameters,
                "size_bytes": BF16_BYTES * check.parameters,
                "builder": f"{check.builder} {check.lycoris}",
                "config": config or None,
                "written": list(written),
            }
        )
        return OK
    if arguments.dry_run and config:
        print(lokr_config.config_bytes(config).decode(), end="")
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    heads = f"{'rank':>5}  {'agree':>5}  {'attention':>9}  {'agree':>5}" if sure else f"{'rank':>5}  {'attention':>9}"
    interval_head = f"  {'95% interval':>15}" if sure else ""
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}{interval_head}  {heads}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}"
        if sure:
            line += f"  {sure.low_L[number]:.4f} - {sure.high_L[number]:.4f}"
        note = "" if number in rank_of else "  frozen"
        for level, rank in enumerate(rank_of.get(number, ("-", "-"))):
            line += f"  {rank:>{(5, 9)[level]}}"
            if sure:
                place = 2 * place_of[number] + level if number in place_of else None
                line += f"  {'-' if place is None else share_text(sure.agreement_K[place]):>5}"
                note = "  NOT settled" if place in unsettled else note
        print(f"{line}  {check.block_parameters(block):>14,}{note}")
    size = size_text(BF16_BYTES * check.parameters)
    blank = len(interval_head) + len(heads) + 12
    print(f"{'':>4}  {'total':<{width}}  {'':>{blank}}    {check.parameters:>14,}  {size} in bf16")
    print("feed-forward and modulation get the rank, attention half of it; alpha is the rank")
    if sure:
        print(settled_text(sure, "rank"))
    if budgeted is not None:
        gap = budgeted.reached - budget
        near = ", ".join(f"{one:,}" for one in (budgeted.lower, budgeted.upper) if one is not None)
        print(f"budget   {budget:,} parameters; gap {gap:+,} ({gap / budget:+.3%})")
        print(f"bound    the nearest others that keep the proportions have {near or 'none'}")
    print_written(
        f"{check.builder} {check.lycoris} gives all {len(check.rows):,} modules the rank meant", written, following
    )
    return OK


def _directed(
    arguments: argparse.Namespace, value: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factors of the article's line, and the contributions, in the direction that the options ask for."""
    directed = 1 - value if arguments.direction == "more-change-less-capacity" else value
    if arguments.direction == "uniform":
        directed = value * 0 + 1
    return 1 + (1 - directed) * ((arguments.contrast or ARTICLE_MAX_FACTOR) - 1), directed


def _write_lora(arguments: argparse.Namespace, plan: Sequence[PlannedRank], model_class: str) -> tuple[list[str], str]:
    """`write` for PEFT's LoRA: an environment with the file that gives the ranks."""
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr import lora

    if arguments.dry_run or arguments.env is None:
        return [], "nothing written: --dry-run" if arguments.dry_run else "nothing written: add --env NAME"
    folder = Path(arguments.config_dir) / arguments.env
    files = {
        lora.TARGETS_NAME: lokr_config.config_bytes([one.name for one in plan]),
        lora.INIT_NAME: lora.init_file(plan, model_class),
    }
    options, _ = lokr_config.environment_of(
        arguments.env,
        options_of_run(arguments),
        lora.options(plan, folder.as_posix()),
        files,
        config_dir=arguments.config_dir,
        force=arguments.force,
    )
    return [str(options), *(str(folder / name) for name in files)], f"next: simpletuner train env={arguments.env}"
