"""`layerprobe trial`: is another split of the same size better on the user's own data? Trained and judged."""

from __future__ import annotations

import argparse
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import Add, add_force, add_wide, amount_of_parameters, within
from simpletuner_layerprobe.commands.imports import light
from simpletuner_layerprobe.commands.lokr import MAX_CONTRAST
from simpletuner_layerprobe.commands.output import LEFT, OK, RIGHT, print_json, print_table, say, warn
from simpletuner_layerprobe.commands.trial_output import as_json, print_trial
from simpletuner_layerprobe.show.words import counted
from simpletuner_layerprobe.targets import require_new_folder

if TYPE_CHECKING:
    from simpletuner_layerprobe.trial.settings import Trial

ARMS = "uniform,plan,inverse,shuffle:3"
MOST_SEEDS, MOST_STEPS = 100, 10_000_000


def add_parser(add: Add) -> None:
    added = add(
        "trial",
        command,
        "train several splits of one size and judge them on held-out images",
        "new writes a folder with one environment per arm, all with the same number of parameters, proved by LyCORIS.\n"
        "run works through the trainings with `simpletuner train` and probes each adapter on the held-out images; it\n"
        "goes on where it was stopped. report compares every arm with equal factors, paired by seed and image.",
        "layerprobe trial new trials/first --run output/sd35-probe/layerprobe --params 20M --steps 800 --held-out new\n"
        "layerprobe trial run trials/first\n"
        "layerprobe trial report trials/first",
    )
    parts = added.add_subparsers(title="parts", metavar="PART", required=True, dest="part")
    _add_new(parts.add_parser("new", help="write the folder of a trial"))
    run = parts.add_parser("run", help="train and judge what is missing")
    run.add_argument("folder", metavar="DIR", help="folder of a trial")
    run.add_argument(
        "--only",
        metavar="ARM/SEED",
        help="only this arm, or this seed of it, or ARM/sweep; several with commas. Several machines share a trial "
        "in a common folder that way",
    )
    report = parts.add_parser("report", help="compare the arms, as far as they are trained")
    report.add_argument("folder", metavar="DIR", help="folder of a trial")
    report.add_argument("--out", metavar="FILE", help="the page; default DIR/report.html")
    add_force(report)
    report.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    add_wide(report)
    for part, run_part in (("new", _new), ("run", _run), ("report", _report)):
        parser = parts.choices[part]
        parser.set_defaults(run_part=run_part, wrong_usage=parser.error)


def _add_new(new: argparse.ArgumentParser) -> None:
    new.add_argument("folder", metavar="DIR", help="folder to make")
    new.add_argument("--run", required=True, metavar="RUN", help="probe run whose config and contributions are used")
    new.add_argument(
        "--params", required=True, type=amount_of_parameters, metavar="N", help="trainable parameters of every arm: 20M"
    )
    new.add_argument(
        "--held-out",
        required=True,
        metavar="BACKEND",
        help="images that are not trained on: the id of a backend in the run's data_backend_config, or such a file",
    )
    new.add_argument(
        "--steps", required=True, type=within(int, 1, MOST_STEPS), metavar="N", help="steps of each training"
    )
    new.add_argument(
        "--arms",
        default=ARMS,
        metavar="ARMS",
        help="with commas: uniform, plan, inverse, ablation, article, shuffle:N; uniform and uniform-110 are always "
        f"there; default {ARMS}",
    )
    new.add_argument("--seeds", type=within(int, 1, MOST_SEEDS), default=3, metavar="N", help="of each arm; default 3")
    new.add_argument(
        "--learning-rates",
        type=rates,
        default=(),
        metavar="LIST",
        help="such as 5e-4,1e-3,2e-3: each arm tries them first, on a seed of its own, and goes on with its best; "
        "default the run's own alone",
    )
    new.add_argument(
        "--contrast",
        type=within(float, 1, MAX_CONTRAST),
        default=12.0,
        metavar="F",
        help="how uneven plan, inverse and ablation are, as in layerprobe lokr; default 12",
    )


def rates(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) < 2 or len(set(values)) < len(values) or not all(math.isfinite(x) and x > 0 for x in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of two or more different learning rates")
    return tuple(sorted(values))


def command(arguments: argparse.Namespace) -> int:
    code: int = arguments.run_part(arguments)
    return code


def _new(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.plans import programs
    from simpletuner_layerprobe.trial.make import Wish, new_trial

    require_new_folder(arguments.folder)
    run = load(arguments.run)
    wish = Wish(
        parameters=arguments.params,
        arms=arguments.arms,
        seeds=arguments.seeds,
        steps=arguments.steps,
        held_out=arguments.held_out,
        contrast=arguments.contrast,
        learning_rates=arguments.learning_rates,
    )
    with light("lycoris", arguments):
        trial = new_trial(Path(arguments.folder), run, wish)
    arguments.written = [arguments.folder]
    rows = [(arm.name, f"{arm.parameters:,}", arm.note) for arm in trial.arms]
    print_table(("arm", "parameters", ""), rows, LEFT + RIGHT + LEFT)
    say(_work_ahead(trial))
    left_out = (f"{name} starts a program and is left out of the environments" for name in programs(run))
    warn(*trial.notes, *left_out)
    say(f"written: {trial.folder}")
    say(f"next: layerprobe trial run {trial.folder}")
    return OK


def _work_ahead(trial: Trial) -> str:
    from simpletuner_layerprobe.trial.schedule import sweeps

    tuned, counted = len(sweeps(trial)), len(trial.arms) * len(trial.seeds)
    images = "an unknown number of" if trial.images is None else f"{trial.images:,}"
    sweep = f"{tuned} to choose learning rates, then {counted}" if tuned else f"{counted}"
    return (
        f"{tuned + counted} trainings of {trial.steps:,} steps ({sweep} that count), each judged on {images} held-out "
        f"images ({', '.join(trial.held_out)}), in each tenth of sigma"
    )


def _run(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.trial.schedule import parse_only
    from simpletuner_layerprobe.trial.settings import Trial
    from simpletuner_layerprobe.trial.work import Work

    trial = Trial.load(arguments.folder)
    # A batch system's goodbye ends the training that runs, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Work(trial, parse_only(arguments.only, trial), lambda line: say(line, flush=True)).run()
    say(f"next: layerprobe trial report {trial.folder}")
    return OK


def _report(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.trial.report import judged, page_path, write_page
    from simpletuner_layerprobe.trial.settings import Trial

    trial = Trial.load(arguments.folder)
    page = page_path(trial, arguments.out, force=arguments.force)
    judgement, facts = judged(trial)
    write_page(page, judgement, facts, force=arguments.force)
    arguments.written = [page]
    if arguments.json:
        print_json(as_json(facts, judgement))
        return OK
    if len(facts.seeds) < len(trial.seeds):
        warn(
            f"{counted(len(facts.seeds), 'seed')} of {len(trial.seeds)} trained for every arm; the others do not count"
        )
    print_trial(facts, judgement, wide=arguments.wide)
    say(f"written: {page}")
    return OK
