"""The benchmarks run, on shapes so small that their figures mean nothing, and the page is made from what they wrote."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    assert result["complete"] and len(model["ways"]) == 11
    assert 1 < model["ways"]["probe, and every block left out"]["cpu"]["ratio"] < 20
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


def test_the_pages_are_made_from_the_results(tmp_path: Path) -> None:
    run("tables.py", "--out", tmp_path)
    for name in ("costs.md", "bases.md"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()


def test_the_parts_of_a_step_add_up(simpletuner: object, tiny_sd3: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    loop = importlib.import_module("loop")
    folder = Path(shutil.copytree(tiny_sd3, tmp_path / "tiny"))
    found = loop.measured(simpletuner, folder, "tiny-probe", 8, "cpu", tmp_path)
    assert found["steps"] == 8 and set(found["parts"]) > {loop.FORWARD, *loop.PLUGIN, *loop.SIMPLETUNER}
    assert all(times["step_ms"] >= 0 for times in found["parts"].values())
    assert sum(times["step_ms"] for times in found["parts"].values()) == pytest.approx(found["step_ms"], rel=0.01)
    seen = ("the probe: hooks and distances in the forward", "the probe: before and after a step", loop.FORWARD)
    assert all(found["parts"][part]["step_ms"] > 0 for part in seen)
    assert not (folder / loop.TIMES).exists()


def test_a_quantised_base_is_exact_and_one_that_cannot_start_says_why(
    simpletuner: object, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bases = importlib.import_module("bases")
    tiny = Path(shutil.copytree(tiny_sd3, tmp_path / "tiny"))
    exact = bases.judged(simpletuner, tiny, bases.BASES["int8-quanto"], "cpu")
    assert exact.word == "exact" and exact.layers["QLinear"] > 50
    fails = bases.judged(simpletuner, tiny, bases.BASES["RamTorch"], "cpu")
    assert fails.word == "fails" and "requires a CUDA or ROCm device" in fails.said
    refused = bases.judged(simpletuner, tiny, {"layerprobe_sigmas": "gauss"}, "cpu")
    assert refused.word == "refused" and refused.said.startswith("layerprobe_sigmas is 'gauss'")
