"""What a probe-only run's time goes to in SimpleTuner's own loop: the plugin's part of a step, and of the start.

    python benchmarks/loop.py                                   the tiny SD3, on a CPU
    python benchmarks/loop.py --device cuda                     the same where a GPU is: the host's share at its worst
    python benchmarks/loop.py --folder F --env NAME --device cuda   an environment of your own, with a real model

The real SimpleTuner runs; its functions and the plugin's are timed on the host by the clock, each without those inside
it. On a GPU the host runs ahead of the device: what waits for it shows as the part that waits. Writes
results/loop-DEVICE.json.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, save

ROOT = Path(__file__).parent.parent
TIMES = "loop-times.json"
STEPS = 60
FIRST = 4
"""Steps of the start: files, compilers and caches are cold."""

PLUGIN = {
    "the probe: hooks and distances in the forward": [
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


class Clock:
    """Seconds of each part in each step, without those of the parts inside it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.ends: list[float] = [time.perf_counter()]
        self._inside: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole, inner = time.perf_counter() - began, self._inside.pop()
                self.steps[-1][part] += whole - inner
                if self._inside:
                    self._inside[-1] += whole

        return call

    def step_ended(self) -> None:
        self.steps.append(defaultdict(float))
        self.ends.append(time.perf_counter())


def watch() -> None:
    """Inside the training process, before it starts: time the parts, and leave TIMES behind."""
    import importlib

    clock = Clock()
    for part, functions in (PLUGIN | SIMPLETUNER).items():
        for module_name, owner_name, name in functions:
            module = importlib.import_module(module_name)
            owner = getattr(module, owner_name) if owner_name else module
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    from simpletuner_layerprobe.training.session import Session

    commit, forward = Session.commit, Session.forward

    def committed(self: Any) -> None:
        commit(self)
        clock.step_ended()

    def predicted(self: Any, model: Any, batch: dict[str, Any], predict: Callable[..., Any]) -> Any:
        return forward(self, model, batch, clock.timed(FORWARD, predict))

    Session.commit, Session.forward = committed, predicted  # type: ignore[method-assign]
    atexit.register(lambda: Path(TIMES).write_text(json.dumps({"steps": clock.steps, "ends": clock.ends})))


def table(times: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each part: the mean of the steps after the first ones, and the first steps in all."""
    walls = [after - before for before, after in zip(times["ends"], times["ends"][1:], strict=False)]
    steps = times["steps"][: len(walls)]
    parts: dict[str, Any] = {}
    for part in (*PLUGIN, *SIMPLETUNER, FORWARD):
        later = [step.get(part, 0.0) for step in steps[FIRST:]]
        parts[part] = {
            "step_ms": round(1e3 * statistics.mean(later), 3),
            "first_ms": round(1e3 * sum(step.get(part, 0.0) for step in steps[:FIRST]), 1),
        }
    whole = {"step_ms": 1e3 * statistics.mean(walls[FIRST:]), "first_ms": 1e3 * sum(walls[:FIRST])}
    told = {clock: sum(found[clock] for found in parts.values()) for clock in whole}
    rest = {clock: round(whole[clock] - told[clock], 3) for clock in whole}
    parts["SimpleTuner: all else in its loop"] = rest
    plugin = sum(parts[part]["step_ms"] for part in PLUGIN)
    return {
        "steps": len(walls),
        "parts": parts,
        "step_ms": round(whole["step_ms"], 3),
        "plugin_share": round(plugin / whole["step_ms"], 4),
        "plugin_start_seconds": round(sum(parts[part]["first_ms"] for part in PLUGIN) / 1e3, 3),
    }


def measured(simpletuner: Any, folder: Path, env: str, steps: int, device: str, temporary: Path) -> dict[str, Any]:
    """The parts of a probe-only run of so many steps, as `table` has them. Raises SystemExit if it fails."""
    result = simpletuner.run(
        folder,
        env,
        argv=["--layerprobe=true", f"--layerprobe_samples={steps}", f"--layerprobe_dir={temporary / 'run'}"],
        setup="../benchmarks/loop.py:watch",
        environment={"ACCELERATE_USE_CPU": "1" if device == "cpu" else "0"},
    )
    if result.code:
        raise SystemExit(f"the run ended with {result.code}: {result.log[-600:]}")
    times = folder / TIMES
    found = table(json.loads(times.read_text()))
    times.unlink()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="where `simpletuner train` finds the environment")
    parser.add_argument("--env", default="tiny-probe")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "tests"))
    from bases import device_name
    from pipelines import EXAMPLES, make_pipeline
    from real import SimpleTuner

    name = device_name(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            folder = Path(temporary, "tiny")
            make_pipeline(EXAMPLES / "tiny_sd3.py", "--out", folder)
        simpletuner = SimpleTuner(Path(temporary, "server.txt"))
        try:
            found = measured(simpletuner, folder, options.env, options.steps, options.device, Path(temporary))
        finally:
            simpletuner.close()
    for part, times in found["parts"].items():
        print(f"{part:50} {times['step_ms']:9.2f} ms a step {times['first_ms']:9.0f} ms in the first {FIRST}")
    print(f"the probe: {found['plugin_share']:.2%} of a step, {found['plugin_start_seconds']} s of the start")
    what = "the tiny SD3" if options.folder is None else options.env
    save(f"loop-{options.device}", {"machine": machine(name), "model": what} | found, options.out)


if __name__ == "__main__":
    main()
