"""What a probe step costs against the bare forward: time, peak memory, host synchronisations; on a CPU or a GPU.

    python benchmarks/steps.py                          a CPU: some blocks of SD3.5 Medium's width, one thread
    python benchmarks/steps.py --device cuda            a GPU: SD3.5 Large and Flux.1-dev, 1024 x 1024, batch 1 and 4
    python benchmarks/steps.py --device cuda --model sd3.5-large --batch 1 --without-training
    python benchmarks/steps.py --device cuda --kernel OTHER.py      the probe also with another angles_kernel.py


The denoisers are SimpleTuner's own classes with random weights; nothing is downloaded. Each way is paired and
interleaved with the bare forward on the same inputs, and medians of the pairs' ratios are shown. The result is written
after every way that was measured (results/steps-DEVICE.json). Before that, what the hooks of a block cost the host
(results/hooks-DEVICE.json).
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from denoisers import SHAPES, Subject, subject
from measure import ABLATED, PROBE, RESULTS, Times, device_name, machine, paired, save, timed
from torch.utils._python_dispatch import TorchDispatchMode
from ways import Probe, Step, Way, bare, host_us, other_kernel, ways

from simpletuner_layerprobe.probe.distances import Kernel

MODELS = {"cpu": ("sd3.5-medium", "sd3-small"), "cuda": ("sd3.5-large", "flux.1-dev")}


class CountSyncs(TorchDispatchMode):
    """Counts the dispatched operations whose result the host waits for: a number, or a shape that depends on values."""

    SYNCS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "is_nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.syncs += function.overloadpacket.__name__ in self.SYNCS
        return function(*args, **(kwargs or {}))


class Cpu:
    """One thread: with more, others on the machine decide the result."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def time(self, step: Step) -> Times:
        return timed(step)

    def peak_bytes(self, step: Step) -> int:
        """The most that torch's CPU allocator had given out at once during one step, beyond what it had before."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    def syncs(self, step: Step) -> int:
        """Synchronisations that the same step would make on a device."""
        with CountSyncs() as count:
            step()
        return count.syncs


class Cuda:
    """CUDA events around a step, the allocator's statistics, torch's sync debug mode."""

    def time(self, step: Step) -> Times:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return {"device": begin.elapsed_time(end) / 1000}

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def syncs(self, step: Step) -> int:
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(device: Cpu | Cuda, way: Way, target: Subject, pairs: int) -> dict[str, Any]:
    """One way against the bare forward: ratios of its pairs, peak bytes and synchronisations of a warm step."""
    with way(target) as step:
        step()  # the probe's first step learns which blocks work in place; compilers and caches warm up
        step()
        peak_bytes, syncs = device.peak_bytes(step), device.syncs(step)

    def timed_step(which: Way) -> Times:
        with which(target) as step:
            return device.time(step)

    ratios = paired(lambda: timed_step(bare), lambda: timed_step(way), pairs)
    return ratios | {"peak_bytes": peak_bytes, "syncs": syncs}


def measure_model(
    device: Cpu | Cuda,
    name: str,
    batch: int,
    pairs: int,
    training: bool,
    other: Kernel | None,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Every way of one model, handed to `keep` after each."""
    target = subject(name, batch, "cuda" if isinstance(device, Cuda) else "cpu")
    shape = SHAPES[name]
    width = shape.config["num_attention_heads"] * shape.config["attention_head_dim"]
    result: dict[str, Any] = {
        "model": name,
        "blocks": shape.config["num_layers"] + shape.config.get("num_single_layers", 0),
        "width": width,
        "tokens": {"image": (shape.side // 2) ** 2, "text": shape.text},
        "batch": batch,
        "state_bytes": 2 * batch * width * ((shape.side // 2) ** 2 + shape.text),
        "ways": {},
    }
    base = measure(device, bare, target, 1)
    result["bare"] = {"peak_bytes": base["peak_bytes"], "syncs": base["syncs"]}
    if isinstance(device, Cuda):
        result["bare"]["allocated_bytes"] = torch.cuda.max_memory_allocated()
    result["host_us_per_block"] = host_us(target)
    print(f"{name}, batch {batch}: the hooks of a block take {result['host_us_per_block']} us of the host", flush=True)
    for label, way in ways(target, training, other).items():
        slow = "training" in label or label == ABLATED
        try:
            found = measure(device, way, target, max(3, pairs // 4) if slow else pairs)
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        else:
            found["extra_peak_bytes"] = found["peak_bytes"] - base["peak_bytes"]
            found["syncs"] -= base["syncs"]
            clock = "device" if isinstance(device, Cuda) else "cpu"
            print(f"{name}, batch {batch}, {label}: {found[clock]['ratio']} of the bare forward", flush=True)
            seconds = found["device" if isinstance(device, Cuda) else "wall"]["seconds"]
            if label == PROBE:
                result["samples_per_second"] = round(batch / seconds, 3)
            if label == ABLATED:
                result["ablated_samples_per_second"] = round(batch / seconds, 4)
        result["ways"][label] = found
        keep(result)
        gc.collect()
        if isinstance(device, Cuda):
            torch.cuda.empty_cache()


def hooks(device: str, out: Path) -> None:
    """What the hooks of a block cost the host, in narrow models with as many blocks as the real ones."""
    found = {}
    for name in MODELS["cuda"]:
        target = subject(f"{name}, narrow", 1, device)
        found[name] = len(Probe(target).observer.blocks), host_us(target, 40)
        print(f"{name}: {found[name][1]} us of the host for the hooks of each of its {found[name][0]} blocks")
    save(f"hooks-{device}", {"machine": machine(device_name(device)), "models": found}, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--without-training", action="store_true", help="leave the training steps out")
    parser.add_argument("--kernel", type=Path, help="another angles_kernel.py to measure too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(device_name(options.device)), "runs": [], "complete": False}
    device = Cuda() if options.device == "cuda" else Cpu()
    hooks(options.device, options.out)
    other = other_kernel(options.kernel) if options.kernel else None
    runs: list[dict[str, Any]] = result["runs"]

    def keep(run: dict[str, Any]) -> None:
        if not runs or runs[-1] is not run:
            runs.append(run)
        save(f"steps-{options.device}", result, options.out)

    for batch in options.batch or ((1, 4) if options.device == "cuda" else (1,)):
        for name in options.model or MODELS[options.device]:
            measure_model(device, name, batch, options.pairs, not options.without_training, other, keep)
    result["complete"] = True
    save(f"steps-{options.device}", result, options.out)


if __name__ == "__main__":
    main()
