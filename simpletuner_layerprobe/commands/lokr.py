"""`layerprobe lokr`: a weighted config from a run, proved before it is written."""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import (
    KNOWN_MODELS,
    MAX_FACTOR,
    Add,
    add_bins,
    add_tokens,
    amount,
    block_numbers,
    critical_blocks,
    number_like,
    whole,
)
from simpletuner_layerprobe.commands.imports import diffusers_for_tables, lycoris_for_proofs
from simpletuner_layerprobe.commands.lokr_options import (
    ARTICLE_MAX_FACTOR,
    budget_of,
    check_options,
    planner_of,
    weighting_of,
    write,
)
from simpletuner_layerprobe.commands.lokr_output import Intervals, as_result, print_factors, print_plan, print_written
from simpletuner_layerprobe.commands.lokr_ranks import lokr_by_ranks
from simpletuner_layerprobe.commands.output import OK, print_json, quiet, sample_warnings, warn
from simpletuner_layerprobe.commands.settled import confidence_of
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import PARAMETERS, SIZES

FAR_FROM_BUDGET = 0.005


def add_parser(add: Add) -> None:
    added = add(
        "lokr",
        command,
        "turn a run into a weighted LoKr config and prove it before it is written",
        "The config is built with LyCORIS on a skeleton of the model, without weights; a module that\n"
        "would get another factor than meant is an error, and nothing is written. Without --out and\n"
        "--env only the table is printed. Without a budget the factors are those of the article's recipe.",
        "layerprobe lokr output/sd35-probe/layerprobe --env sd35-weighted\n"
        "layerprobe lokr output/sd35-probe/layerprobe --critical 0,31,35 --out lycoris_config.json\n"
        "layerprobe lokr output/sd35-probe/layerprobe --params 400M --env sd35-400m\n"
        "layerprobe lokr output/sd35-probe/layerprobe --algo lora --rank 32 --env sd35-lora\n"
        "layerprobe lokr --model sd35-large --params 400M",
    )
    added.set_defaults(wrong_usage=added.error)
    added.add_argument("run", metavar="RUN", nargs="?", help="run folder")
    added.add_argument(
        "--model",
        metavar="MODEL",
        help=f"plan without a run, all blocks alike: {KNOWN_MODELS}",
    )
    added.add_argument(
        "--algo",
        choices=("lokr", "loha", "locon", "lora"),
        default="lokr",
        help="LyCORIS's lokr, loha or locon, or PEFT's standard lora; the others have ranks in place of factors: "
        "factor f is one f-th of the rank; default lokr",
    )
    added.add_argument(
        "--rank",
        type=whole(1, MAX_FACTOR),
        metavar="R",
        help="rank that factor 1 stands for; default 64, with loha 32",
    )
    added.add_argument("--preset", choices=("article",), help="the recipe where no budget is given; default article")
    target = added.add_mutually_exclusive_group()
    target.add_argument("--out", metavar="FILE", help="write the LyCORIS config to this file")
    target.add_argument(
        "--env",
        metavar="NAME",
        help="write the SimpleTuner environment NAME: its config.json, from the probe run's own, and its "
        "lycoris_config.json",
    )
    added.add_argument("--config-dir", default="config", metavar="DIR", help="where environments are; default config")
    add_bins(added)
    added.add_argument(
        "--clip-percentile",
        type=number_like("a number above 0 and at most 100", lambda number: 0 < number <= 100),
        default=90.0,
        metavar="P",
        help="clip each heatmap at this percentile of its cells; default 90",
    )
    weight = number_like("a number from 0 to 1000000, or a fraction such as 1/3", lambda number: 0 <= number <= 1e6)
    added.add_argument("--text-weight", type=weight, default=1 / 3, metavar="W", help="of the text stream; default 1/3")
    added.add_argument(
        "--image-weight", type=weight, default=2 / 3, metavar="W", help="of the image stream; default 2/3"
    )
    added.add_argument(
        "--max-factor",
        type=whole(1, MAX_FACTOR),
        metavar="F",
        help="factor of the block that contributes least; default 12. With a budget the largest factor that may be "
        "used; default any",
    )
    added.add_argument(
        "--critical",
        type=critical_blocks,
        metavar="BLOCKS",
        help="blocks that get factor 1: auto (those beyond Tukey's far-out fence in a stream), none, or "
        "numbers such as 0,31,35; default auto",
    )
    add_tokens(added, "to use")
    added.add_argument("--force", action="store_true", help="overwrite files that exist")
    added.add_argument(
        "--unverified",
        action="store_true",
        help="write a config without proof if the run has no module table (imported without --model)",
    )
    added.add_argument("--dry-run", action="store_true", help="print the config and the table, write nothing")
    added.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    planning = added.add_argument_group(
        "a budget",
        "The factors are those of the article's line from contribution to factor, scaled so that they fit the budget "
        "as far as the factors that LyCORIS can realise allow.",
    )
    budget = planning.add_mutually_exclusive_group()
    budget.add_argument(
        "--params",
        type=amount("a number of parameters such as 400M or 1.2B", PARAMETERS),
        metavar="N",
        help="trainable parameters, such as 400M or 1.2B",
    )
    budget.add_argument(
        "--size",
        type=amount("a size such as 800MB or 1.5GB", SIZES),
        metavar="SIZE",
        help="size of the weights in bf16, such as 800MB or 1.5GB",
    )
    budget.add_argument(
        "--like", metavar="FILE", help="as many parameters as LyCORIS really makes of this lycoris_config.json"
    )
    planning.add_argument(
        "--direction",
        choices=("more-change-more-capacity", "more-change-less-capacity", "uniform"),
        help="which blocks get more; default more-change-more-capacity, as in the article",
    )
    planning.add_argument(
        "--per-stream",
        action="store_true",
        help="weight image modules by the image stream's distances and text modules by the text stream's",
    )
    ratio = number_like("a number above 0 and at most 1000", lambda number: 0 < number <= 1000)
    for kind, usual in (("feed-forward", 1), ("attention", 2), ("modulation", 1)):
        planning.add_argument(
            f"--ratio-{kind}",
            type=ratio,
            metavar="R",
            help=f"{kind} modules aim at R times the block's factor; default {usual}",
        )
    planning.add_argument(
        "--contrast",
        type=number_like("a number from 1 to 1000000", lambda number: 1 <= number <= 1e6),
        metavar="F",
        help="the block that gets least aims at a factor F times that of the block that gets most; default 12",
    )
    planning.add_argument(
        "--min-factor", type=whole(1, MAX_FACTOR), metavar="F", help="smallest factor that may be used; default 1"
    )
    planning.add_argument(
        "--freeze", type=block_numbers, metavar="BLOCKS", help="blocks to leave out of the config, such as 0,3-5"
    )
    planning.add_argument(
        "--full", type=block_numbers, metavar="BLOCKS", help="blocks that get factor 1, such as 0,3-5"
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import heatmaps
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr import decision
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.probe import families
    from simpletuner_layerprobe.run.records import open_run

    budgeted = check_options(arguments)
    if arguments.model is not None:
        return _lokr_of_model(arguments)
    run = open_run(arguments.run)
    manifest = run.manifest
    if not manifest.modules and budgeted:
        raise ProbeError(
            f"{run.path} has no module table (imported without --model), so nothing can be planned for a budget; "
            "import it again with --model"
        )
    if not manifest.modules and not arguments.unverified:
        raise ProbeError(
            f"{run.path} has no module table (imported without --model), so the config cannot be proved; "
            "import it again with --model, or add --unverified"
        )
    streams = heatmaps(run, tokens=arguments.tokens, bins=arguments.bins)
    weighting = weighting_of(arguments)
    contribution = article_contributions(streams, **weighting)
    for name in contribution.dropped:
        warn(f"the {name} stream has no sample with finite distances; it is left out")
    critical = contribution.critical_union() if arguments.critical == "auto" else arguments.critical
    if arguments.algo != "lokr":
        for message in sample_warnings(streams):
            warn(message)
        return lokr_by_ranks(arguments, manifest, contribution, critical, run)
    # Without a module table and a family the records are taken for the article's model.
    # Before the proof, which takes seconds.
    if arguments.env is not None:
        options = lokr_config.read_options(arguments.run)
        lokr_config.plan_environment(arguments.env, options, config_dir=arguments.config_dir, force=arguments.force)
    elif arguments.out is not None:
        lokr_config.require_free([arguments.out], force=arguments.force)
    targets = families.family(
        manifest.family if manifest.modules else manifest.family or "sd3", manifest.model_class
    ).targets
    plan = None
    sure = None
    shown: Intervals = {}
    factors: list[int] = []
    if budgeted:
        budget = budget_of(arguments, manifest.modules, manifest.model_class)
        planner, values = planner_of(arguments, budget, manifest, streams, contribution)
        plan = planner.plan(values)
        sure, bootstrap = confidence_of(
            run,
            arguments,
            lambda bootstrap: decision.planned(bootstrap, planner, per_stream=arguments.per_stream, **weighting),
            replicates=decision.REPLICATES,
        )
        if arguments.per_stream:
            shown = decision.stream_intervals(bootstrap, values, arguments.clip_percentile)
        config = lokr_config.planned_config(plan.planned, contribution.blocks, targets)
    else:
        factors = article_factors(
            contribution.value_L, max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR, critical=critical
        ).tolist()
        named = None if arguments.critical == "auto" else arguments.critical
        sure, _ = confidence_of(
            run,
            arguments,
            lambda bootstrap: decision.article(
                bootstrap,
                manifest.modules,
                targets,
                max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR,
                critical=named,
                **weighting,
            ),
        )
        config = lokr_config.article_config(contribution.blocks, factors, targets)
    check = None
    if manifest.modules:
        from simpletuner_layerprobe.lokr.proof import verify

        meant = (
            plan.planned if plan else lokr_config.article_plan(contribution.blocks, factors, targets, manifest.modules)
        )
        with quiet(), lycoris_for_proofs(arguments):
            check = verify(config, meant, manifest.modules, model_class=manifest.model_class)
        check.require()
    written, following = write(arguments, config)
    for message in sample_warnings(streams):
        warn(message)
    if plan and abs(plan.gap) > FAR_FROM_BUDGET * plan.budget:
        warn(f"the config has {plan.reached:,} parameters, the budget is {plan.budget:,}: {plan.bound()}")
    if arguments.json:
        print_json(as_result(arguments, manifest, contribution, factors, sure, plan, check, config, written, shown))
        return OK
    if arguments.dry_run:
        print(lokr_config.config_bytes(config).decode(), end="")
    if plan and check:
        print_plan(contribution, plan, check, sure, shown)
    elif sure:
        print_factors(contribution, factors, sure, critical, arguments.critical == "auto", check)
    if check is None:
        guess = "" if manifest.family else "; names are those of SD3"
        print(f"NOT verified: the run has no module table, LyCORIS may apply another factor{guess}")
    else:
        print(f"verified: LyCORIS {check.lycoris} gives all {len(check.rows):,} modules the factor meant")
    for path in written:
        print(f"written: {path}")
    print(following)
    return OK


def _lokr_of_model(arguments: argparse.Namespace) -> int:
    """`lokr --model`: no run, so every block counts the same, and only the budget decides."""
    import numpy as np

    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr.proof import verify
    from simpletuner_layerprobe.models import architecture
    from simpletuner_layerprobe.probe import families
    from simpletuner_layerprobe.run.manifest import SCHEMA_VERSION, Manifest

    with quiet(), diffusers_for_tables(arguments):
        model = architecture(arguments.model)
    if not model.streams:
        raise ProbeError(f"{arguments.model} is a {model.model_class}; the layer probe does not know its blocks")
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        family=model.family,
        flavour=model.flavour,
        model_class=model.model_class,
        streams=model.streams,
        tokens=("last",),
        modules=model.modules,
        versions={},
        settings={},
        fingerprint="",
        created="",
        source="import",
    )
    blocks = all_blocks([stream.blocks for stream in model.streams])
    contribution = Contribution(blocks, np.ones(len(blocks)), np.ones(len(blocks), dtype=np.bool_), {})
    if arguments.algo != "lokr":
        return lokr_by_ranks(arguments, manifest, contribution, (), None)
    budget = budget_of(arguments, manifest.modules, manifest.model_class)
    planner, values = planner_of(arguments, budget, manifest, {}, contribution)
    plan = planner.plan(values)
    targets = families.family(manifest.family, manifest.model_class).targets
    config = lokr_config.planned_config(plan.planned, blocks, targets)
    with quiet(), lycoris_for_proofs(arguments):
        check = verify(config, plan.planned, manifest.modules, model_class=manifest.model_class)
    check.require()
    written, following = write(arguments, config)
    if arguments.json:
        print_json(as_result(arguments, manifest, contribution, [], None, plan, check, config, written, {}))
        return OK
    if arguments.dry_run:
        print(lokr_config.config_bytes(config).decode(), end="")
    print_plan(contribution, plan, check, None, {})
    verified = f"LyCORIS {check.lycoris} gives all {len(check.rows):,} modules the factor meant"
    print_written(verified, written, following)
    return OK
