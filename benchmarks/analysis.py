"""From recorded samples to factors: this package, and the article's notebook logic written plainly.

The samples are made up with the shape of SD3.5 Large's run (38 image and 37 text distances, two readings) and of 1,000
images; each measurement is a process of its own, and memory is its peak beyond what it had after its imports. The
command that ends with a config and its proof is measured as a whole, with its imports. Storage is measured on the same
runs.
"""

from __future__ import annotations

import argparse
import bz2
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, machine, save

import simpletuner_layerprobe as layerprobe
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.models import architecture
from simpletuner_layerprobe.run.article import export_article, import_article
from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.run.manifest import (
    SCHEMA,
    Manifest,
    Module,
    Stream,
    Target,
    create_run,
    new_run_id,
    utc_now,
)
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.run.rows import Rows

ARTICLE_SAMPLES = 174_008
BLOCKS = {"image": 38, "text": 37}
CRITICAL = [0, 31, 35]
READINGS = ("last", "mean")
PLAIN = "article's JSONL, the notebook's logic written plainly"


def write_run(folder: Path, samples: int, samples_per_flush: int, modules: Sequence[Module] = ()) -> None:
    """A run of noisy distances around a wavy level for each block, of 1,000 images."""
    streams = tuple(
        Stream(name, tuple(f"transformer_blocks.{index}" for index in range(count))) for name, count in BLOCKS.items()
    )
    manifest = create_run(
        folder,
        Manifest(
            schema=SCHEMA,
            run_id=new_run_id(),
            family="sd3",
            flavour="large",
            model_class="SD3Transformer2DModel",
            streams=streams,
            targets=(Target("transformer_blocks.*", ("norm1*", "norm1_context*", "ff*"), ("*",)),),
            readings=READINGS,
            modules=tuple(modules),
            versions={},
            settings={},
            fingerprint="",
            created=utc_now(),
            source="probe",
        ),
    )
    random = np.random.default_rng(0)
    with RecordWriter(folder, manifest, rank=0) as writer:
        for start in range(0, samples, samples_per_flush):
            count = min(samples_per_flush, samples - start)
            sigma_N = random.random(count)
            distances: dict[tuple[str, str], Any] = {}
            for name, blocks in BLOCKS.items():
                level_L = 0.05 + 0.03 * np.sin(np.arange(blocks) / 2.3 + (name == "text"))
                for reading in READINGS:
                    noise_NL = random.random((count, blocks), dtype=np.float32)
                    distances[name, reading] = (level_L * (0.7 + 0.6 * sigma_N[:, None] * noise_NL)).astype(np.float32)
            facts = {"image": random.integers(1, 1001, count), "width": [1024] * count, "height": [1024] * count}
            writer.write(Rows(sigma_N, np.full(count, 0.5, dtype=np.float32), facts, distances))


def contributions_of_run(path: Path) -> list[int]:
    """With intervals and what is settled."""
    return factors(layerprobe.load(path).contributions().values)


def factors_of_file(path: Path) -> list[int]:
    """The article's file, straight into memory."""
    return factors(layerprobe.load(path).contributions().values)


def factors(values_L: Any) -> list[int]:
    return [int(factor) for factor in article_factors(values_L, critical=CRITICAL)]


def factors_plainly(path: Path) -> list[int]:
    """The article's notebook from its description: all records as Python objects, a list for each cell."""
    with open(path) as file:
        records = [json.loads(line) for line in file]
    clipped = {}
    for stream, weight in (("encoder_hidden_states", 1 / 3), ("hidden_states", 2 / 3)):
        blocks = len(records[0][stream])
        cells: list[list[list[float]]] = [[[] for _ in range(blocks)] for _ in range(10)]
        for record in records:
            row = cells[min(int(record["timestep"] * 10), 9)]
            for block, value in enumerate(record[stream]):
                row[block].append(value)
        heatmap = np.array([[np.mean(cell) if cell else 0.0 for cell in row] for row in cells])
        clipped[stream] = np.clip(heatmap, None, np.percentile(heatmap, 90)) * weight
    combined = np.add(clipped["encoder_hidden_states"], clipped["hidden_states"][:, :-1]) / 2
    average = combined.mean(axis=0)
    inverted = 1 - (average - average.min()) / (average.max() - average.min())
    factors = np.clip(np.round(inverted * 11 + 1), 1, 12).astype(int).tolist()
    factors.append(factors[-1])
    return [1 if index in CRITICAL else factor for index, factor in enumerate(factors)]


def resident_bytes(field: str) -> int:
    """This process' memory by Linux' account: VmRSS now, or VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def child(way: str, path: Path) -> None:
    """In a process of its own: one analysis, its seconds and memory as JSON."""
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    factors = {
        "run": contributions_of_run,
        "plain": factors_plainly,
        "file": factors_of_file,
        "import": import_and_factors,
    }[way](path)
    seconds = time.perf_counter() - start
    extra = max(0, resident_bytes("VmHWM") - before)
    print(json.dumps({"seconds": seconds, "extra_bytes": extra, "factors": factors}))


def import_and_factors(path: Path) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        import_article(path, Path(folder) / "run")
        return factors_of_file(Path(folder) / "run")


def measured(way: str, path: Path, times: int = 1) -> dict[str, Any]:
    """The median process of `times`, of seconds; memory is the largest."""
    runs = []
    for _ in range(times):
        command = [sys.executable, __file__, "--child", way, str(path)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    runs.sort(key=lambda run: run["seconds"])
    return {
        "seconds": round(runs[times // 2]["seconds"], 3),
        "fastest_seconds": round(runs[0]["seconds"], 3),
        "extra_megabytes": round(max(run["extra_bytes"] for run in runs) / 1e6, 1),
        "factors": runs[0]["factors"],
    }


def whole_command(run: Path, config: Path) -> dict[str, Any]:
    """`layerprobe lokr` from the start of its process to the proved config in a file."""
    code = "import sys; from simpletuner_layerprobe.cli import main; sys.exit(main())"  # as the script `layerprobe`
    command = [
        sys.executable,
        "-c",
        code,
        "lokr",
        str(run),
        "--preset",
        "article",
        "--critical",
        "0,31,35",
        "--out",
        str(config),
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    proof = next(line for line in said.splitlines() if line.startswith("verified: "))
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6),
        "said": proof,
    }


def storage(folder: Path, jsonl: Path, samples: int) -> dict[str, float]:
    """Bytes a sample. A run flushes every 30 seconds: 30 samples where a step takes a second."""
    with open(jsonl, "rb") as file:
        part = b"".join(itertools.islice(file, 20_000))

    def written(samples_per_flush: int) -> float:
        count = min(samples, 20 * samples_per_flush)
        path = folder / f"flush-{samples_per_flush}"
        write_run(path, count, samples_per_flush)
        return round(sum(file.stat().st_size for file in path.glob("*.arrows")) / count, 1)

    return {
        "run folder, two readings, 1,000 samples a flush": written(1000),
        "run folder, two readings, 30 samples a flush": written(30),
        "JSONL, one reading": round(jsonl.stat().st_size / samples, 1),
        "JSONL, one reading, bz2": round(len(bz2.compress(part)) / part.count(b"\n"), 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=ARTICLE_SAMPLES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for analysis.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    samples = options.samples
    result: dict[str, Any] = {"machine": machine(), "samples": samples, "ways": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "run", samples, 10_000, modules=architecture("sd35-large").modules)
        write_run(folder / "flushes", samples, 100)
        jsonl = folder / "run.jsonl"
        export_article(load_run(folder / "run"), jsonl)
        runs = {
            "run folder, flushes of 10,000 samples": ("run", folder / "run", 5),
            "run folder, flushes of 100 samples": ("run", folder / "flushes", 5),
            "article's JSONL, loaded": ("file", jsonl, 1),
            "article's JSONL, imported": ("import", jsonl, 1),
            PLAIN: ("plain", jsonl, 1),
        }
        for label, (way, path, times) in runs.items():
            result["ways"][label] = measured(way, path, times)
            print(f"  {label}: {result['ways'][label]['seconds']} s", flush=True)
        same = [result["ways"][label].pop("factors") for label in runs]
        # the second run folder has other random distances
        result["same_factors"] = same[0] == same[2] == same[3] == same[4]
        whole_command(folder / "run", folder / "warm.json")  # writes the bytecode
        result["command"] = whole_command(folder / "run", folder / "lycoris_config.json")
        print(f"  layerprobe lokr: {result['command']['seconds']} s", flush=True)
        result["storage_bytes_per_sample"] = storage(folder, jsonl, samples)
    save("analysis", result, options.out)


if __name__ == "__main__":
    main()
