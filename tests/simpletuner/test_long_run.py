"""Some of the steps that benchmarks/long_run.py takes a hundred thousand of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_run.py"
STEPS = 900


def test_a_training_process_stays_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", str(STEPS), "--flush-seconds", "0.1"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["samples"] == STEPS and result["images"] == 50
    assert result["batches"] > 10
    warm, end = result["states"][1], result["states"][-1]
    assert (warm["step"], end["step"]) == (STEPS // 5, STEPS)
    assert (end["threads"], end["files"], end["log_bytes"]) == (warm["threads"], warm["files"], warm["log_bytes"])
    # A step that kept one object would keep 720 of them; the rows since the last flush come and go.
    assert abs(end["objects"] - warm["objects"]) < 300
    # The allocator takes a few megabytes more once, within the first 20,000 steps.
    assert end["resident_kilobytes"] - warm["resident_kilobytes"] < 10_000
