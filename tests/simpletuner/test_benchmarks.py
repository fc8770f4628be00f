"""The benchmarks run, on shapes so small that their figures mean nothing, and the page is made from what they wrote."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_kernel_is_measured_on_a_gpu_only(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "kernel.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "torch sees no CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_of_the_kernel_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    kernel, tables = importlib.import_module("kernel"), importlib.import_module("tables")
    calls: list[object] = []
    monkeypatch.setattr(kernel, "microseconds", lambda call: (calls.append(call()) or 20.0, 5.0))
    monkeypatch.setattr(kernel, "CACHES_BYTES", 40_000)
    old = tmp_path / "angles_kernel.py"  # one that has the angles only
    old.write_text("from simpletuner_layerprobe.probe.angles import plain_angles as angles\n")
    plain = kernel.distances._plain_changes
    kernels = {"kernel": plain, "torch": plain, "other": kernel.other_kernel(old)}
    rows = [
        kernel.measured("small", (1, 40, 96), rows, updates, kernels, "cpu")
        for rows, updates in ((True, False), (False, True))
    ]
    assert len(calls) == 5 and "other" in rows[0] and "other" not in rows[1]
    assert rows[0]["other"]["differs"] < 1e-6 == rows[0]["kernel"]["differs"] + 1e-6
    assert "1.0 x, differs by 0e+00, the other kernel    20.0 us" in kernel.line(rows[0])
    result = {"machine": kernel.machine("a card"), "rows": rows, "copy_bytes_per_second": 4.3e12, "complete": False}
    page = tables.kernel(result)
    assert "A copy moves 4.3 TB/s here." in page and "Not all states" in page
    assert "| small | transposed | angle, norm, cosine | 20 us | 0.0 TB/s | 20 us | 1 x |" in page


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    run("tables.py", "--out", tmp_path / "costs.md")
    assert (tmp_path / "costs.md").read_text() == (ROOT / "docs" / "costs.md").read_text()
