"""`layerprobe lokr --algo`: ranks in place of factors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.commands.lokr_options import (
    ARTICLE_MAX_FACTOR,
    BF16_BYTES,
    BUDGET_OPTIONS,
    budget_of,
    write,
)
from simpletuner_layerprobe.commands.lokr_output import print_written
from simpletuner_layerprobe.commands.output import OK, print_json, quiet, size_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.lokr.ranks import PlannedRank
    from simpletuner_layerprobe.run.manifest import Manifest


def lokr_by_ranks(
    arguments: argparse.Namespace, manifest: Manifest, contribution: Contribution, critical: Sequence[int]
) -> int:
    """`lokr --algo` with an algorithm that has ranks."""
    from simpletuner_layerprobe import families
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr import lora, ranks
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.lokr.verify import verify

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
        directed = 1 - value if arguments.direction == "more-change-less-capacity" else value
        if arguments.direction == "uniform":
            directed = value * 0 + 1
        factors = 1 + (1 - directed) * ((arguments.contrast or ARTICLE_MAX_FACTOR) - 1)
        budgeted = ranks.ranks_for_budget(algo, factors, directed, blocks, targets, modules, budget)
        rank_L2 = budgeted.rank_L2
    else:
        factors = article_factors(value, max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR, critical=critical)
        rank_L2 = ranks.ranks_from_factors(factors, arguments.rank or ranks.LARGEST_RANK[algo])
    plan = ranks.rank_plan(algo, blocks, rank_L2, targets, modules)
    config: dict[str, Any] = {}
    with quiet():
        if algo == "lora":
            check = lora.verify_lora(plan, modules, model_class=manifest.model_class)
        else:
            config = ranks.rank_config(algo, blocks, rank_L2, targets, modules)
            check = verify(config, plan, modules, model_class=manifest.model_class)
    check.require()
    if algo == "lora":
        written, following = _write_lora(arguments, plan, manifest.model_class)
    else:
        written, following = write(arguments, config)
    rank_of = {number: tuple(map(int, rank_L2[place])) for place, number in enumerate(kept)}
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
                "blocks": [
                    {
                        "number": number,
                        "block": block,
                        "contribution": None if arguments.model else float(contribution.value_L[number]),
                        "ranks": dict(zip(("at_factor", "at_double"), rank_of[number], strict=True))
                        if number in rank_of
                        else {},
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
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {'rank':>5}  {'attention':>9}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        rank, attention = rank_of.get(number, ("-", "-"))
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {rank:>5}  {attention:>9}"
        print(f"{line}  {check.block_parameters(block):>14,}{'' if number in rank_of else '  frozen'}")
    size = size_text(BF16_BYTES * check.parameters)
    print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>5}  {'':>9}  {check.parameters:>14,}  {size} in bf16")
    print("feed-forward and modulation get the rank, attention half of it; alpha is the rank")
    if budgeted is not None:
        gap = budgeted.reached - budget
        near = ", ".join(f"{one:,}" for one in (budgeted.lower, budgeted.upper) if one is not None)
        print(f"budget   {budget:,} parameters; gap {gap:+,} ({gap / budget:+.3%})")
        print(f"bound    the nearest others that keep the proportions have {near or 'none'}")
    print_written(
        f"{check.builder} {check.lycoris} gives all {len(check.rows):,} modules the rank meant", written, following
    )
    return OK


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
        lokr_config.read_options(arguments.run),
        lora.options(plan, folder.as_posix()),
        files,
        config_dir=arguments.config_dir,
        force=arguments.force,
    )
    return [str(options), *(str(folder / name) for name in files)], f"next: simpletuner train env={arguments.env}"
