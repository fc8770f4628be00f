"""`layerprobe lokr`: a weighted config from a run, proved before it is written."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.arguments import (
    KNOWN_MODELS,
    Add,
    add_force,
    add_precision,
    add_run,
    add_tokens,
    add_wide,
    budget,
    chosen_run,
    critical_blocks,
    frozen_blocks,
    within,
)
from simpletuner_layerprobe.commands.imports import light, named_model
from simpletuner_layerprobe.commands.lokr_output import Frozen, as_json, print_factors, print_plan
from simpletuner_layerprobe.commands.lokr_size import MANY_TIMES, Size, other_json, other_lines, other_reading
from simpletuner_layerprobe.commands.output import OK, print_json, print_line, print_text, sample_warnings, say, warn
from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.targets import CONFIG, require_file

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.pages import Architecture, Plan, Run

FAR_FROM_BUDGET = 0.005
BINS = 10
MAX_RANK = 2**20
MAX_CONTRAST = 30
DIRECTIONS = ("more-change-more-capacity", "more-change-less-capacity", "uniform")
OF_A_PLAN = ("preset", "params", "critical", "direction", "per_stream", "contrast", "algo", "rank")
ANGLE, ABLATION = "angle", "ablation"


def add_parser(add: Add) -> None:
    added = add(
        "lokr",
        command,
        "make a LoKr config of your config's size, equal or weighted by a run, and prove it before it is written",
        "The config is built with LyCORIS on a skeleton of the model, without weights; a module that would get\n"
        "another factor than meant is an error, and nothing is written. Without --out and --env only the table is\n"
        "printed. With a budget the factors are those of the article's line from contribution to factor, scaled so\n"
        "that they fit the budget as far as the factors that LyCORIS can realise allow.",
        "layerprobe lokr output/sd35-probe/layerprobe --env sd35-weighted\n"
        "layerprobe lokr output/sd35-probe/layerprobe --preset article --critical 0,31,35 --out lycoris_config.json\n"
        "layerprobe lokr output/sd35-probe/layerprobe --params 400M --env sd35-400m\n"
        "layerprobe lokr output/sd35-probe/layerprobe --by ablation --freeze least:6 --env sd35-needed\n"
        "layerprobe lokr output/sd35-probe/layerprobe --algo lora --rank 32 --env sd35-lora\n"
        "layerprobe lokr --model sd35-large --params 400M",
    )
    add_run(added)
    measured = added.add_rest("what contributions are made of, with --help-all")
    planned = added.add_rest("how the plan is made, with --help-all")
    printed = added.add_rest("what is printed, with --help-all")
    measured.add_argument(
        "--model",
        metavar="MODEL",
        help=f"the model of a RUN that has no module table; without RUN all blocks are planned alike: {KNOWN_MODELS}",
    )
    add_precision(measured)
    measured.add_argument(
        "--by",
        choices=(ANGLE, ABLATION),
        default=ANGLE,
        help="what contributions are made of: how far a block turns the hidden states, or how much the loss grows with "
        "the block left out (a run with layerprobe_ablation: blocks; a negative increase counts as 0); default angle",
    )
    add_tokens(measured, "to use by angle")
    goal = added.add_mutually_exclusive_group()
    goal.add_argument(
        "--preset",
        choices=("article",),
        help="the article's recipe, whatever its size. Default without it and --params: as many parameters as the "
        "run's own config trains, or the amount in its layerprobe_preset",
    )
    goal.add_argument(
        "--params",
        type=budget,
        metavar="N",
        help="a budget: trainable parameters such as 400M, their size in bf16 such as 800MB, or a lycoris_config.json: "
        "as many as LyCORIS really makes of it",
    )
    planned.add_argument(
        "--critical",
        type=critical_blocks,
        metavar="BLOCKS",
        help="blocks that get factor 1: auto (those beyond Tukey's far-out fence in a stream; with a budget that "
        "stream's modules alone), none, or numbers such as 0,31,35; default auto by the recipe, none with a budget",
    )
    added.add_argument(
        "--direction",
        choices=DIRECTIONS,
        help="with a budget, which blocks get more. Default uniform, equal factors, which nothing measured beats "
        f"(docs/study-weighting.md); {DIRECTIONS[0]} where --contrast, --per-stream, --tokens or --by ablation weigh",
    )
    planned.add_argument(
        "--per-stream",
        action="store_true",
        help="with a budget: weight image modules by the image stream's distances, text modules by the text stream's",
    )
    planned.add_argument(
        "--contrast",
        type=within(float, 1, MAX_CONTRAST),
        metavar="F",
        help="the block that gets least aims at a factor F times that of the block that gets most; default 12",
    )
    added.add_argument(
        "--freeze",
        type=frozen_blocks,
        default=((), 0),
        metavar="BLOCKS",
        help="blocks to leave out of the config, such as 0,3-5 or 0-3,least:2: least:N are the N of all blocks that "
        "contribute least; that the model needs these least is measured with --by ablation only",
    )
    planned.add_argument(
        "--algo",
        choices=("lokr", "loha", "locon", "lora"),
        default="lokr",
        help="LyCORIS's lokr, loha or locon, or PEFT's standard lora; the others have ranks in place of factors: "
        "factor f is one f-th of the rank; default lokr",
    )
    planned.add_argument(
        "--rank",
        type=within(int, 1, MAX_RANK),
        metavar="R",
        help="by the recipe, the rank that factor 1 stands for; default 64, with loha 32",
    )
    target = added.add_mutually_exclusive_group()
    target.add_argument("--out", metavar="FILE", help="write the LyCORIS config to this file")
    target.add_argument(
        "--env",
        metavar="NAME",
        help="write the SimpleTuner environment config/NAME: its config.json, from the probe run's own, and its "
        "lycoris_config.json",
    )
    planned.add_argument(
        "--closest",
        action="store_true",
        help=f"write also a plan that misses the budget by more than {FAR_FROM_BUDGET:.1%}%: the closest there is",
    )
    add_force(added, "a config")
    add_wide(printed)
    added.add_argument(
        "--json", action="store_true", help="print one JSON object, with the config, in place of the table"
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load, plan
    from simpletuner_layerprobe.api.pages import block_rows

    if arguments.model is None:
        arguments.run = chosen_run(arguments)
    if arguments.algo == "lora" and arguments.out is not None:
        arguments.wrong_usage(
            "SimpleTuner takes ranks of a standard LoRA only from files that its options name: use --env, not --out"
        )
    if arguments.run is None and arguments.env is not None:
        arguments.wrong_usage("--env takes the options of a probe run: give RUN, or use --out")
    if arguments.precision is not None and arguments.model is None:
        arguments.wrong_usage("--precision goes with --model: a run has the layers that it was recorded with")
    numbers, count = arguments.freeze
    if arguments.run is None and (arguments.by == ABLATION or count):
        arguments.wrong_usage("--by ablation and --freeze least:N go by what was measured: give RUN")
    if arguments.by == ABLATION and arguments.tokens is not None:
        arguments.wrong_usage("--tokens chooses between readings of the angle: leave it out with --by ablation")
    _require_target(arguments)
    reading = ABLATION if arguments.by == ABLATION else arguments.tokens
    model = None if arguments.model is None else named_model(arguments)
    run = None if arguments.run is None else load(arguments.run, model=model)
    of = run or model
    assert of is not None, "one of them was given"
    options = _options(arguments, of)
    going_by = "" if run is None else run.plan_reading(reading, **options)
    least = run.plan_contribution(reading, **options).least(count) if run is not None and count else ()
    freeze = tuple(sorted({*numbers, *least}))
    if run is not None and not run.manifest.modules and not _of_modules(arguments):
        known = run.confidence(reading=reading, **options)
        print_factors(
            known, block_rows(run, None, known, reading=reading, **options), reading or run.reading, wide=arguments.wide
        )
        warn(*sample_warnings(run, reading, BINS))
        return OK
    made = plan(of, reading=reading, freeze=freeze, **options)
    if _is_far(made) and (arguments.out or arguments.env) is not None and not arguments.closest:
        raise ConfigError(
            f"nothing is written: the budget is {made.budget:,} parameters, and the closest plan has "
            f"{made.parameters:,} ({made.bound}); ask for another budget, or write this plan with --closest"
        )
    _write(arguments, run, made, dry_run=True)  # before the proof, which takes seconds
    with light("peft" if arguments.algo == "lora" else "lycoris", arguments):
        made = made.verify()
        size = Size.of(made)
    sure = None if run is None else run.confidence(reading=reading, freeze=freeze, **options)
    rows = block_rows(of, made, sure, reading=reading, freeze=freeze, **options)
    other = None if run is None else other_reading(run, reading, freeze=freeze, **options)
    frozen = None
    if freeze:
        agreement = sure.least_agreement(least) if sure is not None and least else None
        frozen = Frozen(freeze, least, agreement, *_saved(of, made, reading=reading, **options))
    written, following = _write(arguments, run, made)
    arguments.written = written
    warn(*_warnings(arguments, run, made, going_by, size))
    if arguments.json:
        print_json(as_json(arguments, run, made, sure, rows, frozen, written) | size.as_json() | other_json(other))
        return OK
    print_plan(made, sure, rows, going_by, frozen, wide=arguments.wide)
    for line in (*size.lines(), *other_lines(other)):
        print_line(line, wide=arguments.wide)
    for path in written:
        say(f"written: {path}")
    print_text("", following, wide=arguments.wide)
    return OK


def _options(arguments: argparse.Namespace, of: Run | Architecture) -> dict[str, Any]:
    """What the arguments ask of a plan, its size too; what else is not given keeps the API's default."""
    from simpletuner_layerprobe.api import Run, check_config
    from simpletuner_layerprobe.api.options import sized

    options: Any = {name: vars(arguments)[name] for name in OF_A_PLAN if vars(arguments)[name] not in (None, False)}
    if isinstance(arguments.params, str):
        with light("lycoris", arguments):
            like = check_config(arguments.params, of)
        if not like.parameters:
            raise ConfigError(
                f"{arguments.params} gives no module of this model an adapter, so there is no budget to match"
            )
        options["params"] = like.parameters
    if isinstance(of, Run):
        with light("lycoris", arguments):
            options = {**sized(options, lambda: of.plan_size)}
    return options


def _of_modules(arguments: argparse.Namespace) -> bool:
    """Whether what is asked for needs the model's modules: anything but the table of the article's factors."""
    budget_or_files = (arguments.params, arguments.out, arguments.env, arguments.rank, arguments.direction)
    asked = arguments.json or arguments.per_stream or arguments.freeze != ((), 0) or arguments.algo != "lokr"
    return asked or arguments.by == ABLATION or any(value is not None for value in budget_or_files)


def _is_far(made: Plan) -> bool:
    return made.budget is not None and abs(made.gap) > FAR_FROM_BUDGET * made.budget


def _warnings(arguments: argparse.Namespace, run: Run | None, made: Plan, going_by: str, size: Size) -> Iterator[str]:
    """What is to be known of the plan beside its table."""
    from simpletuner_layerprobe.api.plans import programs, written_twice

    if arguments.env is not None and run is not None:
        for name in programs(run):
            yield f"{name} starts a program and is left out of the new config; add it there yourself if it is yours"
    if run is not None:
        yield from sample_warnings(run, going_by, BINS)
        for name in run.contribution(going_by).dropped:
            yield f"the {name} stream has no sample with finite distances; it is left out"
    if isinstance(arguments.params, str):
        yield from written_twice(arguments.params)
    if _is_far(made):
        yield f"the config has {made.parameters:,} parameters, the budget is {made.budget:,}: {made.bound}"
    if size.times is not None and size.times > MANY_TIMES:
        yield (
            f"the config has {size.times:.1f} times the parameters that your own config trains; at its size: "
            f"{_at_own_size(arguments)}"
        )


def _at_own_size(arguments: argparse.Namespace) -> str:
    """The same command at the size of the run's own config; what weighs the blocks goes on doing so."""
    weighs = arguments.preset or any((arguments.direction, arguments.contrast, arguments.per_stream, arguments.tokens))
    options = [f"--by {arguments.by}"] if arguments.by != ANGLE else []
    options += [f"--tokens {arguments.tokens}"] if arguments.tokens else []
    options += [f"--direction {arguments.direction or DIRECTIONS[0]}"] if weighs else []
    options += [f"--env {shlex.quote(arguments.env)}"] if arguments.env else []
    return " ".join(["layerprobe lokr", shlex.quote(arguments.run), *options])


def _saved(of: Run | Architecture, made: Plan, **options: Any) -> tuple[int | None, int | None]:
    """How many modules fewer the plan has than the same without freezing, and the parameters of the latter.

    Both None if it cannot be made: a block without a layer that can be adapted has to be frozen.
    """
    from simpletuner_layerprobe.api import plan

    try:
        whole = plan(of, **options)
    except ConfigError:
        return None, None
    return len(whole.intended) - len(made.intended), whole.parameters


def _require_target(arguments: argparse.Namespace) -> None:
    """Raise ConfigError, before any work is done, if what --out or --env name may not be written."""
    from simpletuner_layerprobe.api.plans import free_environment

    if arguments.out is not None:
        require_file(arguments.out, CONFIG, force=arguments.force)
    if arguments.env is not None:
        free_environment(arguments.env, force=arguments.force)


def _write(
    arguments: argparse.Namespace, run: Run | None, made: Plan, *, dry_run: bool = False
) -> tuple[list[str], str]:
    """Write what --out or --env ask for. Returns the paths written and the line that says what comes next.

    dry_run: only see whether it can be written.
    """
    from simpletuner_layerprobe.api.plans import environment

    if arguments.env is not None and run is not None:
        trained = environment(arguments.env, run, made, force=arguments.force, dry_run=dry_run)
        return [str(path) for path in trained.written], f"next: simpletuner train env={trained.name}"
    if arguments.out is not None:
        if not dry_run:
            made.write(arguments.out, force=arguments.force)
        return [arguments.out], (
            f'next: set "lycoris_config": "{arguments.out}", "lora_type": "lycoris" and "model_type": "lora" '
            "in your SimpleTuner config, then simpletuner train"
        )
    return [], "nothing written: add --env NAME for a SimpleTuner environment, or --out FILE for the config alone"
