"""A short run of the fuzzer over every reader; `make fuzz` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_no_reader_breaks_or_hangs_on_changed_inputs():
    script = Path(__file__).parent / "fuzz" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--inputs", "5000", "--seed", "7"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout)
    assert len(found) == 6 and sum(one["inputs"] for one in found.values()) >= 5000
    for name, one in found.items():
        assert one["hangs"] == one["crashes"] == one["tracebacks"] == 0 and one["slowest_seconds"] < 5, name
        # It gets past the first check: some inputs are accepted, and some reach what the valid ones do not.
        assert 0 < one["refused"] < one["inputs"] and one["kept"] > 0, name
