"""Runs the benchmarks of a step on tiny shapes, and their counters on planted faults, inside a forked SimpleTuner.

Their JSON goes into the current folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu
import overhead
import torch
from denoisers import Subject, subject
from overhead import peak_bytes, syncs
from ways import Probe, Step, bare, item_per_block, kept

from simpletuner_layerprobe.probe.observer import Observer

PLANTED_BYTES = 1 << 20


@contextmanager
def two_items(one: Subject) -> Iterator[Step]:
    @torch.no_grad()
    def step() -> tuple[float, float]:
        state = one.forward()
        return state.sum().item(), state.max().item()

    yield step


@contextmanager
def keeps_a_state(one: Subject) -> Iterator[Step]:
    @torch.no_grad()
    def step() -> None:
        state = torch.empty(PLANTED_BYTES, dtype=torch.uint8)
        one.forward()
        del state

    yield step


def distances(one: Subject) -> dict[str, Any]:
    """The mean distances of every block in every way, image then text, and those of the last tokens, sorted."""
    observer = Observer(one.denoiser, one.entry)
    with observer, torch.no_grad():
        observer.begin(one.batch)
        one.forward()
        found = observer.finish()
    result: dict[str, Any] = {"probe": [], "probe last": []}
    for stream in ("image", "text"):
        result["probe"] += found[stream, "mean"].flatten().tolist()
        result["probe last"] += found[stream, "last"].flatten().tolist()
    result["probe last"].sort()
    for name, keep in (("device", lambda state: state), ("cpu", lambda state: state.to("cpu", copy=True))):
        with kept(keep)(one) as step:
            result[name] = [value for state_B in step() for value in state_B.tolist()]
    with item_per_block(one) as step:
        result["item"] = sorted(step())
    return result


def main() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    folder = Path.cwd()
    overhead.main(
        ["--shape", "sd3-tiny", "--narrow", "sd3-tiny", "--pairs", "2", "--training-pairs", "2", "--out", str(folder)]
    )
    gpu.main(["--device", "cpu", "--tiny", "--batch", "2", "--pairs", "2", "--out", str(folder)])
    one = subject("sd3-tiny", 1, "cpu")
    guards = {
        "syncs": {
            "bare": syncs(bare, one),
            "probe": syncs(Probe(one), one),
            "two .item()": syncs(two_items, one),
        },
        "planted_bytes": PLANTED_BYTES,
        "kept_bytes": peak_bytes(keeps_a_state, one) - peak_bytes(bare, one),
        "distances": distances(subject("sd3-tiny", 1, "cpu", torch.float32)),
    }
    (folder / "guards.json").write_text(json.dumps(guards))
    sys.exit(0)
