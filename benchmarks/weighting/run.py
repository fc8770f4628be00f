"""Run the study: every arm's learning rate on the tuning split, then fresh seeds on the judging split.

    python -m weighting.run --pipeline base1=FOLDER --pipeline base2=FOLDER --prepared FOLDER --out FOLDER --seconds 540

with benchmarks on PYTHONPATH. What is there in --out is kept and not trained again, so that a run goes on where another
ended; a chunk of trainings is written as soon as it is judged. Several processes may share --out: each takes what no
other has taken. Ends with 0 also when the time is up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from weighting.arm import Arm, Training
from weighting.claims import claim
from weighting.device import machine, make_engine, memory, set_precision
from weighting.engine import Engine
from weighting.results import FINAL, SWEEP, Result, read_results, write_chunk
from weighting.rounds import RATES, ROUND, TUNING_SEEDS, best_rate, extensions, final, is_shuffle, sweep
from weighting.store import load_arms, load_task, make_task, pipelines
from weighting.task import NOISES, SIGMAS, Task, load_transformer

WAIT_SECONDS = 2


class TimeIsUp(Exception):
    pass


class Runner:
    """One base in chunks of E trainings."""

    def __init__(
        self,
        base: str,
        engine: Engine,
        model: nn.Module,
        arms: Mapping[str, Arm],
        task: Task,
        options: argparse.Namespace,
        begin: float,
    ):
        self.base, self.engine, self.model, self.arms, self.task = base, engine, model, arms, task
        self.options, self.begin = options, begin
        self.split = task.split()
        if options.images:
            self.split = {name: images[: options.images] for name, images in self.split.items()}
        self.slowest = 0.0
        self.results: list[Result] = [one for one in read_results(options.out) if one.base == base]

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def missing(self, phase: str, trainings: Sequence[Training]) -> list[Training]:
        done = {(one.phase, one.arm, one.seed, one.rate) for one in self.results}
        return [one for one in trainings if (phase, one.arm.name, one.seed, one.rate) not in done]

    def work(self, phase: str, trainings: Sequence[Training], beside: Sequence[Training] = ()) -> None:
        """Train what is missing, in chunks; `beside` (of FINAL) fills the last one."""
        while self.look(phase, trainings):
            with ExitStack() as claims:
                chunk = self.claimed(claims, phase, trainings)
                chunk += self.claimed(claims, FINAL, beside, less=len(chunk))
                if chunk:
                    self.chunk(chunk)
                else:
                    time.sleep(WAIT_SECONDS)  # another process has what is left

    def look(self, phase: str, trainings: Sequence[Training]) -> list[Training]:
        """What of it is in no file."""
        self.results = [one for one in read_results(self.options.out) if one.base == self.base]
        return self.missing(phase, trainings)

    def claimed(
        self, claims: ExitStack, phase: str, trainings: Sequence[Training], less: int = 0
    ) -> list[tuple[str, Training]]:
        """As many of them as a chunk has room for that nobody has made or is making."""
        mine: list[tuple[str, Training]] = []
        for one in self.missing(phase, trainings):
            if less + len(mine) == self.options.trainings:
                break
            name = f"{self.base}-{phase}-{one.arm.name}-{one.seed}-{one.rate:g}"
            # Looked up again: it may have been written just before its lock was given back.
            if claims.enter_context(claim(self.options.out / "claims", name)) and one in self.look(phase, [one]):
                mine.append((phase, one))
        return mine

    def chunk(self, chunk: Sequence[tuple[str, Training]]) -> None:
        """Train and judge; what a chunk lacks to E is filled with its last training, and dropped."""
        E, begin = self.options.trainings, time.monotonic()
        if self.seconds() + 1.05 * self.slowest > self.options.seconds:
            raise TimeIsUp
        filled = [training for _, training in chunk] + [chunk[-1][1]] * (E - len(chunk))
        batches = self.task.batches([training.seed for training in filled], self.options.steps)
        stack, loss_TE = self.engine.train(filled, batches, self.options.steps)
        for phase, split in ((SWEEP, "tuning"), (FINAL, "judging")):
            places = [place for place, (own, _) in enumerate(chunk) if own == phase]
            if not places:
                continue
            images = self.split[split]
            loss_EN = self.engine.judge(stack, self.task.judge_samples(images))
            loss_EQU = loss_EN[places].view(len(places), len(images), SIGMAS, NOISES).mean(-1).cpu().numpy()
            trainings = [chunk[place][1] for place in places]
            about = {"steps": self.options.steps, "images": images, "precision": self.options.precision}
            write_chunk(
                self.options.out, self.base, phase, trainings, loss_EQU, loss_TE[:, places].cpu().numpy(), about
            )
        took = time.monotonic() - begin
        self.slowest = max(self.slowest, took)
        names = sorted({phase for phase, _ in chunk})
        rate = len(chunk) / took
        said = f"{len(chunk)} trainings in {took:.1f} s, {rate:.2f}/s, loss {loss_TE[-1].mean():.4f}{memory()}"
        print(f"{self.seconds():.0f} s: {self.base} {'+'.join(names)}: {said}", flush=True)

    def study(self, seeds: int) -> None:
        """Sweep, one step beyond its ends, rounds up to as many fresh seeds, without what is there already."""
        options, arms = self.options, self.arms
        self.engine.rebase(self.model)
        self.work(SWEEP, sweep(arms, options.rates, options.tuning_seeds))
        more = extensions(self.results, self.base, arms, options.rates, options.tuning_seeds)
        waiting = {one.arm.name for one in more}
        if any(map(is_shuffle, waiting)):
            waiting |= set(filter(is_shuffle, arms))
        settled = {name: best_rate(self.results, self.base, name) for name in arms if name not in waiting}
        ready = final({name: arm for name, arm in arms.items() if name in settled}, settled, options.first_seed, seeds)
        self.work(SWEEP, more, beside=ready)
        rate_of = {name: best_rate(self.results, self.base, name) for name in arms}
        self.work(FINAL, final(arms, rate_of, options.first_seed, seeds))


def chosen_arms(options: argparse.Namespace, base: str, *, later: bool) -> dict[str, Arm]:
    """Those asked for; else all, of a later base those that are named."""
    arms = load_arms(options.prepared / f"{base}-arms.json")
    if options.arms:
        return {name: arms[name] for name in options.arms.split(",")}
    return {name: arm for name, arm in arms.items() if not (later and is_shuffle(name))}


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--prepared", type=Path, required=True, help="what weighting.prepare wrote")
    parser.add_argument("--tasks", type=Path, help="where the encoded pictures are kept; with --prepared without")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--arms", help="names with commas; without, all that are prepared, later bases without the shuffles"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--trainings", type=int, default=58, help="at once")
    parser.add_argument(
        "--seeds", type=numbers, default=[20, 8], help="fresh ones, of the first base and of the others"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rates", type=numbers, default=list(RATES))
    parser.add_argument(
        "--tuning-seeds", type=lambda text: [int(one) for one in text.split(",")], default=list(TUNING_SEEDS)
    )
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--images", type=int, default=0, help="of each split; all without")
    parser.add_argument("--precision", choices=("tf32", "highest", "bf16"), default="tf32")
    parser.add_argument("--attention", choices=("auto", "fused", "plain", "bf16", "checked"), default="auto")
    parser.add_argument("--check", type=Path, help="for --attention checked: the check.json of weighting.check")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main() -> int:
    begin, options = time.monotonic(), parse()
    options.out.mkdir(parents=True, exist_ok=True)
    set_precision(options.precision)
    given, tasks = pipelines(options.pipeline), options.tasks or options.prepared
    # The later bases' pictures and captions are encoded while the first one trains.
    encoding = {
        base: multiprocessing.get_context("spawn").Process(target=make_task, args=(tasks / f"{base}-task.pt", folder))
        for base, folder in list(given.items())[1:]
    }
    for process in encoding.values():
        process.start()
    runners: dict[str, Runner] = {}
    engine = None
    most = dict(zip(given, [*map(int, options.seeds), *[int(options.seeds[-1])] * len(given)], strict=False))
    try:
        # A round of fresh seeds for every base, then the next: what the time cuts off is a later round.
        for seeds in range(ROUND, max(most.values()) + ROUND, ROUND):
            for base, folder in given.items():
                if base not in runners:
                    if base in encoding:
                        encoding[base].join()
                    task = load_task(tasks / f"{base}-task.pt", folder, options.device)
                    arms = chosen_arms(options, base, later=bool(runners))
                    if engine is None:
                        engine = make_engine(folder, options, task, next(iter(arms.values())))
                    model = load_transformer(folder, options.device)
                    runners[base] = Runner(base, engine, model, arms, task, options, begin)
                    print(f"{time.monotonic() - begin:.0f} s: {base}: {len(arms)} arms", flush=True)
                runners[base].study(min(seeds, most[base]))
    except TimeIsUp:
        print(f"{time.monotonic() - begin:.0f} s: the time is up", flush=True)
    (options.out / "run.json").write_text(json.dumps(machine(options, time.monotonic() - begin)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
