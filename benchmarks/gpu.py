"""Every figure that needs a GPU, from one call: the benchmarks one after the other, each with its share of the time.

    python benchmarks/gpu.py                            ten minutes, then a table of what was measured and what was not
    python benchmarks/gpu.py --minutes 25 --only steps --only loop
    python benchmarks/gpu.py --kernel before.py         the kernel of another angles_kernel.py beside this one, made by
        git show 8aa331e~1:simpletuner_layerprobe/probe/angles_kernel.py >before.py
    python benchmarks/gpu.py --device cpu               the same with tiny models: does it run from end to end?

A benchmark whose time is over is ended; its rows so far lie in results/, where `benchmarks/tables.py` makes
docs/costs.md and docs/bases.md from them. Nothing is downloaded; 20 GB of disk hold random weights meanwhile.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure import RESULTS, device_name
from tables import figures

HERE = Path(__file__).parent

Part = tuple[float, Sequence[str]]
"""Its share of the time beside the others', and its command."""


def parts(device: str, kernel: Path | None, gpus: int) -> dict[str, Part]:
    """What is measured on a device, in this order, with that many GPUs."""

    def command(script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(HERE / script), "--device", device, *arguments]

    if device == "cpu":
        return {
            "steps": (2, command("steps.py", "--model", "sd3-tiny", "--model", "flux-tiny", "--pairs", "2")),
            "loop": (1, command("loop.py", "--model", "tiny", "--steps", "12")),
            "bases": (2, command("bases.py", "--only", "no_change", "--only", "two ranks")),
        }
    other = ["--kernel", str(kernel)] if kernel else []
    found: dict[str, Part] = {
        "kernel": (1, [sys.executable, str(HERE / "kernel.py"), *other]),
        "steps": (4, command("steps.py", "--pairs", "10", "--without-training", *other)),
        "loop": (3, command("loop.py")),
        "bases": (3, command("bases.py", "--jobs", "6")),
    }
    if gpus > 1:
        found["loop on all GPUs"] = (2, command("loop.py", "--ranks", str(gpus)))
    return found


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def run(command: Sequence[str], seconds: float) -> str:
    """Why a command did not run to its end, "" if it did. What it started ends with it, and its temporary files go."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": temporary}, start_new_session=True)
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"ended with {code}" if code else ""


def run_all(chosen: Mapping[str, Part], out: Path, seconds: float) -> dict[str, str]:
    """Run the parts, each in its share of the time that those before it left. Gives, of those that failed, why."""
    end = time.monotonic() + seconds
    missing = {}
    shares = [share for share, _ in chosen.values()]
    for number, (name, (share, command)) in enumerate(chosen.items()):
        own = (end - time.monotonic()) * share / sum(shares[number:])
        print(f"\n{name}, {own:.0f} s", flush=True)
        why = run([*command, "--out", str(out)], own)
        if why:
            missing[name] = why
    return missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", action="append", help="one of the parts: kernel, steps, loop, bases")
    parser.add_argument("--kernel", type=Path, help="another angles_kernel.py to measure too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    card, gpus = device_name(options.device), gpu_count() if options.device == "cuda" else 0
    known = parts(options.device, options.kernel, gpus)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"--only is {', '.join(sorted(unknown))}; on this device there are {', '.join(known)}")
    chosen = {name: part for name, part in known.items() if name in (options.only or known)}
    begun = time.time()
    missing = run_all(chosen, options.out, options.minutes * 60)
    print(f"\n{card or 'CPU'}, {gpus} GPUs", *figures(options.device, options.out, begun), sep="\n")
    if gpus < 2:
        missing["several GPUs"] = f"there is {gpus}" if gpus else "there is none"
    for name, why in missing.items():
        print(f"not measured to the end: {name} ({why})")


if __name__ == "__main__":
    main()
