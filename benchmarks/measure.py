"""How the benchmarks measure: paired and interleaved, medians, and the machine in general words."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "simpletuner", "numpy", "safetensors", "lycoris-lora")
# Ways that the limits are about.
PROBE = "probe, both readings"
CHECKPOINTED = "training step, gradient checkpointing"
ABLATED = "probe, and every block left out"

Times = dict[str, float]


def timed(step: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Times:
    """Seconds of one step: of the clock, and of this process' CPU time. `wait` returns when the device is done."""
    wait()
    clock, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return {"wall": time.perf_counter() - clock, "cpu": time.process_time() - cpu}


def paired(measure_base: Callable[[], Times], measure: Callable[[], Times], rounds: int) -> dict[str, Any]:
    """`rounds` pairs, each of one step of the base and one of the other right after or right before it.

    Each pair gives one ratio; the order within the pair alternates. What else runs on the machine disturbs both halves
    of a pair alike, and the median leaves out the pairs in which it did not. `fastest_ratio` is that of the least
    disturbed step of each.
    """
    base, other = [], []
    for number in range(rounds):
        if number % 2:
            other.append(measure())
            base.append(measure_base())
        else:
            base.append(measure_base())
            other.append(measure())
    found: dict[str, Any] = {"pairs": rounds}
    for clock in base[0]:
        ratios = [b[clock] / a[clock] for a, b in zip(base, other, strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        found[clock] = {
            "base_seconds": round(statistics.median(a[clock] for a in base), 5),
            "seconds": round(statistics.median(b[clock] for b in other), 5),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_quartiles": [round(quarters[0], 4), round(quarters[2], 4)],
            "fastest_ratio": round(min(b[clock] for b in other) / min(a[clock] for a in base), 4),
        }
    return found


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles."""
    quarters = statistics.quantiles(values, n=4)
    return {
        "median": round(statistics.median(values), digits),
        "first_quartile": round(quarters[0], digits),
        "third_quartile": round(quarters[2], digits),
    }


def machine(device: str = "") -> dict[str, Any]:
    """The machine and the software, in general words: nothing that names this one computer."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _told("/proc/cpuinfo", "model name") or platform.processor() or "unknown processor",
        "matrix_units": "amx_bf16" in _told("/proc/cpuinfo", "flags").split(),
        "memory_gigabytes": round(int((_told("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024 / 1e9),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "device": device or "cpu",
        "versions": versions,
    }


def _told(path: str, field: str) -> str:
    """What Linux says of this field; "" elsewhere."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def device_name(device: str) -> str:
    """What `machine` calls a device, "" for a CPU. Raises SystemExit if there is no such device."""
    if device == "cpu":
        return ""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here")
    return torch.cuda.get_device_name()


def save(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write one benchmark's result as `name`.json: whoever ends the process now leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The result of one benchmark, None if there is none yet."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
