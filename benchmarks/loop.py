"""What a probe-only run's time goes to in SimpleTuner's own loop: the plugin's part of a step, and of the start.

    python benchmarks/loop.py                         the trained pipeline of examples/emoji, on a CPU
    python benchmarks/loop.py --device cuda           SD3.5 Large's real shapes, random weights, 1024 px, batch 1
    python benchmarks/loop.py --device cuda --ranks 2         the same on two GPUs
    python benchmarks/loop.py --model tiny            the tiny SD3 of examples/tiny_sd3.py, or one of denoisers.SHAPES
    python benchmarks/loop.py --folder F --env NAME   an environment of your own, with a real model

The real SimpleTuner runs; its functions and the plugin's are timed on the host, each without those inside it: on a CPU
by the process' CPU time, which other programs hardly change, on a GPU by the clock. There the host runs ahead of the
device, and what waits for it shows as the part that waits; so in the second half of the steps every part of
SimpleTuner's waits until the device is done. The parts come from there, how long a step takes from the first half.
Writes results/loop-DEVICE.json, with several ranks loop-DEVICE-RANKS.json.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from denoisers import SHAPES, denoiser
from measure import RESULTS, device_name, machine, save
from tables import loop_words

ROOT = Path(__file__).parent.parent
TIMES = "loop-times.json"
WAIT_FROM = "LAYERPROBE_WAIT_FROM"
"""The environment variable with the number of the first step in which the parts wait for the device."""
STEPS = 60
FIRST = 4
"""Steps of the start: files, compilers and caches are cold."""

HOOKS = "the probe: hooks and distances in the forward"
PLUGIN = {
    HOOKS: [
        ("simpletuner_layerprobe.probe.observer", "Observer", name)
        for name in ("_forward_starts", "_enter_block", "_leave_block", "_forward_ends")
    ],
    "the probe: a kernel's check and compilation": [("simpletuner_layerprobe.probe.distances", "", "device_kernel")],
    "the probe: before and after a step": [
        ("simpletuner_layerprobe.training.session", "Session", name)
        for name in ("arm", "forward", "commit", "draw_sigmas")
    ],
    "the probe: rows to disk": [("simpletuner_layerprobe.training.recorder", "Recorder", "flush")],
    "the probe: the start": [
        ("simpletuner_layerprobe.training.trainer", "", "start_session"),
        ("simpletuner_layerprobe.training.session", "Session", "_manifest"),
    ],
}
SIMPLETUNER = {
    "SimpleTuner: the next batch of its data loader": [
        (
            "simpletuner.helpers.data_backend.runtime.context_parallel_sync",
            "ContextParallelBatchSynchronizer",
            "fetch_batch",
        )
    ],
    "SimpleTuner: noise and conditions of a batch": [
        ("simpletuner.helpers.training.trainer", "Trainer", "prepare_batch")
    ],
    "SimpleTuner: the loss": [("simpletuner.helpers.training.trainer", "Trainer", "_compute_model_prediction_loss")],
}
FORWARD = "SimpleTuner: the forward"
LOADING = "SimpleTuner: models and caches, before its loop"


class Clock:
    """Seconds of each part in each step, without those of the parts inside it.

    From step `wait_from` on the parts wait for the GPU before and after, but the hooks in the forward: what their
    kernels take there belongs to the forward.
    """

    def __init__(self, wait_from: float) -> None:
        self.wait_from = wait_from
        self.now = time.process_time if wait_from == math.inf else time.perf_counter
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.ends: list[float] = [self.now()]
        self._inside: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._wait(part)
            began = self.now()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._wait(part)
                whole, inner = self.now() - began, self._inside.pop()
                self.steps[-1][part] += whole - inner
                if self._inside:
                    self._inside[-1] += whole

        return call

    def _wait(self, part: str) -> None:
        if len(self.steps) > self.wait_from and part != HOOKS:
            torch.cuda.synchronize()

    def loop_begins(self) -> None:
        self.steps[-1][LOADING] = self.now() - self.ends[0] - sum(self.steps[-1].values())

    def step_ended(self) -> None:
        self.steps.append(defaultdict(float))
        self.ends.append(self.now())


def watch() -> None:
    """Inside the training process, before it starts: time the parts, and leave TIMES behind."""
    import importlib

    clock = Clock(float(os.environ[WAIT_FROM]))
    for part, functions in (PLUGIN | SIMPLETUNER).items():
        for module_name, owner_name, name in functions:
            module = importlib.import_module(module_name)
            owner = getattr(module, owner_name) if owner_name else module
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    from simpletuner_layerprobe.training.session import Session

    commit, forward, recording = Session.commit, Session.forward, Session.recording

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.loop_begins()
        return recording(self, *args, **kwargs)

    def committed(self: Any) -> None:
        commit(self)
        clock.step_ended()

    def predicted(self: Any, model: Any, batch: dict[str, Any], predict: Callable[..., Any]) -> Any:
        return forward(self, model, batch, clock.timed(FORWARD, predict))

    Session.commit, Session.forward = committed, predicted  # type: ignore[method-assign]
    Session.recording = recorded  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == "0":
        atexit.register(lambda: Path(TIMES).write_text(json.dumps({"steps": clock.steps, "ends": clock.ends})))


def table(times: dict[str, Any], free: slice, waiting: slice) -> dict[str, Any]:
    """Milliseconds of each part: the mean of the steps that wait for the device, and the first steps in all.

    free, waiting: the steps that tell how long one takes, and those that tell its parts.
    """
    walls = [after - before for before, after in zip(times["ends"], times["ends"][1:], strict=False)]
    steps = times["steps"][: len(walls)]
    parts: dict[str, Any] = {}
    for part in (*PLUGIN, LOADING, *SIMPLETUNER, FORWARD):
        # The hooks never wait; where the others do, they would take the time of a device that has caught up.
        seen = steps[free if part == HOOKS else waiting]
        parts[part] = {
            "step_ms": round(1e3 * statistics.mean(step.get(part, 0.0) for step in seen), 3),
            "first_ms": round(1e3 * sum(step.get(part, 0.0) for step in steps[:FIRST]), 1),
        }
    whole = {"step_ms": 1e3 * statistics.mean(walls[waiting]), "first_ms": 1e3 * sum(walls[:FIRST])}
    told = {clock: sum(found[clock] for found in parts.values()) for clock in whole}
    rest = {clock: round(whole[clock] - told[clock], 3) for clock in whole}
    parts["SimpleTuner: all else in its loop"] = rest
    step_ms = 1e3 * statistics.mean(walls[free])
    plugin, first = (sum(parts[part][clock] for part in PLUGIN) for clock in ("step_ms", "first_ms"))
    return {
        "steps": len(walls),
        "parts": parts,
        "step_ms": round(step_ms, 3),
        "waiting_step_ms": round(whole["step_ms"], 3),
        "plugin_share": round(plugin / step_ms, 4),
        # What it takes in the first steps and before them beyond what it takes in every step.
        "plugin_start_seconds": round(max(0.0, first - FIRST * plugin) / 1e3, 3),
    }


def measured(
    simpletuner: Any, folder: Path, env: str, steps: int, device: str, temporary: Path, ranks: int = 1
) -> dict[str, Any]:
    """The parts of a probe-only run of so many steps, as `table` has them. Raises SystemExit if it fails."""
    config = folder / "config" / env / "config.json"
    batch = json.loads(config.read_text()).get("train_batch_size", 1) if config.exists() else 1
    half = (FIRST + steps) // 2
    started = simpletuner.start_ranks(
        folder,
        env,
        ranks,
        argv=[
            "--layerprobe=true",
            f"--layerprobe_samples={steps * batch * ranks}",
            "--layerprobe_ablation=none",
            f"--layerprobe_dir={temporary / 'run'}",
        ],
        setup="../benchmarks/loop.py:watch",
        environment={
            "ACCELERATE_USE_CPU": "1" if device == "cpu" else "0",
            WAIT_FROM: "inf" if device == "cpu" else str(half),
        },
    )
    for result in [rank.result() for rank in started]:
        if result.code:
            raise SystemExit(f"the run ended with {result.code}: {result.log[-600:]}")
    times = folder / TIMES
    later = slice(FIRST, None)
    free, waiting = (later, later) if device == "cpu" else (slice(FIRST, half), slice(half, None))
    found = table(json.loads(times.read_text()), free, waiting)
    times.unlink()
    rate = {} if device == "cpu" else {"samples_per_second": round(batch * ranks / found["step_ms"] * 1e3, 3)}
    return {"batch": batch, "ranks": ranks} | rate | found


def made(simpletuner: Any, model: str, folder: Path, device: str) -> str:
    """Make a folder for `simpletuner train`, and say which environment in it is meant."""
    from real import EXAMPLES

    if model == "emoji":
        shutil.copytree(EXAMPLES / "emoji", folder)
        subprocess.run([sys.executable, "unpack.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return "emoji-demo"
    simpletuner.pipeline(folder, EXAMPLES / "tiny_sd3.py", "--out", folder)
    if model != "tiny":
        real_shapes(folder, model, device)
    return "tiny-probe"


def real_shapes(folder: Path, name: str, device: str) -> None:
    """Give the tiny pipeline a transformer of an SD3 of denoisers.SHAPES, with random weights, and its resolution.

    The text encoders and the VAE stay tiny: their outputs are stored before the first step.
    """
    transformer = folder / "pipeline" / "transformer"
    tiny = json.loads((transformer / "config.json").read_text())
    text = {key: tiny[key] for key in ("joint_attention_dim", "pooled_projection_dim")}
    shape = SHAPES[name]
    shutil.rmtree(transformer)
    denoiser(replace(shape, config=shape.config | text), device).save_pretrained(transformer)
    if device == "cuda":
        torch.cuda.empty_cache()
    environment = folder / "config" / "tiny-probe"
    config, data = environment / "config.json", environment / "multidatabackend.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resolution": 8 * shape.side}))
    images, captions = json.loads(data.read_text())
    data.write_text(json.dumps([images | {"resolution": 8 * shape.side}, captions]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    models = ["emoji", "tiny", *(name for name, shape in SHAPES.items() if shape.family == "sd3")]
    parser.add_argument("--model", choices=models, help="emoji on a CPU, sd3.5-large on a GPU")
    parser.add_argument("--folder", type=Path, help="where `simpletuner train` finds an environment of your own")
    parser.add_argument("--env", default="tiny-probe")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with a GPU of its own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    name = device_name(options.device)
    if options.device == "cuda" and options.ranks > torch.cuda.device_count():
        parser.error(f"--ranks is {options.ranks}, and torch sees {torch.cuda.device_count()} GPUs")
    model = options.env if options.folder else options.model or ("emoji" if options.device == "cpu" else "sd3.5-large")
    sys.path.insert(0, str(ROOT / "tests"))
    from real import SimpleTuner

    with tempfile.TemporaryDirectory() as temporary:
        folder, env = options.folder, options.env
        simpletuner = SimpleTuner(Path(temporary, "server.txt"))
        try:
            if folder is None:
                folder = Path(temporary, "pipeline")
                env = made(simpletuner, model, folder, options.device)
            found = measured(simpletuner, folder, env, options.steps, options.device, Path(temporary), options.ranks)
        finally:
            simpletuner.close()
    for part, times in found["parts"].items():
        print(f"{part:50} {times['step_ms']:9.2f} ms a step {times['first_ms']:9.0f} ms in the first {FIRST}")
    print(loop_words({"model": model} | found))
    file = f"loop-{options.device}" + (f"-{options.ranks}" if options.ranks > 1 else "")
    save(file, {"machine": machine(name), "model": model} | found, options.out)


if __name__ == "__main__":
    main()
