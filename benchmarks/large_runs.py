"""Time and peak memory of every command on runs of up to 10 million samples with 75 distances (38 image, 37 text).

    python benchmarks/large_runs.py FOLDER [--samples 1000000 10000000] [--rows-per-shard 1000]

FOLDER is on a disk with room for three copies of the largest run, 3.3 GB for 10 million samples; it is removed at the
end. Each command is a process of its own; memory is the peak of its resident set, with everything that it imports. An
export is measured on the smallest run alone: 10 million records take 8 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from analysis import BLOCKS, write_run
from measure import machine, save

from simpletuner_layerprobe.run.records import open_run

CLI = (sys.executable, "-m", "simpletuner_layerprobe.cli")


def measured(*command: object) -> dict[str, float]:
    """Seconds and peak megabytes of a process, its children included; raises if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {said[-2000:]}")
    return {"seconds": round(seconds, 1), "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6)}


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    """What is measured, in this order, on the run `folder`/run; `folder`/small is another run of 1,000 samples."""
    run = folder / "run"
    return {
        "status": ("status", run),
        "heatmap": ("heatmap", run, "--out", folder / "figures"),
        "findings": ("findings", run),
        "report": ("report", run, "--out", folder / "report.html"),
        "lokr": ("lokr", run, "--unverified"),
        "merge": ("merge", run, folder / "small", folder / "merged"),
        "compact": ("compact", run),
        "heatmap, compacted": ("heatmap", run, "--out", folder / "figures2"),
    }


def measure(folder: Path, samples: int, rows_per_shard: int, export: bool, only: list[str]) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    write_run(folder / "run", samples, rows_per_shard)
    write_run(folder / "small", 1000, 100)
    found: dict[str, Any] = {
        "samples": samples,
        "shards": len(open_run(folder / "run").shards),
        "megabytes": round(open_run(folder / "run").size_bytes() / 1e6),
        "written_in_seconds": round(time.perf_counter() - start, 1),
        "commands": {},
    }
    print(json.dumps(found), flush=True)
    wanted = commands(folder)
    if export:
        wanted |= {
            "export .jsonl": ("export", folder / "run", folder / "records.jsonl"),
            "export .csv": ("export", folder / "run", folder / "table.csv"),
            "export .parquet": ("export", folder / "run", folder / "table.parquet"),
        }
    for name, arguments in wanted.items():
        if only and name not in only:
            continue
        found["commands"][name] = measured(*CLI, *arguments)
        per_sample = found["commands"][name]["seconds"] / samples * 1e6
        found["commands"][name]["microseconds_per_sample"] = round(per_sample, 2)
        print(f"  {samples:,} samples, {name}: {found['commands'][name]}", flush=True)
        shutil.rmtree(folder / "merged", ignore_errors=True)
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--rows-per-shard", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=[], help="the names of commands")
    arguments = parser.parse_args()
    values = sum(BLOCKS.values())
    result: dict[str, Any] = {"machine": machine(), "numpy": np.__version__, "values": values, "runs": []}
    for number, samples in enumerate(sorted(arguments.samples)):
        folder = arguments.folder / "run-of-layerprobe"
        result["runs"].append(measure(folder, samples, arguments.rows_per_shard, number == 0, arguments.only))
    save("large_runs", result)


if __name__ == "__main__":
    main()
