"""Where the fault tests leave what they saw, for the table in docs/reliability.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")


def record(fault: str, *, tried: int, committed: int | None, lost: int | None, seen: str) -> None:
    """Put one row of the table into the results, if LAYERPROBE_RECORD_FAULTS asks for it (`make faults` does).

    tried: how often the fault was caused. committed: rows that were safe when it came; lost: those of them that were
    not there afterwards; None where no rows are at stake. seen: the line that the user gets, paths shortened.
    """
    assert tried > 0 and "\n" not in seen, fault
    seen = re.sub(r"-start-[^ ]*?\.arrows", "-start-....arrows", seen)  # without the time and the random digits
    assert not lost, f"{fault}: {lost} committed rows lost"
    if os.environ.get("LAYERPROBE_RECORD_FAULTS") != "1":
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[fault] = {"tried": tried, "committed": committed, "lost": lost, "seen": seen}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
