"""The support table of docs/families.md, made from the family tests' own results.

python tools/families_table.py       runs the cases and rewrites the table
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "tests" / "simpletuner" / "families" / "run.py"
PAGE = ROOT / "docs" / "families.md"
START, END = "<!-- families: made by `make families` -->", "<!-- /families -->"
HEAD = (
    "| family | denoiser | blocks | streams | deviation | sigmas | ablation: deviation, forwards | LoKr modules |\n"
    + "| --- " * 8
    + "|\n"
)


def run(*names: str) -> list[dict]:
    """The lines of tests/simpletuner/families/run.py: of all families without names."""
    done = subprocess.run([sys.executable, str(RUNNER), *names], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if not lines:
        raise SystemExit(done.stderr[-4000:])
    return lines


def table(lines: list[dict]) -> str:
    """The Markdown table, between its two marks."""
    from simpletuner_layerprobe.probe.families import FAMILIES, REFUSED

    rows = {}
    for family in FAMILIES:
        runs = [line for line in lines if line.get("family") == family.name and "error" not in line]
        runs = [run for run in runs if not family.denoisers or run["denoiser"] in family.denoisers]
        if not runs:
            continue
        worst = max(max(run["deviation"].values()) for run in runs)
        blocks = ", ".join(f"`{entry.path}`" for entry in family.blocks)
        streams = " + ".join(runs[0]["blocks"])
        text = {"cross": " (text by cross-attention)", "none": " (no text)"}.get(family.text, "")
        sigmas = "any" if runs[0]["prescribed_deviation"] is not None else "`training` only"
        denoiser = ", ".join(dict.fromkeys(run["denoiser"] for run in runs))
        rows[family.name, denoiser] = (
            f"| {family.name} | {denoiser} | {blocks} | {streams}{text} | {bound(worst)} | {sigmas} "
            f"| {ablation([run['ablation'] for run in runs if run['ablation']])} "
            f"| {sum(run['wrong'] for run in runs)} wrong |\n"
        )
    for name, reason in REFUSED.items():
        rows[name, ""] = f"| {name} | | | | | | | refused: {reason} |\n"
    return START + "\n" + HEAD + "".join(rows[key] for key in sorted(rows)) + END


def ablation(runs: list[dict]) -> str:
    """The deviation of the worst case; in the first one, the forwards with reuse and without."""
    worst = max(run["ablation_deviation"] for run in runs)
    return f"{bound(worst)}, {runs[0]['forwards']:.3g} of {runs[0]['naive_forwards']:.0f}"


def bound(deviation: float) -> str:
    """The deviation as the tests can promise it on every machine."""
    return "< 5e-7" if deviation < 2.5e-7 else "< 2e-6" if deviation <= 2e-6 else f"{deviation:.1e}"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(START, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(before + table(run()) + after, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
