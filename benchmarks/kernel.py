"""The fused kernel beside torch's own operations on the hidden states of real models; needs a GPU, takes a minute.

    python benchmarks/kernel.py
    python benchmarks/kernel.py --kernel OTHER.py       another angles_kernel.py beside it, in the same call

Random bf16 states, in so many copies that no cache holds them. Device time: the launches are queued behind a pause, so
that the host is ahead; the host's time per call stands beside it. The result is written after every row
(results/kernel-cuda.json).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, device_name, machine, save
from tables import kernel_line
from ways import other_kernel

from simpletuner_layerprobe.probe import distances
from simpletuner_layerprobe.probe.distances import Kernel

STATES = {
    "SD3.5 Large image, batch 1": (1, 4096, 2432),
    "SD3.5 Large image, batch 4": (4, 4096, 2432),
    "SD3.5 Large image, 512 px": (1, 1024, 2432),
    "SD3.5 Large text": (1, 231, 2432),
    "Flux.1-dev image": (1, 4096, 3072),
    "video": (1, 32760, 5120),
}
CALLS = 20
CACHES_BYTES = 300_000_000

Call = Callable[[], object]


def microseconds(call: Call) -> tuple[float, float]:
    """Of one call: the device's time and the host's, medians over a few rounds."""
    device, host = [], []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(40_000_000)  # cycles: longer than the host takes for all calls
        begin.record()
        clock = time.perf_counter()
        for _ in range(CALLS):
            call()
        host.append((time.perf_counter() - clock) / CALLS * 1e6)
        end.record()
        end.synchronize()
        device.append(begin.elapsed_time(end) / CALLS * 1e3)
    return round(statistics.median(device), 1), round(statistics.median(host), 1)


def in_turn(kernel: Kernel, pairs: list[tuple[torch.Tensor, torch.Tensor]], updates: bool) -> Call:
    """The kernel on the next pair of states at every call."""
    turn = itertools.cycle(pairs)
    return lambda: kernel(*next(turn), updates)


def measured(
    name: str, shape: tuple[int, int, int], rows: bool, updates: bool, kernels: dict[str, Kernel], device: str
) -> dict[str, Any]:
    """One row of the table. rows: a token's numbers are neighbours in memory, else tokens are."""
    state_bytes = 2 * math.prod(shape)
    copies = max(1, CACHES_BYTES // state_bytes // 2)
    pairs = []
    for _ in range(copies):
        before, after = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        after = before + 0.3 * after
        pairs.append((before, after) if rows else (before.mT.contiguous().mT, after.mT.contiguous().mT))
    row: dict[str, Any] = {"states": name, "rows": rows, "updates": updates, "state_bytes": state_bytes}
    expected = distances._plain_changes(*pairs[0], updates)
    for label, kernel in kernels.items():
        made = kernel(*pairs[0], updates)
        apart = max(float((a - b).abs().max()) for a, b in zip(made, expected, strict=True))
        device_us, host_us = microseconds(in_turn(kernel, pairs, updates))
        row[label] = {"device_us": device_us, "host_us": host_us, "differs": apart}
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="another angles_kernel.py to measure too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    name = device_name("cuda")
    from simpletuner_layerprobe.probe.angles_kernel import changes

    kernels: dict[str, Kernel] = {"kernel": changes, "torch": distances._plain_changes}
    if options.kernel:
        kernels["other"] = other_kernel(options.kernel)
    result: dict[str, Any] = {"machine": machine(name), "rows": [], "complete": False}
    source, target = (torch.empty(CACHES_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    result["copy_bytes_per_second"] = 2 * CACHES_BYTES / microseconds(lambda: target.copy_(source))[0] * 1e6
    print(f"a copy moves {result['copy_bytes_per_second'] / 1e12:.1f} TB/s")
    for (states, shape), rows, updates in itertools.product(STATES.items(), (True, False), (False, True)):
        result["rows"].append(measured(states, shape, rows, updates, kernels, "cuda"))
        print(kernel_line(result["rows"][-1]), flush=True)
        save("kernel-cuda", result, options.out)
    result["complete"] = True
    save("kernel-cuda", result, options.out)


if __name__ == "__main__":
    main()
