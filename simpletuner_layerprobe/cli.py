"""The `layerprobe` command: parse, call, print. Imports only the standard library until a command runs."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from simpletuner_layerprobe import ProbeError, __version__

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.confidence import Bootstrap, Confidence, Decide
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.heatmap import Heatmap
    from simpletuner_layerprobe.lokr.planner import Plan
    from simpletuner_layerprobe.lokr.ranks import PlannedRank
    from simpletuner_layerprobe.lokr.verify import Check
    from simpletuner_layerprobe.run.manifest import Manifest, Module
    from simpletuner_layerprobe.run.shards import Run

OK, PROBLEM, USAGE, INTERRUPTED = 0, 1, 2, 130
MAX_BINS = 1000
MAX_FACTOR = 2**20
ARTICLE_MAX_FACTOR = 12
BF16_BYTES = 2
MAX_AMOUNT = 10**15
AMOUNT_DIGITS = 30
KIND_HEADS = {"feed-forward": "ff", "attention": "attn", "modulation": "mod"}
FAR_FROM_BUDGET = 0.005
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
HISTOGRAM_WIDTH = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; a usage error or --help raises SystemExit, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path or a model name may not fit the terminal
    try:
        try:
            arguments = _parser().parse_args(argv)
            code: int = arguments.command(arguments)
            return code
        finally:
            sys.stdout.flush()
    except ProbeError as error:
        message = str(error)
    except BrokenPipeError:
        _drop_stdout()  # whoever read our output has gone: nobody to tell
        return PROBLEM
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except KeyboardInterrupt:
        print("layerprobe: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"layerprobe: error: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return PROBLEM


def _drop_stdout() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's last flush does not complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch, diffusers and LyCORIS from warning about themselves while they are imported and used."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _warn(message: str) -> None:
    print(f"layerprobe: warning: {message}", file=sys.stderr)


# The commands


def _doctor(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.record import doctor

    found = doctor.checks()
    width = max((len(check.name) for check in found), default=0)
    for check in found:
        print(f"{'ok' if check.ok else 'MISSING':<9}{check.name:<{width}}  {check.detail}")
        if not check.ok:
            print(f"{'':<9}{'':<{width}}  -> {check.remedy}")
    missing = sum(not check.ok for check in found)
    if missing:
        raise ProbeError(f"{missing} of {len(found)} checks failed; what to do stands beside each (->)")
    return OK


def _status(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.analyse.summary import summary
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    manifest = run.manifest
    counts = summary(run, bins=arguments.bins)
    blocks = all_blocks([stream.blocks for stream in manifest.streams])
    total = sum(counts.samples.values())
    ranks = ", ".join(f"rank {rank}: {count:,}" for rank, count in counts.samples.items())
    nonfinite = ", ".join(f"{stream} {reading}: {count:,}" for (stream, reading), count in counts.nonfinite.items())
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    backends = ", ".join(f"{name or 'unknown'}: {count:,}" for name, count in counts.backends.items())
    facts = {
        "run": str(run.path),
        "model": f"{_model_name(manifest) or 'unknown'}, {_counted(len(blocks), 'block')}",
        "recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "versions": versions or "unknown",
        "samples": f"{total:,} ({ranks})",
        "streams": ", ".join(f"{stream.name} {_counted(len(stream.blocks), 'block')}" for stream in manifest.streams),
        "readings": ", ".join(manifest.tokens),
        "modules": f"{len(manifest.modules):,} in the module table" if manifest.modules else "no module table",
        "backends": backends,
        "non-finite": nonfinite or "none",
        "settled": _settling(run, arguments),
        "size": f"{_size(run.size_bytes())} in {_counted(len(run.shards), 'shard')}",
    }
    for name, value in facts.items():
        print(f"{name:<12}{value}")
    print(f"{'sigma':<12}samples per bin, 0 clean .. 1 noise")
    largest = int(counts.count_T.max())
    for label, count in zip(_bin_labels(arguments.bins), counts.count_T.tolist(), strict=True):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * count / largest)
        print(f"  {label:<14}{count:>12,}  {bar or '(none)'}")
    return OK


def _heatmap(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import combined, heatmaps
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.report import figures
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    streams = heatmaps(run, tokens=arguments.tokens, bins=arguments.bins)
    look: dict[str, Any] = {"model": _model_name(run.manifest), "file_format": arguments.format}
    suffix = "." + arguments.format
    arrays = dict(streams)
    files: dict[str, bytes] = {f"figure1_streams{suffix}": figures.streams_figure(streams, **look)}
    warnings = _sample_warnings(streams)
    try:
        if len(streams) > 1:
            arrays["combined"] = combined(streams)
            files[f"figure2_combined{suffix}"] = figures.combination_figure(arrays["combined"], **look)
        contribution = article_contributions(streams)
        critical = contribution.critical_union()
        files[f"figure3_factors{suffix}"] = figures.factor_figure(
            contribution.blocks,
            article_factors(contribution.value_L, critical=critical).tolist(),
            critical=critical,
            repeated=[i for i, covered in enumerate(contribution.covered_L) if not covered],
            **look,
        )
    except ProbeError as error:
        warnings.append(f"not every figure can be drawn: {error}")
    files["heatmap.npz"] = figures.heatmap_npz(arrays)
    _replace_files(Path(arguments.out), files)
    for message in warnings:
        _warn(message)
    for name in files:
        print(os.path.join(arguments.out, name))
    return OK


def _findings(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.findings import TITLES, as_json, chance, findings, words
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.analyse.observation import observe
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    observation = observe(run, tokens=arguments.tokens, bins=arguments.bins)
    sections = findings(observation)
    if arguments.json:
        import json

        print(json.dumps({"run": str(run.path), "samples": observation.samples, **as_json(sections)}, indent=2))
        return OK
    numbers = {block: i for i, block in enumerate(all_blocks([stream.blocks for stream in run.manifest.streams]))}
    print(f"{_model_name(run.manifest) or 'unknown model'}, {_counted(observation.samples, 'sample')}")
    for section in sections:
        print(f"\n{TITLES[section.kind]}, {section.stream} stream")
        for one in section.findings:
            first, last = numbers[one.blocks[0]], numbers[one.blocks[-1]]
            name = f"block {first}" if first == last else f"blocks {first} to {last}"
            print(f"  {name} {words(one)} ({chance(one.p)}, {_counted(one.samples, 'sample')})")
        if section.missing or not section.findings:
            print(f"  {section.missing or 'none found'}")
        for note in section.notes:
            print(f"  note: {note}")
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.report.page import page
    from simpletuner_layerprobe.run.shards import open_run

    made = page(open_run(arguments.run), tokens=arguments.tokens, bins=arguments.bins).encode()
    out = Path(arguments.out if arguments.out is not None else os.path.join(arguments.run, "report.html"))
    _replace_files(out.parent, {out.name: made})
    print(out)
    return OK


def _lokr(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe import families
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import heatmaps
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.run.shards import open_run

    budgeted = _check_lokr_options(arguments)
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
    contribution = article_contributions(
        streams,
        clip_percentile=arguments.clip_percentile,
        text_weight=arguments.text_weight,
        image_weight=arguments.image_weight,
    )
    critical = contribution.critical_union() if arguments.critical == "auto" else arguments.critical
    if arguments.algo != "lokr":
        for message in _sample_warnings(streams):
            _warn(message)
        return _lokr_by_ranks(arguments, manifest, contribution, critical)
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
    factors: list[int] = []
    if budgeted:
        budget = _budget(arguments, manifest.modules, manifest.model_class)
        plan = _plan(arguments, budget, manifest, streams, contribution)
        config = lokr_config.planned_config(plan.planned, contribution.blocks, targets)
    else:
        factors = article_factors(
            contribution.value_L, max_factor=arguments.max_factor or ARTICLE_MAX_FACTOR, critical=critical
        ).tolist()
        sure = _confidence(run, arguments)
        config = lokr_config.article_config(contribution.blocks, factors, targets)
    check = None
    if manifest.modules:
        from simpletuner_layerprobe.lokr.verify import verify

        meant = (
            plan.planned if plan else lokr_config.article_plan(contribution.blocks, factors, targets, manifest.modules)
        )
        with _quiet():
            check = verify(config, meant, manifest.modules, model_class=manifest.model_class)
        check.require()
    written, following = _write_lokr(arguments, config)
    for message in _sample_warnings(streams):
        _warn(message)
    if plan and abs(plan.gap) > FAR_FROM_BUDGET * plan.budget:
        _warn(f"the config has {plan.reached:,} parameters, the budget is {plan.budget:,}: {plan.bound()}")
    if arguments.json:
        _print_json(_lokr_result(arguments, manifest, contribution, factors, sure, plan, check, config, written))
        return OK
    if arguments.dry_run:
        print(lokr_config.config_bytes(config).decode(), end="")
    if plan and check:
        _print_plan(contribution, plan, check)
    elif sure:
        _print_factors(contribution, factors, sure, critical, arguments.critical == "auto", check)
    if check is None:
        guess = "" if manifest.family else "; names are those of SD3"
        print(f"NOT verified: the run has no module table, LyCORIS may apply another factor{guess}")
    else:
        print(f"verified: LyCORIS {check.lycoris} gives all {len(check.rows):,} modules the factor meant")
    for path in written:
        print(f"written: {path}")
    print(following)
    return OK


def _bootstrap(run: Run, arguments: argparse.Namespace, tokens: str) -> tuple[Bootstrap, Decide]:
    """Replicates of the run's heatmaps, and the article's recipe with the options of `lokr` where there are any."""
    from simpletuner_layerprobe.analyse.confidence import article_decision, tally
    from simpletuner_layerprobe.lokr.factors import article_factors

    options = vars(arguments)
    critical = options.get("critical", "auto")
    bootstrap = tally(run, tokens=tokens, bins=arguments.bins).bootstrap()
    decide = article_decision(
        bootstrap.blocks,
        bootstrap.count_T,
        lambda value_N: article_factors(value_N, max_factor=options.get("max_factor") or ARTICLE_MAX_FACTOR),
        critical=None if critical == "auto" else critical,
        **{name: options[name] for name in ("clip_percentile", "text_weight", "image_weight") if name in options},
    )
    return bootstrap, decide


def _confidence(run: Run, arguments: argparse.Namespace) -> Confidence:
    """How sure the article's factors are, with the options of `lokr`."""
    from simpletuner_layerprobe.analyse.confidence import confidence

    return confidence(*_bootstrap(run, arguments, arguments.tokens))


def _settled_text(sure: Confidence) -> str:
    """The line under the table: how many factors other samples could change."""
    from simpletuner_layerprobe.analyse.confidence import MIN_SAMPLES, SHARE

    if not sure.enough:
        return f"NOT settled: a sigma bin has fewer than {MIN_SAMPLES} samples, too few to judge any factor by"
    count = len(sure.unsettled())
    if not count:
        return f"settled: every factor is agreed by {SHARE:.0%} of the bootstrap replicates"
    return (
        f"NOT settled: {count} of {_counted(len(sure.blocks), 'factor')}, agreed by fewer than {SHARE:.0%} of the "
        "bootstrap replicates; layerprobe status says how many more samples would settle them"
    )


def _share(share: float) -> str:
    """A share in five characters, rounded down: " 100%" means every single replicate."""
    return f"{math.floor(share * 100 + 1e-9):>4}%"


def _settling(run: Run, arguments: argparse.Namespace) -> str:
    """What `status` says of the samples that the article's factors still need."""
    from simpletuner_layerprobe.analyse.confidence import MOST_TIMES, SHARE, confidence, more_samples

    tokens = "last" if "last" in run.manifest.tokens else run.manifest.tokens[0]
    try:
        bootstrap, decide = _bootstrap(run, arguments, tokens)
        sure = confidence(bootstrap, decide)
        more = more_samples(bootstrap, decide)
    except ProbeError as error:
        return f"unknown: {error}"
    count = len(sure.blocks) - len(sure.unsettled())
    what = f"{count} of {_counted(len(sure.blocks), 'factor')} (preset article, {SHARE:.0%})"
    if more is None:
        return f"{what}; {MOST_TIMES:,.0f} times the samples would not settle all"
    return f"{what}; about {_rounded(more):,} more samples would settle all" if more else what


def _rounded(count: int) -> int:
    """An estimate to two digits, rounded up."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def _lokr_of_model(arguments: argparse.Namespace) -> int:
    """`lokr --model`: no run, so every block counts the same, and only the budget decides."""
    import numpy as np

    from simpletuner_layerprobe import families
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr.verify import verify
    from simpletuner_layerprobe.lokr.zoo import architecture
    from simpletuner_layerprobe.run.manifest import SCHEMA_VERSION, Manifest

    with _quiet():
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
        return _lokr_by_ranks(arguments, manifest, contribution, ())
    budget = _budget(arguments, manifest.modules, manifest.model_class)
    plan = _plan(arguments, budget, manifest, {}, contribution)
    targets = families.family(manifest.family, manifest.model_class).targets
    config = lokr_config.planned_config(plan.planned, blocks, targets)
    with _quiet():
        check = verify(config, plan.planned, manifest.modules, model_class=manifest.model_class)
    check.require()
    written, following = _write_lokr(arguments, config)
    if arguments.json:
        _print_json(_lokr_result(arguments, manifest, contribution, [], None, plan, check, config, written))
        return OK
    if arguments.dry_run:
        print(lokr_config.config_bytes(config).decode(), end="")
    _print_plan(contribution, plan, check)
    verified = f"LyCORIS {check.lycoris} gives all {len(check.rows):,} modules the factor meant"
    _print_written(verified, written, following)
    return OK


def _lokr_by_ranks(
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
        budget = _budget(arguments, modules, manifest.model_class)
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
    with _quiet():
        if algo == "lora":
            check = lora.verify_lora(plan, modules, model_class=manifest.model_class)
        else:
            config = ranks.rank_config(algo, blocks, rank_L2, targets, modules)
            check = verify(config, plan, modules, model_class=manifest.model_class)
    check.require()
    if algo == "lora":
        written, following = _write_lora(arguments, plan, manifest.model_class)
    else:
        written, following = _write_lokr(arguments, config)
    rank_of = {number: tuple(map(int, rank_L2[place])) for place, number in enumerate(kept)}
    reached: dict[str, int | None] | None = None
    if budgeted is not None:
        reached = {"parameters": budget, "reached": budgeted.reached, "gap": budgeted.reached - budget}
        reached |= {"lower": budgeted.lower, "upper": budgeted.upper}
    if arguments.json:
        _print_json(
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
    size = _size(BF16_BYTES * check.parameters)
    print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>5}  {'':>9}  {check.parameters:>14,}  {size} in bf16")
    print("feed-forward and modulation get the rank, attention half of it; alpha is the rank")
    if budgeted is not None:
        gap = budgeted.reached - budget
        near = ", ".join(f"{one:,}" for one in (budgeted.lower, budgeted.upper) if one is not None)
        print(f"budget   {budget:,} parameters; gap {gap:+,} ({gap / budget:+.3%})")
        print(f"bound    the nearest others that keep the proportions have {near or 'none'}")
    _print_written(
        f"{check.builder} {check.lycoris} gives all {len(check.rows):,} modules the rank meant", written, following
    )
    return OK


def _write_lora(arguments: argparse.Namespace, plan: Sequence[PlannedRank], model_class: str) -> tuple[list[str], str]:
    """`_write_lokr` for PEFT's LoRA: an environment with the file that gives the ranks."""
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


def _print_written(verified: str, written: Sequence[str], following: str) -> None:
    print(f"verified: {verified}")
    for path in written:
        print(f"written: {path}")
    print(following)


def _check_lokr_options(arguments: argparse.Namespace) -> bool:
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


def _budget(arguments: argparse.Namespace, modules: Sequence[Module], model_class: str) -> int:
    """The trainable parameters that --params, --size or --like ask for."""
    if arguments.params is not None:
        return int(arguments.params)
    if arguments.size is not None:
        return int(arguments.size) // BF16_BYTES
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.verify import check_config

    with _quiet():
        like = check_config(read_config(arguments.like), modules, model_class=model_class, where=arguments.like)
    if not like.parameters:
        raise ProbeError(f"{arguments.like} gives no module of this model an adapter, so there is no budget to match")
    return like.parameters


def _plan(
    arguments: argparse.Namespace,
    budget: int,
    manifest: Manifest,
    streams: Mapping[str, Heatmap],
    contribution: Contribution,
) -> Plan:
    """The planner's factors for a run and the options of `lokr`."""
    from simpletuner_layerprobe import families
    from simpletuner_layerprobe.analyse.contribution import stream_contributions
    from simpletuner_layerprobe.lokr import planner

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
        streams={one.name: one.blocks for one in manifest.streams} if arguments.per_stream else None,
        freeze=freeze,
    )
    ratios = {
        planner.FEED_FORWARD: arguments.ratio_feed_forward,
        planner.ATTENTION: arguments.ratio_attention,
        planner.MODULATION: arguments.ratio_modulation,
    }
    return planner.plan(
        groups,
        values,
        budget,
        direction=arguments.direction or planner.DIRECTIONS[0],
        ratios=planner.ARTICLE_RATIOS | {kind: ratio for kind, ratio in ratios.items() if ratio is not None},
        contrast=arguments.contrast or ARTICLE_MAX_FACTOR,
        min_factor=arguments.min_factor or 1,
        max_factor=arguments.max_factor,
        full=full,
    )


def _write_lokr(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[list[str], str]:
    """Write what --out or --env ask for. Returns the paths written and the line that says what comes next."""
    from simpletuner_layerprobe.lokr import config as lokr_config

    if arguments.dry_run:
        return [], "nothing written: --dry-run"
    if arguments.env is not None:
        made = lokr_config.environment(
            arguments.env,
            lokr_config.read_options(arguments.run),
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


def _print_factors(
    contribution: Contribution,
    factors: Sequence[int],
    sure: Confidence,
    critical: Sequence[int],
    found: bool,
    check: Check | None,
) -> None:
    """The table of blocks. `found`: the critical blocks were found in the run, so their streams are known."""
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    unsettled = sure.unsettled()
    heads = f"{'factor':>6}  {'parameters':>14}  {'95% interval':>15}  {'agree':>5}"
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {heads}")
    for number, block in enumerate(contribution.blocks):
        notes = ["NOT settled"] if number in unsettled else []
        if number in critical:
            where = [name for name, numbers in contribution.critical.items() if number in numbers]
            notes.append(f"critical ({', '.join(where)})" if found else "critical")
        if not contribution.covered_L[number]:
            notes.append("contribution of the nearest block")
        parameters = f"{check.block_parameters(block):,}" if check else "unknown"
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {factors[number]:>6}"
        line += f"  {parameters:>14}  {sure.low_L[number]:.4f} - {sure.high_L[number]:.4f}"
        print(f"{line}  {_share(sure.agreement_L[number])}  {', '.join(notes)}".rstrip())
    if check:
        size = _size(BF16_BYTES * check.parameters)
        print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>6}  {check.parameters:>14,}  {size} in bf16")
    print(f"feed-forward and modulation get the factor, attention twice the factor; {_settled_text(sure)}")


def _group_label(kind: str, stream: str) -> str:
    """ "attention", or "text attention" where streams have groups of their own."""
    return kind if stream == "joint" else f"{stream} {kind}"


def _print_plan(contribution: Contribution, plan: Plan, check: Check) -> None:
    """The table of blocks with a column per kind of modules, and what was asked for, reached and proved."""
    labels = list(dict.fromkeys(_group_label(KIND_HEADS[group.kind], group.stream) for group in plan.groups))
    factor_of = {
        (group.number, _group_label(KIND_HEADS[group.kind], group.stream)): factor
        for group, factor in zip(plan.groups, plan.factors, strict=True)
    }
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    heads = "  ".join(f"{label:>4}" for label in labels)
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {heads}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        cells = "  ".join(f"{factor_of.get((number, label), '-'):>{max(4, len(label))}}" for label in labels)
        notes = [] if contribution.covered_L[number] else ["contribution of the nearest block"]
        if all((number, label) not in factor_of for label in labels):
            notes.append("frozen")
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {cells}"
        print(f"{line}  {check.block_parameters(block):>14,}  {', '.join(notes)}".rstrip())
    print(f"{', '.join(f'{head} {kind}' for kind, head in KIND_HEADS.items())}; '-' no such modules")
    gap = f"{abs(plan.gap):,} ({abs(plan.gap) / plan.budget:.3%}) {'above' if plan.gap > 0 else 'below'}"
    print(f"budget   {plan.budget:,} parameters, {_size(BF16_BYTES * plan.budget)} in bf16")
    print(f"reached  {check.parameters:,} parameters, {_size(BF16_BYTES * check.parameters)} in bf16")
    print(f"gap      {gap if plan.gap else 'none'}")
    print(f"bound    {plan.bound()}")


def _lokr_result(
    arguments: argparse.Namespace,
    manifest: Manifest,
    contribution: Contribution,
    factors: Sequence[int],
    sure: Confidence | None,
    plan: Plan | None,
    check: Check | None,
    config: Mapping[str, Any],
    written: Sequence[str],
) -> dict[str, Any]:
    """What `lokr --json` prints. Numbers that are not known are null."""
    blocks: list[dict[str, Any]] = []
    for number, block in enumerate(contribution.blocks):
        if plan:
            of_block = {
                _group_label(group.kind, group.stream): factor
                for group, factor in zip(plan.groups, plan.factors, strict=True)
                if group.number == number
            }
        else:
            of_block = {"at_factor": factors[number], "at_double": 2 * factors[number]}
        blocks.append(
            {
                "number": number,
                "block": block,
                "contribution": float(contribution.value_L[number]),
                "measured": bool(contribution.covered_L[number]),
                "interval": [float(sure.low_L[number]), float(sure.high_L[number])] if sure else None,
                "agreement": float(sure.agreement_L[number]) if sure else None,
                "settled": number not in sure.unsettled() if sure else None,
                "factors": of_block,
                "parameters": check.block_parameters(block) if check else None,
            }
        )
    budget = None
    if plan:
        budget = {
            "parameters": plan.budget,
            "reached": plan.reached,
            "gap": plan.gap,
            "least": plan.least,
            "most": plan.most,
            "nearest": plan.nearest,
            "slack": plan.slack,
            "bound": plan.bound(),
        }
    return {
        "run": arguments.run,
        "family": manifest.family,
        "flavour": manifest.flavour,
        "preset": None if plan else "article",
        "budget": budget,
        "blocks": blocks,
        "parameters": check.parameters if check else None,
        "size_bytes": BF16_BYTES * check.parameters if check else None,
        "lycoris": check.lycoris if check else None,
        "config": config,
        "written": list(written),
    }


def _print_json(result: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(result, indent=2, allow_nan=False))


def _check_config(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.verify import check_config
    from simpletuner_layerprobe.run.manifest import read_manifest

    config = read_config(arguments.config)
    if arguments.run is not None:
        manifest = read_manifest(arguments.run)
        modules, model_class = manifest.modules, manifest.model_class
        if not modules:
            raise ProbeError(
                f"{arguments.run} has no module table (imported without --model); name the model with --model"
            )
    else:
        from simpletuner_layerprobe.lokr.zoo import architecture

        with _quiet():
            model = architecture(arguments.model)
        modules, model_class = model.modules, model.model_class
    with _quiet():
        check = check_config(config, modules, model_class=model_class, where=arguments.config)
    for row in check.rows:
        if not row.ok:
            print(f"WRONG  {row}")
        elif not arguments.differences:
            print(f"ok     {row.name}: {row.got}")
    for pattern in check.unmatched:
        print(f"note   nothing in the model matches {pattern}")
    for note in check.notes:
        print(f"note   {note}")
    if not check.rows:
        raise ProbeError(f"{arguments.config} gives no module of this model an adapter")
    print(
        f"LyCORIS {check.lycoris}: {len(check.wrong):,} of {len(check.rows):,} modules wrong, "
        f"{check.parameters:,} trainable parameters, {check.intended_parameters:,} meant"
    )
    check.require()
    return OK


def _import(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.jsonl import import_jsonl

    known: dict[str, Any] = {}
    if arguments.model is not None:
        from simpletuner_layerprobe.lokr.zoo import architecture

        with _quiet():
            model = architecture(arguments.model)
        if not model.streams:
            raise ProbeError(f"{arguments.model} is a {model.model_class}; the layer probe does not know its blocks")
        known = {
            "modules": model.modules,
            "family": model.family,
            "flavour": model.flavour,
            "model_class": model.model_class,
            "block_paths": {stream.name: stream.blocks for stream in model.streams},
        }
    run = import_jsonl(arguments.file, arguments.run, tokens=arguments.tokens, **known)
    print(f"{run.sample_count():,} samples imported into {arguments.run}")
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.jsonl import export_jsonl
    from simpletuner_layerprobe.run.shards import open_run

    written, skipped = export_jsonl(open_run(arguments.run), arguments.file, tokens=arguments.tokens)
    if skipped:
        _warn(f"{skipped:,} samples left out: a record cannot hold distances that are not finite")
    print(f"{written:,} samples written to {arguments.file}")
    return OK


# What the commands share


def _model_name(manifest: Manifest) -> str:
    name = " ".join(part for part in (manifest.family, manifest.flavour) if part)
    return name or manifest.model_class


def _counted(count: int, noun: str) -> str:
    """ "1 block", "1,455 blocks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]


def _sample_warnings(streams: Mapping[str, Heatmap]) -> list[str]:
    """One line per stream for bins without samples, and for samples that were left out."""
    warnings = []
    for name, heatmap in streams.items():
        empty = heatmap.empty_bins()
        if empty:
            labels = _bin_labels(heatmap.bins)
            shown = ", ".join(labels[t] for t in empty[:5]) + (", ..." if len(empty) > 5 else "")
            warnings.append(
                f"{len(empty)} of {heatmap.bins} sigma bins have no samples in the {name} stream ({shown}); "
                "they count as 0, as in the article: record more samples or use fewer --bins"
            )
        if heatmap.nonfinite:
            warnings.append(f"{heatmap.nonfinite:,} samples are left out of the {name} stream: distances not finite")
    return warnings


def _size(size_bytes: int) -> str:
    """A size in decimal units, as disks and model pages give it: "1.53 GB"."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, made if need be; files of the same name are replaced, each one as a whole.

    Nothing is replaced before all of them are on the disk under temporary names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".layerprobe-{os.getpid()}-{name}.tmp" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# The command line


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"layerprobe: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return number

    return parse


def _number(expected: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """A number or a fraction such as 1/3 for which `allowed` is true; `expected` says so in words."""

    def parse(text: str) -> float:
        try:
            numerator, _, denominator = text.partition("/")
            number = float(numerator) / float(denominator) if denominator else float(text)
        except (ValueError, ZeroDivisionError):
            number = math.nan
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return number

    return parse


def _amount(expected: str, units: Mapping[str, int]) -> Callable[[str], int]:
    """A whole amount of 1 or more with a unit of `units` (keys in lower case): "400M". `expected` says so in words."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"(\d[\d_]*)(\.\d+)?\s*([a-z]*)", text.strip().lower(), re.ASCII)
        unit = units.get(found[3]) if found else None
        amount = 0
        if found and unit:
            whole, fraction = found[1].replace("_", ""), (found[2] or ".")[1:]
            if len(whole + fraction) <= AMOUNT_DIGITS:
                amount = int(whole + fraction) * unit // 10 ** len(fraction)
        if not 1 <= amount <= MAX_AMOUNT:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return amount

    return parse


def _blocks(text: str) -> tuple[int, ...]:
    """Block numbers and ranges of them: "0,3-5"."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        first = int(found[1]) if found else 1
        last = int(found[2] or first) if found else 0
        if first > last:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of block numbers and ranges such as 0,3-5")
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))


def _critical(text: str) -> str | tuple[int, ...]:
    """ "auto", or block numbers; "none" is no number."""
    if text == "auto":
        return text
    if text == "none":
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto nor none nor a list of block numbers such as 0,31,35"
        )
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="layerprobe",
        description="From a SimpleTuner probe run to heatmaps and a weighted LoKr config.",
        epilog="A run folder is what a probe run writes (<output_dir>/layerprobe). "
        "Exit codes: 0 all went well, 1 a problem (said on stderr), 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"layerprobe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], summary: str, more: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}".strip(),
            epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        return added

    def add_run(added: argparse.ArgumentParser) -> None:
        added.add_argument("run", metavar="RUN", help="run folder")

    def add_bins(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--bins",
            type=_whole(1, MAX_BINS),
            default=10,
            metavar="N",
            help="sigma bins of equal width over 0 (clean) .. 1 (noise); default 10",
        )

    def add_tokens(added: argparse.ArgumentParser, use: str) -> None:
        added.add_argument(
            "--tokens",
            choices=("last", "mean"),
            default="last",
            help=f"the reading {use}: last token, as in the article, or mean over tokens; default last",
        )

    add(
        "doctor",
        _doctor,
        "say whether the probe is active and every part of SimpleTuner it needs is there",
        "Exits with 1, and says what to do, if something is missing.",
        "layerprobe doctor",
    )

    added = add(
        "status",
        _status,
        "print what a run folder holds",
        "",
        "layerprobe status output/sd35-probe/layerprobe",
    )
    add_run(added)
    add_bins(added)

    added = add(
        "heatmap",
        _heatmap,
        "draw the article's figures and write the heatmaps as arrays",
        "Figure 1: both streams, linear, log1p and clipped at the 95th percentile. Figure 2: their mean.\n"
        "Figure 3: the factors of the article's recipe, critical blocks found in the run.\n"
        "heatmap.npz: the arrays. Files of the same names in DIR are replaced.",
        "layerprobe heatmap output/sd35-probe/layerprobe --out figures",
    )
    add_run(added)
    added.add_argument("--out", required=True, metavar="DIR", help="folder for the files; made if need be")
    add_bins(added)
    add_tokens(added, "to draw")
    added.add_argument("--format", choices=("png", "svg"), default="png", help="default png")

    added = add(
        "findings",
        _findings,
        "say in words what a run shows, and how sure it is",
        "Critical blocks, task islands and gradients, two-ended and least contributing blocks, and the effects of\n"
        "caption length, dropped captions, size, aspect and data backend. docs/findings.md defines each.",
        "layerprobe findings output/sd35-probe/layerprobe\n"
        "layerprobe findings output/sd35-probe/layerprobe --json > findings.json",
    )
    add_run(added)
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_bins(added)
    add_tokens(added, "to look at")

    added = add(
        "report",
        _report,
        "make one HTML page of everything a run shows",
        "The page needs no network and opens from disk. A file of the same name is replaced.",
        "layerprobe report output/sd35-probe/layerprobe --out report.html",
    )
    add_run(added)
    added.add_argument("--out", metavar="FILE", help="the page; default report.html in the run folder")
    add_bins(added)
    add_tokens(added, "to show")

    added = add(
        "lokr",
        _lokr,
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
        help="plan without a run, all blocks alike: sd35-large, sd35-medium, flux-dev, or a diffusers transformer "
        "config.json",
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
        type=_whole(1, MAX_FACTOR),
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
        type=_number("a number above 0 and at most 100", lambda number: 0 < number <= 100),
        default=90.0,
        metavar="P",
        help="clip each heatmap at this percentile of its cells; default 90",
    )
    weight = _number("a number from 0 to 1000000, or a fraction such as 1/3", lambda number: 0 <= number <= 1e6)
    added.add_argument("--text-weight", type=weight, default=1 / 3, metavar="W", help="of the text stream; default 1/3")
    added.add_argument(
        "--image-weight", type=weight, default=2 / 3, metavar="W", help="of the image stream; default 2/3"
    )
    added.add_argument(
        "--max-factor",
        type=_whole(1, MAX_FACTOR),
        metavar="F",
        help="factor of the block that contributes least; default 12. With a budget the largest factor that may be "
        "used; default any",
    )
    added.add_argument(
        "--critical",
        type=_critical,
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
        type=_amount("a number of parameters such as 400M or 1.2B", {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}),
        metavar="N",
        help="trainable parameters, such as 400M or 1.2B",
    )
    sizes = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    budget.add_argument(
        "--size",
        type=_amount("a size such as 800MB or 1.5GB", sizes),
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
    ratio = _number("a number above 0 and at most 1000", lambda number: 0 < number <= 1000)
    for kind, usual in (("feed-forward", 1), ("attention", 2), ("modulation", 1)):
        planning.add_argument(
            f"--ratio-{kind}",
            type=ratio,
            metavar="R",
            help=f"{kind} modules aim at R times the block's factor; default {usual}",
        )
    planning.add_argument(
        "--contrast",
        type=_number("a number from 1 to 1000000", lambda number: 1 <= number <= 1e6),
        metavar="F",
        help="the block that gets least aims at a factor F times that of the block that gets most; default 12",
    )
    planning.add_argument(
        "--min-factor", type=_whole(1, MAX_FACTOR), metavar="F", help="smallest factor that may be used; default 1"
    )
    planning.add_argument(
        "--freeze", type=_blocks, metavar="BLOCKS", help="blocks to leave out of the config, such as 0,3-5"
    )
    planning.add_argument("--full", type=_blocks, metavar="BLOCKS", help="blocks that get factor 1, such as 0,3-5")

    added = add(
        "check-config",
        _check_config,
        "show what each module was meant to get from a LyCORIS config and what it gets",
        "Exits with 1 if a module gets something else.",
        "layerprobe check-config lycoris_config.json --model sd35-large --differences",
    )
    added.add_argument("config", metavar="LYCORIS_CONFIG", help="the LyCORIS config, a JSON file")
    source = added.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="the model is the one of this run folder")
    source.add_argument(
        "--model",
        metavar="MODEL",
        help="sd35-large, sd35-medium, flux-dev, or a diffusers transformer config.json",
    )
    added.add_argument("--differences", action="store_true", help="list only the modules that differ")

    added = add(
        "import",
        _import,
        "make a run folder from a file of the article's records",
        "One JSON object per line:\n"
        '  {"timestep": sigma, "encoder_hidden_states": [...], "hidden_states": [...]}\n'
        "Plain, gzip or bz2. All of it is imported, or nothing.",
        "layerprobe import sd3_hidden_state_similarity.jsonl.gz runs/article --model sd35-large",
    )
    added.add_argument("file", metavar="FILE", help="file of records")
    added.add_argument("run", metavar="RUN", help="run folder to make")
    added.add_argument(
        "--model",
        metavar="MODEL",
        help="the model recorded: sd35-large, sd35-medium, flux-dev, or a diffusers transformer config.json; "
        "without it lokr cannot prove a config",
    )
    add_tokens(added, "that the records hold")

    added = add(
        "export",
        _export,
        "write a run as a file of the article's records",
        "A name that ends in .gz or .bz2 is compressed. A file that exists is not overwritten.",
        "layerprobe export output/sd35-probe/layerprobe records.jsonl.gz",
    )
    add_run(added)
    added.add_argument("file", metavar="FILE", help="file to write")
    add_tokens(added, "to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
