"""Whether a training process stays as it is over 100,000 steps: memory, Python objects, threads, file handles, output.

    python benchmarks/long_run.py [--steps 100000]

The loop's own step on a small real SD3 transformer: a forward between `arm` and `commit` of the probe's session, which
checks the noise, flushes, counts and writes as in a training. What it was after the first tenth is compared with the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from denoisers import subject

from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.session import Session

IMAGES = 50


def batch_of(step: int) -> dict[str, Any]:
    """What of SimpleTuner's prepared batch of one image the session looks at."""
    sigma = torch.rand(1)
    latents, noise = torch.randn(2, 1, 4, 16, 16).unbind()
    return {
        "sigmas": sigma,
        "latents": latents,
        "noise": noise,
        "noisy_latents": (1 - sigma) * latents + sigma * noise,
        "data_backend_id": "photos",
        "filepaths": [f"{step % IMAGES}.jpg"],
        "prompts": ["a photograph"],
    }


def state() -> dict[str, int]:
    """This process now. resident_kilobytes by Linux' account."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_kilobytes": pages * resource.getpagesize() // 1024,
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }


def steps(folder: Path, count: int, flush_seconds: float) -> dict[str, Any]:
    """Run `count` steps. Returns the `state` after each tenth of them, and the run's samples, batches and images."""
    marks = [count * tenth // 10 for tenth in range(1, 11)]
    states = []
    torch.set_num_threads(1)
    tiny = subject("sd3-tiny", 1, "cpu", torch.float32)
    session = Session(ProbeSettings(directory=str(folder / "run"), samples=0, flush_seconds=flush_seconds), {})
    session.family = tiny.entry
    log = io.StringIO()
    model = SimpleNamespace(get_prediction_target=lambda batch: batch["latents"])
    recording = session.recording(tiny.denoiser, "", {}, {}, to_come=count)
    with contextlib.redirect_stdout(log), torch.no_grad(), recording:
        for step in range(1, count + 1):
            session.arm()
            session.forward(model, tiny.batch | batch_of(step), lambda batch: {"model_prediction": tiny.forward()})
            session.commit()
            if step in marks:
                states.append({"step": step} | state() | {"log_bytes": len(log.getvalue())})
    run = load_run(folder / "run")
    batches = sum(file.batches for file in run.files)
    return {"states": states, "samples": run.samples, "batches": batches, "images": run.images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--flush-seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = steps(Path(folder), arguments.steps, arguments.flush_seconds)
    print(json.dumps(result | {"seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
