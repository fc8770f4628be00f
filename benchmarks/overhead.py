"""What a step costs on a CPU: time, peak memory and host synchronisations of every way, on one small SD3."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from denoisers import SHAPES, Subject, subject
from measure import machine, paired, save, timed
from torch.utils._python_dispatch import TorchDispatchMode
from ways import Way, bare, ways

# Operations whose result the host has to wait for: a number, or a tensor whose shape depends on values.
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "is_nonzero"}


class Count(TorchDispatchMode):
    """Counts the dispatched operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.syncs += function.overloadpacket.__name__ in SYNCS
        return function(*args, **(kwargs or {}))


def syncs(way: Way, one: Subject) -> int:
    """Host synchronisations of one warm step."""
    with way(one) as step:
        step()
        with Count() as count:
            step()
    return count.syncs


def peak_bytes(way: Way, one: Subject) -> int:
    """The most that torch's CPU allocator had given out at once during one warm step, beyond what it had before."""
    with way(one) as step:
        step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def overhead(name: str, pairs: int, training_pairs: int) -> dict[str, Any]:
    """Every way against the bare forward, on one thread: with more, others on the machine decide the result."""
    one = subject(name, 1, "cpu")
    shape = SHAPES[name]
    width = one.denoiser.config.caption_projection_dim
    state_bytes = 2 * width * ((shape.side // 2) ** 2 + shape.text)
    result: dict[str, Any] = {
        "model": f"SD3 of {shape.config['num_layers']} blocks, width {width}, {(shape.side // 2) ** 2} image and "
        f"{shape.text} text tokens, bf16, batch 1, one thread",
        "block_state_bytes": state_bytes,
        "ways": {},
    }
    base_peak, base_syncs = peak_bytes(bare, one), syncs(bare, one)
    result["bare"] = {"peak_bytes": base_peak, "syncs": base_syncs}
    for label, way in ways(one).items():
        with way(one) as step:
            step()
            step()

        def measure(way: Way = way) -> dict[str, float]:
            with way(one) as step:
                return timed(step)

        found = paired(lambda: measure(bare), measure, training_pairs if "training" in label else pairs)
        found["extra_peak_bytes"] = peak_bytes(way, one) - base_peak
        found["extra_peak_states"] = round(found["extra_peak_bytes"] / state_bytes, 3)
        found["syncs"] = syncs(way, one) - base_syncs
        result["ways"][label] = found
        print(f"  {label}: {found['wall']['ratio']} of the bare forward, {found['syncs']} syncs", flush=True)
    return result


def memory_by_blocks(counts: tuple[int, ...]) -> dict[str, int]:
    """Extra peak memory of the probe in bytes, for denoisers that differ in their number of blocks only."""
    from denoisers import sd3
    from ways import Probe

    found = {}
    for count in counts:
        SHAPES["blocks"] = sd3(256, count, 32, 77, 64, 32, 4)
        one = subject("blocks", 1, "cpu")
        found[str(count)] = peak_bytes(Probe(one), one) - peak_bytes(bare, one)
    SHAPES.pop("blocks")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="sd3-small", choices=[name for name in SHAPES if name.startswith("sd3")])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--training-pairs", type=int, default=5)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    with threads(1):
        result |= overhead(arguments.shape, arguments.pairs, arguments.training_pairs)
        result["probe_extra_peak_bytes_by_blocks"] = memory_by_blocks((4, 16))
        result["probe_extra_peak_bytes_by_blocks_state"] = 2 * 256 * (16 * 16 + 77)
    save("overhead", result)


if __name__ == "__main__":
    main()
