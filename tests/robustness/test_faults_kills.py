"""SIGKILL at random moments and at every single point, on the real writer and on every command that makes files."""

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
    kills = int(os.environ.get("LAYERPROBE_KILLS", "120"))
    script = Path(__file__).parent / "faults" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", str(kills)],
        capture_output=True,
        text=True,
        # One thread: a process with more must not be forked. In memory if there is such a folder: thousands of fsyncs.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["random"]["tried"] == kills and found["random"]["committed"] > 5 * kills
    record(
        "SIGKILL of the writer at random moments, a new one goes on in the same folder",
        tried=kills,
        committed=found["random"]["committed"],
        lost=found["random"]["lost"],
        seen=NOTHING,
    )
    points = found["points"]
    assert points["tried"] == 2 * sum(points["points"].values()) and points["committed"] > 500
    record(
        "SIGKILL and modelled power cut of the writer at each of its "
        f"{sum(points['points'].values())} calls of open, write, fsync, link, unlink and mkdir",
        tried=points["tried"],
        committed=points["committed"],
        lost=points["lost"],
        seen=NOTHING,
    )
    for name in ("import", "export", "lokr --env", "report"):
        assert found[name]["tried"] == 2 * found[name]["points"]["all"] > found[name]["unfinished"] > 0
        fault = f"SIGKILL and modelled power cut of `{name}` at each of its calls: its files whole or absent"
        record(fault, tried=found[name]["tried"], committed=None, lost=None, seen=AGAIN)
