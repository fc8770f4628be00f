"""Before the study: how fast the stacked step is on this device, and whether TF32 or bf16 change what is judged.

    python -m weighting.check --pipeline base1=FOLDER --prepared FOLDER --out FOLDER

with benchmarks on PYTHONPATH; takes the options of weighting.run. --parts speed,precision.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from weighting.arm import Training
from weighting.device import make_engine, memory, set_precision
from weighting.engine import Engine
from weighting.run import parse
from weighting.store import load_arms, load_task, pipelines
from weighting.task import load_transformer

ARMS, SEEDS, RATE = ("uniform", "uniform-110", "angle-4", "angle-12"), (2000, 2001, 2002, 2003), 4e-3
WAYS = (("highest", "fused"), ("tf32", "fused"), ("tf32", "bf16"), ("bf16", "fused"))


def main() -> int:
    parts = ["speed", "precision"]
    arguments = sys.argv[1:]
    if "--parts" in arguments:
        place = arguments.index("--parts")
        parts = arguments[place + 1].split(",")
        del arguments[place : place + 2]
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    base, folder = next(iter(pipelines(options.pipeline).items()))
    arms = load_arms(options.prepared / f"{base}-arms.json")
    task = load_task((options.tasks or options.prepared) / f"{base}-task.pt", folder, options.device)
    said: dict[str, object] = {}
    if "speed" in parts:
        set_precision(options.precision)
        engine = make_engine(folder, options, task, arms["uniform"])
        trainings = [Training(arm, 2000, RATE) for arm in arms.values()]
        trainings = (trainings * (1 + options.trainings // len(trainings)))[: options.trainings]
        for steps in (2, 22):
            begin = time.monotonic()
            stack, _ = engine.train(trainings, task.batches([2000], steps), steps)
            wait()
            said[f"seconds of {steps} steps"] = time.monotonic() - begin
        begin = time.monotonic()
        engine.judge(stack, task.judge_samples(list(range(4))))
        wait()
        said["seconds of judging 4 images"] = time.monotonic() - begin
        del stack, engine
        print(json.dumps(said), memory(), flush=True)
    if "precision" in parts:
        said["precision"] = precision(folder, options.device, task, arms, options.steps)
    (options.out / "check.json").write_text(json.dumps(said), encoding="utf-8")
    return 0


def precision(folder: Path, device: str, task: object, arms: dict, steps: int) -> dict[str, dict[str, float]]:
    """By way: every arm's mean judging loss, and the largest change of one training's mean against `highest`."""
    trainings = [Training(arms[name], seed, RATE) for name in ARMS for seed in SEEDS]
    samples = task.judge_samples(task.split()["judging"])
    found: dict[str, dict[str, float]] = {}
    first = None
    for name, attention in WAYS:
        begin = time.monotonic()
        set_precision(name)
        engine = Engine(load_transformer(folder, device), attention=attention, mixed=name == "bf16")
        stack, _ = engine.train(trainings, task.batches(SEEDS, steps), steps)
        set_precision("highest")
        engine.mixed, engine.attention = False, "fused"
        mean_E = engine.judge(stack, samples).double().mean(1).cpu()
        by_arm = mean_E.view(len(ARMS), len(SEEDS)).mean(1)
        first = mean_E if first is None else first
        way = f"{name}, attention {attention}"
        found[way] = {arm: float(mean) for arm, mean in zip(ARMS, by_arm, strict=True)}
        found[way] |= {
            f"{arm} - uniform": float(mean - by_arm[0]) for arm, mean in zip(ARMS[1:], by_arm[1:], strict=True)
        }
        found[way]["largest change of a training"] = float((mean_E - first).abs().max())
        print(
            way,
            {key: round(value, 6) for key, value in found[way].items()},
            f"{time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
