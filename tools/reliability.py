"""Writes the tables of docs/reliability.md from what the fault tests and the fuzzer saw.

python tools/reliability.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def faults() -> str:
    results = json.loads((ROOT / "tests" / "faults" / "results.json").read_text())
    lines = ["| Fault | Times | Rows committed | Rows lost | What the user sees |", "|---|--:|--:|--:|---|"]
    for name, row in results.items():
        rows = ["-" if row[key] is None else f"{row[key]:,}" for key in ("committed", "lost")]
        seen = row["seen"].replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {name} | {row['tried']:,} | {rows[0]} | {rows[1]} | {seen} |")
    return "\n".join(lines)


def fuzzing() -> str:
    results = json.loads((ROOT / "tests" / "fuzz" / "results.json").read_text())
    lines = [
        "| Reader | Inputs | Refused in one line | Tracebacks | Crashes | Hangs | Slowest input |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ("inputs", "refused", "tracebacks", "crashes", "hangs")
    for name, row in results.items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:,}' for key in keys)} | {row['slowest_seconds']:.3f} s |")
    total = [f"{sum(row[key] for row in results.values()):,}" for key in keys]
    slowest = max(row["slowest_seconds"] for row in results.values())
    lines.append(f"| all | {' | '.join(total)} | {slowest:.3f} s |")
    return "\n".join(lines)


def main() -> None:
    path = ROOT / "docs" / "reliability.md"
    text = path.read_text()
    for name, table in (("faults", faults()), ("fuzzing", fuzzing())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, new=f"{begin}\n{table}\n{end}": new, text, flags=re.DOTALL)
        assert count == 1, name
    path.write_text(text)


if __name__ == "__main__":
    main()
