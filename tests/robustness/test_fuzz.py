"""A short run of the fuzzer over every reader; `make fuzz` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_no_reader_breaks_or_hangs_on_changed_inputs():
    script = Path(__file__).parents[1] / "fuzz" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--inputs", "2500", "--seed", "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(done.stdout)
    assert len(results) == 6 and sum(result["inputs"] for result in results.values()) >= 2500
    for name, result in results.items():
        assert result["hangs"] == result["crashes"] == result["tracebacks"] == 0, name
        assert result["slowest_seconds"] < 5, name  # of CPU time
        # It gets past the first check: some inputs are accepted, and some reach what the valid ones do not.
        assert 0 < result["refused"] < result["inputs"] and result["kept"] > 0, name
