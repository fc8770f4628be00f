"""The benchmarks run, on shapes so small that their figures mean nothing, and the page is made from what they wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: object) -> None:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_steps_are_measured_and_written_after_every_way(tmp_path: Path) -> None:
    run("steps.py", "--model", "sd3-tiny", "--pairs", 2, "--out", tmp_path)
    result = json.loads((tmp_path / "steps-cpu.json").read_text())
    (model,) = result["runs"]
    assert result["complete"] and len(model["ways"]) == 10
    probe = model["ways"]["probe, both readings"]
    assert probe["syncs"] == 0 and model["ways"][".item() per block"]["syncs"] == 5
    # Out of time after the first way: what was measured stays.
    run("steps.py", "--model", "sd3-tiny", "--pairs", 2, "--seconds", 0, "--out", tmp_path / "cut")
    result = json.loads((tmp_path / "cut" / "steps-cpu.json").read_text())
    assert not result["complete"] and len(result["runs"][0]["ways"]) == 1


def test_analysis_agrees_with_the_notebook(tmp_path: Path) -> None:
    run("analysis.py", "--samples", 400, "--out", tmp_path)
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["same_factors"]
    assert "verified: " in result["command"]["said"]


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    run("tables.py", "--out", tmp_path / "costs.md")
    assert (tmp_path / "costs.md").read_text() == (ROOT / "docs" / "costs.md").read_text()
