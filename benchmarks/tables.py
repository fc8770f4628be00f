"""Writes docs/benchmarks.md from the JSON files in results/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def verdict(holds: bool) -> str:
    return "kept" if holds else "**missed**"


def about(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, {machine['system']}, {machine['cores']} cores, load {machine['load_at_start']} from "
        f"others when it started, {machine['device']}, Python {machine['python']}, {versions}."
    )


def times(found: dict[str, Any], clock: str) -> str:
    low, high = found[clock]["ratio_quartiles"]
    return f"{found[clock]['ratio']:.3f} ({low:.3f} to {high:.3f})"


def overhead(result: dict[str, Any]) -> str:
    probe = result["ways"]["probe, both readings"]
    rows = [["bare forward without autograd", f"{probe['wall']['base_seconds']:.2f} s", "1", "1", "0", "0"]]
    for label, found in result["ways"].items():
        states = f"{found['extra_peak_bytes'] / 1e6:.1f} MB ({found['extra_peak_states']:.2f})"
        seconds = f"{found['wall']['seconds']:.2f} s"
        rows.append([label, seconds, times(found, "wall"), times(found, "cpu"), states, str(found["syncs"])])
    by_blocks = result["probe_extra_peak_bytes_by_blocks"]
    growth = ", ".join(f"{count} blocks {size / 1000:.1f} kB" for count, size in by_blocks.items())
    limits = [
        [
            "probe step, clock",
            "1.03 of the bare forward",
            times(probe, "wall"),
            verdict(probe["wall"]["ratio"] <= 1.03),
        ],
        [
            "probe step, CPU time",
            "1.03 of the bare forward",
            times(probe, "cpu"),
            verdict(probe["cpu"]["ratio"] <= 1.03),
        ],
        [
            "extra peak memory",
            "2 states of a block",
            probe["extra_peak_states"],
            verdict(probe["extra_peak_states"] <= 2),
        ],
        ["host synchronisations", "0", probe["syncs"], verdict(probe["syncs"] == 0)],
    ]
    return f"""## A step on a CPU

{about(result["machine"])}

{result["model"]}. Ratios are medians of pairs, in brackets the middle half of the pairs. Memory is the peak of torch's
CPU allocator beyond the bare forward's, in brackets in states of one block (image and text together,
{result["block_state_bytes"] / 1e6:.2f} MB). Synchronisations are operations that would make the host wait for a GPU.

{table(["way", "seconds", "clock / bare", "CPU time / bare", "extra peak memory", "syncs"], rows)}

{table(["the probe's", "limit", "found", ""], limits)}

Extra peak memory of the probe by the number of blocks, everything else equal (a state has
{result["probe_extra_peak_bytes_by_blocks_state"] / 1000:.0f} kB): {growth}.

The training step has no adapter and no optimizer in it, so a real one is slower. The probe always takes both readings;
there is no cheaper step with one reading. Pairs of blocks further apart than one are not recorded, so not measured.
"""


def gpu(result: dict[str, Any] | None) -> str:
    if result is None or result["tiny"]:
        return """## A step on a GPU

**Not measured yet.** No GPU was at hand. `python benchmarks/gpu.py` measures SD3.5 Large's and Flux.1-dev's real shapes
at 1024 x 1024 with random bf16 weights; only whether it runs was tested, on a CPU with tiny shapes. So nothing is known
about the GPU limits (a probe step of at most 1.01 of the bare forward, at least 3 times faster than the training step
with gradient checkpointing).
"""
    rows = []
    for run in result["runs"]:
        for label, found in run["ways"].items():
            if "out_of_memory" in found:
                rows.append([run["model"], run["batch"], label, "out of memory", "", "", ""])
                continue
            extra = f"{found['extra_peak_bytes'] / 1e6:.0f} MB" if "extra_peak_bytes" in found else "not measured"
            seconds = f"{found['device']['seconds']:.3f} s"
            rows.append(
                [run["model"], run["batch"], label, seconds, times(found, "device"), extra, found.get("syncs", "")]
            )
    head = ["model", "batch", "way", "seconds", "time / bare", "extra peak memory", "syncs"]
    return f"## A step on a GPU\n\n{about(result['machine'])}\n\n{table(head, rows)}\n"


def analysis(result: dict[str, Any]) -> str:
    ways = result["ways"]
    folder = ways["run folder, shards of 10,000 samples"]
    plain = ways["article's JSONL, the notebook's logic written plainly"]
    small = ways["run folder, shards of 60 samples"]
    rows = [[label, f"{one['seconds']} s", f"{one['extra_megabytes']} MB"] for label, one in ways.items()]
    slope = [
        [f"{int(count):,}", f"{one['seconds']} s", f"{one['extra_megabytes']} MB", one["microseconds_per_sample"]]
        for count, one in result["slope"].items()
    ]
    faster = plain["seconds"] / folder["seconds"]
    stored = result["storage_bytes_per_sample"]
    limits = [
        ["analysis, large shards", "0.5 s", f"{folder['seconds']} s", verdict(folder["seconds"] <= 0.5)],
        ["analysis, shards of 60 samples", "0.5 s", f"{small['seconds']} s", verdict(small["seconds"] <= 0.5)],
        ["memory", "150 MB", f"{small['extra_megabytes']} MB", verdict(small["extra_megabytes"] <= 150)],
        ["against the notebook's logic", "30 times faster", f"{faster:.0f} times", verdict(faster >= 30)],
        [
            "bytes a sample and reading",
            "340",
            stored["run folder, one reading"],
            verdict(stored["run folder, one reading"] <= 340),
        ],
    ]
    same = "gave the same factors" if result["same_factors"] else "**did not give the same factors**"
    return f"""## From samples to factors

{about(result["machine"])}

{result["samples"]:,} made-up samples with SD3.5 Large's 38 image and 37 text distances, from the files (in the page
cache) to the factors; each in a process of its own, the median of five for the run folders and one run for the others.
Memory is the peak beyond what the process had after its imports. The run folder, the import and the notebook's logic
{same}. The config and its proof against LyCORIS are not in these times.

{table(["from", "seconds", "extra memory"], rows)}

{table(["samples", "seconds", "extra memory", "microseconds a sample"], slope)}

{table(["storage", "bytes a sample"], stored.items())}

{table(["", "limit", "found", ""], limits)}
"""


def startup(result: dict[str, Any]) -> str:
    added, cpu = result["autoload"]["added_ms"], result["autoload"]["added_cpu_ms"]
    seconds = result["help_seconds"]["median"]
    rows = [
        [
            "autoload, added to `python -c pass`",
            "2 ms",
            f"{added['median']} ms ({added['first_quartile']} to {added['third_quartile']}), CPU {cpu['median']} ms",
            verdict(added["median"] <= 2),
        ],
        ["`layerprobe --help`", "0.3 s", f"{seconds} s", verdict(seconds <= 0.3)],
    ]
    simpletuner = result["import_simpletuner"]
    if simpletuner:
        add = simpletuner["added_ms"]
        spread = f"{add['first_quartile']} to {add['third_quartile']}"
        found = f"{add['median']} ms ({spread}) of {simpletuner['without_seconds']} s"
        rows.append(["autoload, added to `import simpletuner`", "none set", found, ""])
    return f"""## Start-up

{about(result["machine"])}

The median of {result["pairs"]} pairs of starts with and without the .pth file, in a fresh virtual environment.

{table(["", "limit", "found", ""], rows)}
"""


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    parts = [
        """# Benchmarks

`make bench` measures all of this again, but for the GPU, and writes this file from `benchmarks/results/`. Each ratio
comes from pairs that ran interleaved in one process on the same inputs, and the medians are shown, because the machine
was shared with other work: the clock is noisy, the CPU time of the process less so. How many samples a config needs to
settle, with uniform and with stratified sigmas, is not measured here yet.
"""
    ]
    for name, part in (("overhead", overhead), ("analysis", analysis), ("startup", startup)):
        result = read(name)
        if result is not None:
            parts.append(part(result))
    parts.insert(2, gpu(read("gpu")))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
