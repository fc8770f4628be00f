"""The benchmarks run, on shapes so small that their figures mean nothing, and the page is made from what they wrote."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner_layerprobe.run.load import load_run

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_gpus_benchmarks_where_there_is_none(tmp_path: Path) -> None:
    said = run("gpu.py", "--device", "cpu", "--minutes", 60, "--only", "steps", "--out", tmp_path)
    result = json.loads((tmp_path / "steps-cpu.json").read_text())
    sd3, flux = result["runs"]
    assert result["complete"] and len(sd3["ways"]) == len(flux["ways"]) == 11
    assert 1 < sd3["ways"]["probe, and every block left out"]["cpu"]["ratio"] < 20
    probe = sd3["ways"]["probe, both readings"]
    assert probe["syncs"] == 0 and sd3["ways"][".item() per block"]["syncs"] == 5
    hooks = json.loads((tmp_path / "hooks-cpu.json").read_text())["models"]
    assert hooks["sd3.5-large"][0] == 38 and hooks["flux.1-dev"][0] == 57 and min(us for _, us in hooks.values()) > 0
    table = said[said.index("\nCPU, 0 GPUs\n") :].splitlines()
    assert re.match(
        r"sd3-tiny, 64 px, batch 1, cpu: .* a second, 2,000 samples in .* minutes; with every block", table[2]
    )
    assert any(re.match(r"SD3.5 Large, the hooks of each of 38 blocks: [0-9.]+ us", line) for line in table)
    assert any(
        re.match(r"flux-tiny, batch 1, probe, both readings: [0-9.]+ of the bare forward", line) for line in table
    )
    assert table[-1] == "not measured to the end: several GPUs (there is none)"


def test_a_part_that_is_cut_leaves_its_rows_and_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark_module: Callable[[str], Any]
) -> None:
    gpu = benchmark_module("gpu")
    child = tmp_path / "child"

    class Cut(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while not child.exists():  # the time is over once a row is written
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    script = 'echo "$TMPDIR" >"$1/row"; sleep 600 & echo $! >"$1/new"; mv "$1/new" "$1/child"; wait'
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Cut)
        assert gpu.run(["sh", "-c", script, "sh", str(tmp_path)], 90.0) == "cut after 90 s"
    assert not Path((tmp_path / "row").read_text().strip()).exists()
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 600) == "ended with 3"


def test_each_part_gets_its_share_of_what_those_before_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark_module: Callable[[str], Any]
) -> None:
    gpu = benchmark_module("gpu")
    clock, given = [0.0], {}

    def run(command: list[str], seconds: float) -> str:
        given[command[1].rsplit("/", 1)[1]] = seconds
        clock[0] += min(seconds, 50.0)
        return "cut after 50 s" if seconds == 50 else ""

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    two = gpu.parts("cuda", tmp_path / "before.py", 2)
    assert {"--kernel", str(tmp_path / "before.py")} <= set(two["kernel"][1]) & set(two["steps"][1])
    assert two.pop("loop on all GPUs")[1][-2:] == ["--ranks", "2"]
    assert gpu.run_all(two, tmp_path, 550) == {"kernel": "cut after 50 s"}
    assert given == {"kernel.py": 50, "steps.py": 200, "loop.py": 225, "bases.py": 400}


def test_analysis_agrees_with_the_notebook(tmp_path: Path) -> None:
    run("analysis.py", "--samples", 400, "--out", tmp_path)
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["same_factors"]
    assert "verified: " in result["command"]["said"]


def test_the_kernel_is_measured_on_a_gpu_only(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "kernel.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "torch sees no CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_row_of_the_kernel_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark_module: Callable[[str], Any]
) -> None:
    kernel, tables = benchmark_module("kernel"), benchmark_module("tables")
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
    assert len(calls) == 6
    assert rows[0]["other"]["differs"] < 1e-6 == rows[0]["kernel"]["differs"] + 1e-6
    assert rows[1]["other"]["differs"] < 1e-6  # the updates by torch's operations
    assert "1.0 x, differs by 0e+00, the other kernel    20.0 us" in tables.kernel_line(rows[0])
    result = {"machine": kernel.machine("a card"), "rows": rows, "copy_bytes_per_second": 4.3e12, "complete": False}
    page = tables.kernel(result)
    assert "A copy moves 4.3 TB/s here." in page and "Not all states" in page
    assert "| small | transposed | angle, norm, cosine | 20 us | 0.0 TB/s | 20 us | 1 x | 20 us |" in page


def test_the_pages_are_made_from_the_results(tmp_path: Path) -> None:
    run("tables.py", "--out", tmp_path)
    for name in ("costs.md", "bases.md"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()


def test_the_parts_of_a_step_add_up(
    simpletuner: object, tmp_path: Path, benchmark_module: Callable[[str], Any]
) -> None:
    loop = benchmark_module("loop")
    folder = tmp_path / "small"
    assert loop.made(simpletuner, "sd3-tiny", folder, "cpu") == "tiny-probe"
    found = loop.measured(simpletuner, folder, "tiny-probe", 8, "cpu", tmp_path)
    assert found["steps"] == 8 and set(found["parts"]) > {loop.FORWARD, loop.LOADING, *loop.PLUGIN, *loop.SIMPLETUNER}
    assert all(times["step_ms"] >= 0 for times in found["parts"].values())
    assert sum(times["step_ms"] for times in found["parts"].values()) == pytest.approx(found["step_ms"], rel=0.01)
    seen = (loop.HOOKS, "the probe: before and after a step", loop.FORWARD)
    assert all(found["parts"][part]["step_ms"] > 0 for part in seen)
    assert found["parts"][loop.LOADING]["first_ms"] > 0
    assert not (folder / loop.TIMES).exists()
    run = load_run(tmp_path / "run")
    assert len(run.manifest.streams[0].blocks) == 3 and set(run.facts["width"].tolist()) == {64}


def test_on_a_gpu_the_parts_are_told_by_the_steps_that_wait(benchmark_module: Callable[[str], Any]) -> None:
    loop = benchmark_module("loop")
    # Without waiting a step takes 100 ms, and the next batch seems to take most of it; then 110 ms.
    free = {loop.HOOKS: 0.004, "SimpleTuner: the next batch of its data loader": 0.09, loop.FORWARD: 0.006}
    waits = {loop.HOOKS: 0.008, "SimpleTuner: the next batch of its data loader": 0.01, loop.FORWARD: 0.092}
    walls = [0.5] * loop.FIRST + [0.1] * 3 + [0.11] * 2
    times = {"steps": [free] * 7 + [waits] * 2, "ends": list(itertools.accumulate(walls, initial=0.0))}
    found = loop.table(times, slice(loop.FIRST, 7), slice(7, None))
    parts = {part: times["step_ms"] for part, times in found["parts"].items()}
    assert found["step_ms"] == 100 and found["waiting_step_ms"] == 110 and found["plugin_share"] == 0.04
    assert found["plugin_start_seconds"] == 0  # the first steps' hooks take no longer
    assert parts[loop.HOOKS] == 4 and parts[loop.FORWARD] == 92
    assert parts["SimpleTuner: all else in its loop"] == pytest.approx(110 - 4 - 10 - 92)


def test_a_quantised_base_and_two_ranks_are_exact_and_a_base_that_cannot_start_says_why(
    simpletuner: object, tiny_sd3: Path, tmp_path: Path, benchmark_module: Callable[[str], Any]
) -> None:
    bases = benchmark_module("bases")

    def judged(options: dict[str, Any], ranks: int = 1) -> Any:
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        folder = Path(shutil.copytree(tiny_sd3, tmp_path / "tiny"))
        return bases.judged(simpletuner, folder, bases.SD3, options, "cpu", ranks)

    exact = judged(bases.BASES["int8-quanto"])
    assert exact.word == "exact" and exact.layers["QLinear"] > 50
    ranks = judged(bases.BASES[bases.RANKS], ranks=2)
    assert ranks.word == "exact" and ranks.said.endswith(" at most, 4 samples"), ranks
    fails = judged(bases.BASES["RamTorch"])
    assert fails.word == "fails" and "requires a CUDA or ROCm device" in fails.said
    refused = judged({"layerprobe_sigmas": "gauss"})
    assert refused.word == "refused" and refused.said.startswith("layerprobe_sigmas is 'gauss'")
    assert "No such file" in bases.make(simpletuner, "Unknown", tmp_path / "unknown")
