"""A short run of the kills; LAYERPROBE_KILLS=1000 makes it the long one (`make faults`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from faults.table import record

NOTHING = "nothing: the process is gone; the next start goes on"
AGAIN = "nothing: the process is gone; the command can be given again"


def test_kills_lose_no_committed_row_and_leave_no_half_file():
    kills = int(os.environ.get("LAYERPROBE_KILLS", "36"))
    every = 1 if kills >= 1000 else 5
    script = Path(__file__).parents[1] / "faults" / "kills.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--kills", str(kills), "--every", str(every)],
        capture_output=True,
        text=True,
        # One thread: a process with more must not be forked. In memory if there is such a folder: thousands of fsyncs.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert results["random"]["tried"] == kills
    record(
        "SIGKILL of the writer at random moments, a new one goes on in the same folder",
        tried=kills,
        committed=results["random"]["committed"],
        lost=results["random"]["lost"],
        seen=NOTHING,
    )
    points = results["points"]
    calls = sum(points["points"].values())
    assert points["tried"] >= 3 * (calls // every - 1) and points["committed"] > 500 // every
    record(
        f"SIGKILL and two kinds of modelled power cut of the writer at each of its {calls} points",
        tried=points["tried"],
        committed=points["committed"],
        lost=points["lost"],
        seen=NOTHING,
    )
    for name in ("import", "export", "merge"):
        assert results[name]["tried"] > results[name]["unfinished"] > 0
        fault = f"SIGKILL and two kinds of modelled power cut of `{name}` at each of its points: whole or absent"
        record(fault, tried=results[name]["tried"], committed=None, lost=None, seen=AGAIN)
