"""From recorded samples to factors: this package, and the article's notebook logic written plainly.

The samples are made up with the shape of SD3.5 Large's run (38 image and 37 text distances); each measurement is a
process of its own, and memory is its peak beyond what it had after its imports. The command that ends with a config and
its proof is measured as a whole, with its imports. Storage is measured on the same runs.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
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

from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.models import architecture
from simpletuner_layerprobe.run.article import export_jsonl, import_jsonl
from simpletuner_layerprobe.run.manifest import SCHEMA_VERSION, Manifest, Module, Stream
from simpletuner_layerprobe.run.records import Rows, ShardWriter, create_run, open_run

ARTICLE_SAMPLES = 174_008
BLOCKS = {"image": 38, "text": 37}
CRITICAL = [0, 31, 35]
LARGE_SHARDS = "run folder, shards of 10,000 samples"
SMALL_SHARDS = "run folder, shards of 60 samples"
PLAIN = "article's JSONL, the notebook's logic written plainly"


def write_run(
    folder: Path,
    samples: int,
    rows_per_shard: int,
    tokens: tuple[str, ...] = ("last",),
    modules: Sequence[Module] = (),
) -> None:
    """A run of noisy distances around a wavy level for each block."""
    streams = tuple(
        Stream(name, tuple(f"transformer_blocks.{index}" for index in range(count))) for name, count in BLOCKS.items()
    )
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        family="sd3",
        flavour="large",
        model_class="SD3Transformer2DModel",
        streams=streams,
        tokens=tokens,
        modules=tuple(modules),
        versions={},
        settings={},
        fingerprint="",
        created="2026-01-01T00:00:00+00:00",
        source="probe",
    )
    create_run(folder, manifest)
    writer = ShardWriter(folder, manifest, rank=0)
    random = np.random.default_rng(0)
    for start in range(0, samples, rows_per_shard):
        count = min(rows_per_shard, samples - start)
        sigma_N = random.random(count)
        distances: dict[tuple[str, str], Any] = {}
        for name, blocks in BLOCKS.items():
            level_L = 0.05 + 0.03 * np.sin(np.arange(blocks) / 2.3 + (name == "text"))
            for reading in tokens:
                noise_NL = random.random((count, blocks), dtype=np.float32)
                distances[name, reading] = (level_L * (0.7 + 0.6 * sigma_N[:, None] * noise_NL)).astype(np.float32)
        size_N = np.full(count, 1024, dtype=np.int32)
        writer.write(
            Rows(
                sigma_N=sigma_N,
                loss_N=np.full(count, 0.5, dtype=np.float32),
                width_N=size_N,
                height_N=size_N,
                text_tokens_N=np.full(count, 77, dtype=np.int32),
                caption_dropped_N=np.zeros(count, dtype=np.int8),
                backend_N=np.zeros(count, dtype=np.int16),
                backends=("photos",),
                distances=distances,
            )
        )


def factors_of_run(path: Path) -> list[int]:
    streams = heatmaps(open_run(path))
    return article_factors(article_contributions(streams).value_L, critical=CRITICAL).tolist()


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
    factors = {"run": factors_of_run, "plain": factors_plainly, "import": import_and_factors}[way](path)
    seconds = time.perf_counter() - start
    extra = max(0, resident_bytes("VmHWM") - before)
    print(json.dumps({"seconds": seconds, "extra_bytes": extra, "factors": factors}))


def import_and_factors(path: Path) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        import_jsonl(path, Path(folder) / "run")
        return factors_of_run(Path(folder) / "run")


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
    command = [sys.executable, "-c", code, "lokr", str(run), "--critical", "0,31,35", "--out", str(config)]
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


ONE_READING = "run folder, one reading"
TWO_READINGS = "run folder, each of two readings"


def storage(folder: Path, jsonl: Path, samples: int) -> dict[str, float]:
    """Bytes a sample and reading.

    A run writes a shard every 30 seconds, of 30 samples where a step takes a second, and always has two readings.
    """
    with open(jsonl, "rb") as file:
        part = b"".join(itertools.islice(file, 20_000))
    lines = part.count(b"\n")

    def written(rows_per_shard: int, tokens: tuple[str, ...]) -> float:
        count = min(samples, 20 * rows_per_shard)
        path = folder / f"{rows_per_shard}-{len(tokens)}"
        write_run(path, count, rows_per_shard, tokens)
        return round(open_run(path).size_bytes() / count / len(tokens), 1)

    return {
        ONE_READING: written(1000, ("last",)),
        TWO_READINGS: written(1000, ("last", "mean")),
        f"{ONE_READING}, shards of 30 samples": written(30, ("last",)),
        f"{TWO_READINGS}, shards of 30 samples": written(30, ("last", "mean")),
        "JSONL, shortest digits": round(jsonl.stat().st_size / samples, 1),
        "JSONL, gz": round(len(gzip.compress(part)) / lines, 1),
        "JSONL, bz2": round(len(bz2.compress(part)) / lines, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=ARTICLE_SAMPLES)
    parser.add_argument("--large", type=int, nargs="*", default=[1_000_000, 10_000_000])
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
        write_run(folder / "shards", samples, 60)
        jsonl = folder / "run.jsonl"
        export_jsonl(open_run(folder / "run"), jsonl)
        runs = {
            LARGE_SHARDS: ("run", folder / "run", 5),
            SMALL_SHARDS: ("run", folder / "shards", 5),
            "article's JSONL through import": ("import", jsonl, 1),
            PLAIN: ("plain", jsonl, 1),
        }
        for label, (way, path, times) in runs.items():
            result["ways"][label] = measured(way, path, times)
            print(f"  {label}: {result['ways'][label]['seconds']} s", flush=True)
        factors = [result["ways"][label].pop("factors") for label in runs]
        # the second run folder has other random distances
        result["same_factors"] = factors[0] == factors[2] == factors[3]
        whole_command(folder / "run", folder / "warm.json")  # writes the bytecode
        result["command"] = whole_command(folder / "run", folder / "lycoris_config.json")
        print(f"  layerprobe lokr: {result['command']['seconds']} s", flush=True)
        result["storage_bytes_per_sample"] = storage(folder, jsonl, samples)
    result["slope"] = {}
    for count in options.large:
        with tempfile.TemporaryDirectory() as name:
            write_run(Path(name) / "run", count, 100_000)
            found = measured("run", Path(name) / "run", 1)
        found.pop("factors")
        result["slope"][str(count)] = found | {"microseconds_per_sample": round(found["seconds"] / count * 1e6, 3)}
        print(f"  {count:,} samples: {found['seconds']} s", flush=True)
    save("analysis", result, options.out)


if __name__ == "__main__":
    main()
