"""What a step costs on a CPU: time, peak memory and host synchronisations of every way, on a few blocks of an SD3."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from denoisers import SHAPES, Subject, subject
from measure import PROBE, RESULTS, machine, paired, save, timed
from torch.utils._python_dispatch import TorchDispatchMode
from ways import Probe, Way, bare, probes, ways

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


def words(name: str) -> str:
    shape = SHAPES[name]
    return (
        f"SD3 of {shape.config['num_layers']} blocks, width {shape.config['caption_projection_dim']}, "
        f"{(shape.side // 2) ** 2} image and {shape.text} text tokens, bf16, batch 1, one thread"
    )


def state_bytes(name: str) -> int:
    """Bytes of one block's image and text states."""
    shape = SHAPES[name]
    return 2 * shape.config["caption_projection_dim"] * ((shape.side // 2) ** 2 + shape.text)


def against_bare(way: Way, one: Subject, pairs: int) -> dict[str, Any]:
    with way(one) as step:
        step()
        step()

    def measure(which: Way) -> dict[str, float]:
        with which(one) as step:
            return timed(step)

    return paired(lambda: measure(bare), lambda: measure(way), pairs)


def overhead(name: str, pairs: int, training_pairs: int) -> dict[str, Any]:
    """Every way against the bare forward, on one thread: with more, others on the machine decide the result."""
    one = subject(name, 1, "cpu")
    base_peak, base_syncs = peak_bytes(bare, one), syncs(bare, one)
    result: dict[str, Any] = {
        "model": words(name),
        "block_state_bytes": state_bytes(name),
        "bare": {"peak_bytes": base_peak, "syncs": base_syncs},
        "ways": {},
    }
    for label, way in ways(one).items():
        few = training_pairs if "training" in label else max(2, pairs // 2)
        found = against_bare(way, one, pairs if label == PROBE else few)
        found["extra_peak_bytes"] = peak_bytes(way, one) - base_peak
        found["extra_peak_states"] = round(found["extra_peak_bytes"] / state_bytes(name), 3)
        found["syncs"] = syncs(way, one) - base_syncs
        result["ways"][label] = found
        print(f"  {label}: {found['cpu']['ratio']} of the bare forward, {found['syncs']} syncs", flush=True)
    return result


def memory_by_blocks(counts: tuple[int, ...]) -> dict[str, Any]:
    """Extra peak memory of the probe in bytes, for denoisers that differ in their number of blocks only."""
    from denoisers import sd3

    found = {}
    for count in counts:
        SHAPES["blocks"] = sd3(256, count, 32, 77, 64, 32, 4)
        one = subject("blocks", 1, "cpu")
        found[str(count)] = peak_bytes(Probe(one), one) - peak_bytes(bare, one)
    return {"extra_peak_bytes": found, "block_state_bytes": state_bytes("blocks")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = [name for name in SHAPES if name.startswith("sd3")]
    parser.add_argument("--shape", default="sd3.5-medium", choices=shapes)
    parser.add_argument("--narrow", default="sd3-small", choices=shapes, help="a narrower one, for the probe alone")
    parser.add_argument("--pairs", type=int, default=25, help="of the probe; the others get half")
    parser.add_argument("--training-pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for overhead.json")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine()}
    with threads(1):
        result |= overhead(options.shape, options.pairs, options.training_pairs)
        one = subject(options.narrow, 1, "cpu")
        found = against_bare(probes(one)[PROBE], one, options.pairs)
        print(f"  {PROBE}, narrow: {found['cpu']['ratio']} of the bare forward", flush=True)
        result["narrow"] = {"model": words(options.narrow), PROBE: found}
        result["by_blocks"] = memory_by_blocks((4, 16))
    save("overhead", result, options.out)


if __name__ == "__main__":
    main()
