"""What the further readings cost: time and peak memory of a probed forward, with each of them and without."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from denoisers import SHAPES, Subject, subject
from measure import machine, paired, save, timed
from ways import Probe, Way, bare

PAIRS = (2, 4, 8)


def measure(name: str, device: str, rounds: int, count: int) -> dict[str, Any]:
    """Every way on one denoiser: its time beside the probe's own, and its extra peak memory."""
    one = subject(name, count, device)
    ways: dict[str, Way] = {
        "probe": Probe(one),
        "residual": Probe(one, residual=True),
        **{f"pairs {n}": Probe(one, pairs=n) for n in PAIRS},
        f"residual and pairs {PAIRS[-1]}": Probe(one, residual=True, pairs=PAIRS[-1]),
    }
    on_device = device != "cpu"
    wait = torch.cuda.synchronize if on_device else lambda: None
    peak = _device_peak if on_device else _host_peak
    bare_peak = peak(bare, one)
    result: dict[str, Any] = {"shape": name, "samples": count, "ways": {}}
    for label, way in ways.items():
        with way(one) as step:
            step()
            step()

        def once(way: Way) -> dict[str, float]:
            with way(one) as step:
                step()
                return timed(step, wait)

        found = paired(lambda: once(bare), lambda way=way: once(way), rounds)
        found["extra_peak_bytes"] = peak(way, one) - bare_peak
        result["ways"][label] = found
        print(
            f"  {label}: {found['wall']['ratio']} of the bare forward, {found['extra_peak_bytes']:,} bytes", flush=True
        )
    shape = SHAPES[name]
    width = shape.config["attention_head_dim"] * shape.config["num_attention_heads"]
    tokens = (shape.side // 2) ** 2 + shape.text
    result["state_bytes"] = 2 * count * width * tokens
    return result


def _host_peak(way: Way, one: Subject) -> int:
    from overhead import peak_bytes

    return peak_bytes(way, one)


def _device_peak(way: Way, one: Subject) -> int:
    with way(one) as step:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="sd3-small", choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="readings", help="name of the result file")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else ""
    result = {"machine": machine(device)}
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    result |= measure(arguments.shape, arguments.device, arguments.rounds, arguments.samples)
    save(arguments.name, result)


if __name__ == "__main__":
    main()
