"""The benchmarks run, their counters see what is planted, and their page says what their results say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))


def run(script: Path, *arguments: object) -> str:
    """A script in a process of its own; torch and diffusers warn a lot there, and here warnings are errors."""
    environment = os.environ | {
        "SIMPLETUNER_LAYERPROBE": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)]),
    }
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_analysis(tmp_path):
    run(BENCHMARKS / "analysis.py", "--samples", 400, "--large", 300, 600, "--out", tmp_path)
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["same_factors"]
    assert result["command"]["said"].endswith("gives all 529 modules the factor meant")
    assert result["command"]["seconds"] > 1 and result["command"]["peak_megabytes"] > 100
    assert list(result["slope"]) == ["300", "600"]
    assert all(way["seconds"] > 0 and way["extra_megabytes"] >= 0 for way in result["ways"].values())
    assert all(100 < size < 2000 for size in result["storage_bytes_per_sample"].values())


def test_the_notebook_written_plainly_sees_the_distances(tmp_path):
    """It is no copy of the package's result: other distances give other factors."""
    from analysis import BLOCKS, factors_plainly

    def factors(peak: int) -> list[int]:
        lines = []
        for number in range(40):
            values = {
                stream: [0.1 + 0.5 * (block == peak) + 0.001 * block for block in range(count)]
                for stream, count in (("hidden_states", BLOCKS["image"]), ("encoder_hidden_states", BLOCKS["text"]))
            }
            lines.append(json.dumps({"timestep": number / 39} | values))
        path = tmp_path / f"{peak}.jsonl"
        path.write_text("\n".join(lines))
        return factors_plainly(path)

    one, other = factors(5), factors(20)
    assert len(one) == 38 and one != other
    assert one[5] < one[20] and other[20] < other[5]  # the largest distance gets the most parameters


def test_startup(tmp_path):
    run(BENCHMARKS / "startup.py", "--pairs", 3, "--without-simpletuner", "--out", tmp_path)
    result = json.loads((tmp_path / "startup.json").read_text())
    assert result["autoload"]["without_ms"]["median"] > 0 and result["help_seconds"]["median"] > 0
    assert result["import_simpletuner"] is None


def test_a_failing_start_is_no_figure():
    from startup import run as start

    with pytest.raises(subprocess.CalledProcessError):
        start([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))


def test_stratified(tmp_path):
    from analysis import write_run

    for name in ("uniform", "stratified"):
        write_run(tmp_path / name, 600, 300)
    runs = (tmp_path / "uniform", tmp_path / "stratified")
    arguments = ("--samples", 10_000, "--out", tmp_path)
    run(BENCHMARKS / "stratified.py", *runs, "--what", "the same run twice", *arguments)
    result = json.loads((tmp_path / "stratified.json").read_text())
    assert result["recorded"]["times"] == 1 and result["recorded"]["stretches"] == [6, 6]
    low, high = result["recorded"]["interval"]
    assert low < 1 < high
    settled = result["recorded"]["until_settled"]
    assert settled["uniform"] == settled["stratified"] and sum(settled["uniform"]["filled"]) <= 600
    assert result["recorded"]["samples"] == [600, 600]
    # distances that follow sigma gain more
    assert result["made_up"]["0.9"]["times"] > result["made_up"]["0.0"]["times"]
    run(BENCHMARKS / "stratified.py", *arguments)
    again = json.loads((tmp_path / "stratified.json").read_text())
    assert again["recorded"] == result["recorded"]  # a recorded pair stays until another is measured


def test_stretches_end_when_the_factors_are_settled(tmp_path):
    """The first one, judged again from its samples alone, and the samples of the look before it."""
    from stratified import GROWTH, until_settled
    from synthetic_run import SD35_LARGE, write_run

    from simpletuner_layerprobe.analyse.bootstrap import confidence, tally
    from simpletuner_layerprobe.lokr.decision import of_preset
    from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run

    blocks = {stream: paths[:5] for stream, paths in SD35_LARGE.items()}
    run = write_run(tmp_path / "run", blocks, 4000, shards=1)
    lengths = until_settled(run)
    assert lengths and min(lengths) >= 100 and sum(lengths) <= 4000
    first, before = lengths[0], int(lengths[0] / GROWTH) - 20
    (rows,) = run.rows()

    def settled(samples: int) -> bool:
        folder = tmp_path / str(samples)
        create_run(folder, run.manifest)
        ShardWriter(folder, run.manifest, rank=0).write(rows.where(slice(samples)))
        bootstrap = tally(open_run(folder)).bootstrap(replicates=400)
        found = confidence(bootstrap, of_preset(run.manifest, None)(bootstrap))
        return not found.unsettled() and all(count_T.min() >= 10 for count_T in bootstrap.count_T.values())

    assert settled(first) and not settled(before)


def test_pairs_are_medians_of_ratios():
    from measure import paired

    base, other = iter([1.0, 2.0, 4.0]), iter([2.0, 4.0, 80.0])
    found = paired(lambda: {"wall": next(base)}, lambda: {"wall": next(other)}, 3)
    assert found["wall"]["ratio"] == 2 and found["wall"]["fastest_ratio"] == 2
    assert found["wall"]["base_seconds"] == 2 and found["wall"]["seconds"] == 4


def test_steps(simpletuner, tmp_path):
    """The scripts that need SimpleTuner's transformers, on tiny shapes, in one process."""
    environment = {"SIMPLETUNER_LAYERPROBE": "0"}
    result = simpletuner.run(tmp_path, "none", setup="run_steps.py:main", environment=environment)
    assert result.code == 0, result.log
    found = json.loads((tmp_path / "guards.json").read_text())
    # What was planted is seen, and the bare forward has none of it.
    assert found["syncs"] == {"bare": 0, "probe": 0, "two .item()": 2}
    assert found["kept_bytes"] == found["planted_bytes"]
    ways = found["distances"]
    assert len(ways["probe"]) == len(ways["item"]) == 5
    # float32's arccos near 1 is good to sqrt(2e-7)/pi, which is why the probe does without it
    for way in ("device", "cpu"):
        np.testing.assert_allclose(ways[way], ways["probe"], rtol=0, atol=1.5e-4)
    np.testing.assert_allclose(ways["item"], ways["probe last"], rtol=0, atol=1.5e-4)

    overhead = json.loads((tmp_path / "overhead.json").read_text())
    gpu = json.loads((tmp_path / "gpu.json").read_text())
    assert not gpu["fused_kernel"]  # a CPU has none
    assert overhead["ways"]["probe, both readings"]["syncs"] == 0
    assert overhead["ways"][".item() per block"]["syncs"] == 5  # 3 image and 2 text states
    assert gpu["tiny"] and [run["model"] for run in gpu["runs"]] == ["sd3.5-large", "flux.1-dev"]
    for one in gpu["runs"]:
        assert list(one["ways"]) == [*overhead["ways"], "probe, both readings, without the fused kernel"]
        assert all(way["device"]["seconds"] > 0 for way in one["ways"].values())


def test_page_is_in_step_with_the_results():
    from tables import page, renewed

    assert (ROOT / "docs" / "benchmarks.md").read_text() == page()
    readme = (ROOT / "README.md").read_text()
    assert renewed(readme) == readme


def test_a_missed_limit_says_so(tmp_path):
    from tables import END, START, page, renewed, short_table

    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    startup = json.loads((tmp_path / "startup.json").read_text())
    startup["help_seconds"]["median"] = 0.31
    (tmp_path / "startup.json").write_text(json.dumps(startup))
    overhead = json.loads((tmp_path / "overhead.json").read_text())
    clocks = overhead["ways"]["probe, both readings"]
    clocks["cpu"] |= {"ratio": 1.02, "fastest_ratio": 1.035}
    clocks["wall"] |= {"ratio": 1.04, "fastest_ratio": 1.035}
    (tmp_path / "overhead.json").write_text(json.dumps(overhead))
    (unsure,) = (line for line in page(tmp_path).splitlines() if "probe step, CPU time, width 1536" in line)
    assert unsure.endswith("| **not sure** |")
    (missed,) = (line for line in page(tmp_path).splitlines() if "the same by the clock" in line)
    assert missed.endswith("| **missed** |")
    assert "| `layerprobe --help` | 0.3 s | 0.31 s | **missed** |" in page(tmp_path)
    assert "0.31 s | **missed** |" in short_table(tmp_path)
    readme = renewed(f"before\n{START}\nstale\n{END}\nafter\n", tmp_path)
    assert readme.startswith("before\n") and readme.endswith("after\n") and "stale" not in readme and "0.31 s" in readme
    assert renewed("no place for it") == "no place for it"
    assert "**Not measured.**" in page(tmp_path)


def test_gpu_results_get_their_limits(tmp_path):
    """The table of a GPU's result, which no machine of ours has measured yet."""
    from tables import gpu, gpu_limits

    def way(ratio: float, extra: int = 0) -> dict[str, object]:
        clock = {"ratio": ratio, "ratio_quartiles": [ratio, ratio], "seconds": ratio, "base_seconds": 1.0}
        return {"device": clock, "extra_peak_bytes": extra, "syncs": 0}

    machine = json.loads((RESULTS / "startup.json").read_text())["machine"]
    ways = {
        "probe, both readings": way(1.02, 300),
        "training step, gradient checkpointing": way(4.08),
        "keep all states on the device": {"out_of_memory": True},
    }
    run = {"model": "m", "batch": 1, "ways": ways, "last_state_bytes": 100}
    result = {"machine": machine, "tiny": False, "fused_kernel": True, "runs": [run]}
    assert [limit.kept for limit in gpu_limits(result)] == [False, False, True, True]
    assert "| m | 1 | keep all states on the device | out of memory |" in gpu(result)
    assert "4.0 times | kept |" in gpu(result)
    assert "used its fused kernel" in gpu(result)
    assert "did **not** use its fused kernel" in gpu(result | {"fused_kernel": False})
