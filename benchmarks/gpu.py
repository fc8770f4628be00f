"""What a step costs on a GPU, at the real shapes of SD3.5 Large and Flux.1-dev with random bf16 weights.

    python benchmarks/gpu.py                       both models, 1024 x 1024, batch 1 and 4; needs about 60 GB
    python benchmarks/gpu.py --model sd3.5-large --batch 1 --without-training
    python benchmarks/gpu.py --device cpu --tiny   the same code on tiny shapes, as its test runs it: no figures

Needs torch with CUDA, diffusers, this package and SimpleTuner (its transformer classes; nothing is downloaded).
Times are CUDA events around one step, paired and interleaved with the bare forward; memory is torch's allocator
statistics; host synchronisations are counted by torch's sync debug mode. Writes results/gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from denoisers import Subject, subject
from measure import PROBE, RESULTS, Times, machine, paired, save
from ways import Probe, Way, bare, ways, without_kernel

from simpletuner_layerprobe.probe.angles import plain_angles
from simpletuner_layerprobe.probe.fused import fused_angles

PLAIN_PROBE = f"{PROBE}, without the fused kernel"
MODELS = {"sd3.5-large": "sd3-tiny", "flux.1-dev": "flux-tiny"}


class Device:
    """The clock, the allocator and the sync counter of a device; on a CPU only the clock works."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = torch.device(name).type == "cuda"

    def timed(self, step: Callable[[], object]) -> Times:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return {"device": time.perf_counter() - start}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return {"device": begin.elapsed_time(end) / 1000}

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """The most that was allocated at once during one warm step, beyond what was before."""
        if not self.cuda:
            return None
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def syncs(self, step: Callable[[], object]) -> int | None:
        """Calls in one warm step that made the host wait for the device."""
        if not self.cuda:
            return None
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in caught)

    def words(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def measured(device: Device, way: Way, one: Subject, pairs: int) -> dict[str, Any]:
    """One way against the bare forward. A way that does not fit into the memory is reported so."""
    try:
        with way(one) as step:
            step()  # the probe's first step finds out which blocks work in place; compilers and caches warm up
            peak, syncs = device.peak_bytes(step), device.syncs(step)

        def measure(which: Way) -> Times:
            with which(one) as step:
                return device.timed(step)

        found = paired(lambda: measure(bare), lambda: measure(way), pairs)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    return found | {"peak_bytes": peak, "syncs": syncs}


def measure_model(device: Device, name: str, shape: str, batch: int, pairs: int, training: bool) -> dict[str, Any]:
    one = subject(shape, batch, device.name)
    with bare(one) as step:
        for _ in range(3):
            step()
        result: dict[str, Any] = {
            "model": name,
            "batch": batch,
            "bare": {"peak_bytes": device.peak_bytes(step), "syncs": device.syncs(step)},
            "ways": {},
        }
    states: list[int] = []
    root = one.denoiser.norm_out.register_forward_pre_hook(lambda _, args: states.append(args[0].nbytes))
    with bare(one) as step:
        step()
    root.remove()
    result["last_state_bytes"] = states[0]
    for label, way in (ways(one) | {PLAIN_PROBE: without_kernel(Probe(one))}).items():
        if "training" in label and not training:
            continue
        found = measured(device, way, one, max(3, pairs // 3) if "training" in label else pairs)
        if found.get("peak_bytes") is not None:
            found["extra_peak_bytes"] = found["peak_bytes"] - result["bare"]["peak_bytes"]
            found["syncs"] -= result["bare"]["syncs"]
        result["ways"][label] = found
        ratio = "out of memory" if "out_of_memory" in found else f"{found['device']['ratio']} of the bare forward"
        print(f"{name}, batch {batch}, {label}: {ratio}", flush=True)
        device.free()
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: only whether it runs")
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--without-training", action="store_true", help="leave the training steps out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.json")
    options = parser.parse_args(arguments)
    device = Device(options.device)
    if device.cuda and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    runs = []
    for name in options.model or MODELS:
        for batch in options.batch or (1, 4):
            shape = MODELS[name] if options.tiny else name
            runs.append(measure_model(device, name, shape, batch, options.pairs, not options.without_training))
            device.free()
    kernel = fused_angles(torch.device(options.device), torch.bfloat16, torch.bfloat16, plain_angles) is not None
    result = {"machine": machine(device.words()), "tiny": options.tiny, "fused_kernel": kernel, "runs": runs}
    path = save("gpu", result, options.out)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
