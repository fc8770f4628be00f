"""Writes docs/benchmarks.md and the README's short table from the JSON files in results/."""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import LARGE_SHARDS, ONE_READING, PLAIN, SMALL_SHARDS, TWO_READINGS
from measure import CHECKPOINTED, PROBE, RESULTS, load

ROOT = Path(__file__).parent.parent
START, END = "<!-- bench -->", "<!-- /bench -->"  # around the README's table


@dataclass(frozen=True)
class Limit:
    """A figure that the project promised: what, the limit and what was found, as words; whether it is kept.

    sure: whether another way to look at the same measurement says the same.
    """

    what: str
    limit: str
    found: str
    kept: bool
    sure: bool = True

    def row(self) -> list[str]:
        verdict = "kept" if self.kept else "**missed**"
        return [self.what, self.limit, self.found, verdict if self.sure else "**not sure**"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def limits_table(limits: Iterable[Limit]) -> str:
    return table(["", "limit", "found", ""], [limit.row() for limit in limits])


def about(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, {machine['system']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gigabytes']} GB of memory, load {machine['load_at_start']} when it started, "
        f"{machine['device']}, Python {machine['python']}, {versions}."
    )


def times(found: dict[str, Any], clock: str) -> str:
    low, high = found[clock]["ratio_quartiles"]
    return f"{found[clock]['ratio']:.3f} ({low:.3f} to {high:.3f})"


def overhead_limits(result: dict[str, Any]) -> list[Limit]:
    probe = result["ways"][PROBE]
    narrow = result["narrow"]
    growth = result["by_blocks"]
    states = max(growth["extra_peak_bytes"].values()) / growth["block_state_bytes"]
    blocks = " and ".join(growth["extra_peak_bytes"])

    def step(what: str, found: dict[str, Any], clock: str) -> Limit:
        ratio, fastest = found[clock]["ratio"], found[clock]["fastest_ratio"]
        words = f"{times(found, clock)}, fastest steps {fastest:.3f}"
        return Limit(what, "1.03 of the bare forward", words, ratio <= 1.03, (ratio <= 1.03) == (fastest <= 1.03))

    return [
        step("CPU: probe step, CPU time, width 1536", probe, "cpu"),
        step("CPU: the same by the clock", probe, "wall"),
        step("CPU: probe step, CPU time, width 768 (narrower than any SD3)", narrow[PROBE], "cpu"),
        Limit(
            "extra peak memory of the probe",
            "2 states of a block",
            f"{probe['extra_peak_states']:.3f}; {states:.3f} with {blocks} narrow blocks",
            max(probe["extra_peak_states"], states) <= 2,
        ),
        Limit("host synchronisations outside the flush", "0", str(probe["syncs"]), probe["syncs"] == 0),
    ]


def matrices(machine: dict[str, Any]) -> str:
    """What the processor's matrix units mean for the ratios."""
    if machine["matrix_units"]:
        return """This processor multiplies bfloat16 matrices in hardware (AMX), some ten times as fast as its vectors
would, and the angles are vector work: processors without it have longer forwards and a smaller share of the probe."""
    return """This processor has no units for bfloat16 matrices (AMX). With them the forward is two to three times as
fast and the angles, which are vector work, are not, so the probe's share is larger: on an Intel Xeon that has them an
earlier version, whose angles took half as long again, was at 1.017 (fastest steps 1.041) at width 1536 and at 1.062 at
width 768 on 2026-11-23."""


def overhead(result: dict[str, Any]) -> str:
    probe = result["ways"][PROBE]
    rows = [["bare forward without autograd", f"{probe['wall']['base_seconds']:.2f} s", "1", "1", "1", "0", "0"]]
    for label, found in result["ways"].items():
        states = f"{found['extra_peak_bytes'] / 1e6:.1f} MB ({found['extra_peak_states']:.2f})"
        seconds = f"{found['wall']['seconds']:.2f} s"
        fastest = f"{found['cpu']['fastest_ratio']:.3f}"
        rows.append([label, seconds, times(found, "wall"), times(found, "cpu"), fastest, states, str(found["syncs"])])
    narrow, growth = result["narrow"], result["by_blocks"]
    few, others = (result["ways"][label]["pairs"] for label in (CHECKPOINTED, ".item() per block"))
    by_blocks = ", ".join(f"{count} blocks {size / 1000:.1f} kB" for count, size in growth["extra_peak_bytes"].items())
    return f"""## A step on a CPU

{about(result["machine"])}

{result["model"]}: SD3.5 Medium's width and heads at 512 x 512, without its second attention and with fewer blocks. The
probe's share of a step depends on the width, for its work grows with it and the blocks' with its square, and hardly on
the number of blocks. Ratios are medians of {probe["pairs"]} pairs (training: {few}, the other ways {others}), in
brackets the middle half of the pairs; fastest / bare is the CPU time of the fastest step of each, the one that others
on the machine disturbed least. Memory is the peak of torch's CPU allocator beyond the bare forward's, in brackets in
states of one block (image and text together, {result["block_state_bytes"] / 1e6:.2f} MB): it is 0 where the blocks
themselves need more at another moment. Synchronisations are operations that would make the host wait for a GPU.

{table(["way", "seconds", "clock / bare", "CPU time / bare", "fastest / bare", "extra peak memory", "syncs"], rows)}

{limits_table(overhead_limits(result))}

A ratio is not sure where the median of the pairs and the fastest steps fall on different sides of the limit: on this
machine either moves by some 0.02 from one run to the next. The narrower model is an {narrow["model"]},
where the bare forward takes
{narrow[PROBE]["wall"]["base_seconds"]:.2f} s. {matrices(result["machine"])}

Extra peak memory of the probe by the number of blocks, everything else equal (the states of a block have
{growth["block_state_bytes"] / 1000:.0f} kB): {by_blocks}.

The training step has no adapter and no optimizer in it, so a real one is slower. The probe always takes both readings;
a step with one of them would save nothing, for both come from the angles of all tokens. The peers' ways take the
distances in bfloat16, where small angles are mostly rounding, and `.item()` that of the last token alone: on a CPU
nobody waits for it, on a GPU every one is a synchronisation. The floor is no measurement: it adds up each state before
and after its block, which is the least that any distance of all tokens has to read.
"""


def gpu(result: dict[str, Any] | None) -> str:
    if result is None or result["tiny"]:
        return """## A step on a GPU

**Not measured.** No GPU was at hand. `python benchmarks/gpu.py` measures SD3.5 Large's and Flux.1-dev's real shapes at
1024 x 1024 with random bf16 weights; only whether it runs was tested, on a CPU with tiny shapes. So nothing is known
about the GPU limits (a probe step of at most 1.01 of the bare forward, at least 3 times faster than the training step
with gradient checkpointing).

What is known without one: on CUDA devices one fused kernel (Triton) takes the angles of a state. It reads 4 bytes from
memory for each number of a bfloat16 state before and after its block, 1.6 GB in a step of SD3.5 Large at 1024 x 1024;
torch's own operations read and write some 30. Triton's interpreter gives the float64 reference's angles with it, and it
compiles for the architectures
sm_80 to sm_120; a probe tries it against torch's operations on the device itself before its first step, and goes on
with those, with a warning, if it fails or differs.
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
    limits = limits_table(gpu_limits(result))
    kernel = "used its fused kernel" if result["fused_kernel"] else "did **not** use its fused kernel"
    return (
        f"## A step on a GPU\n\n{about(result['machine'])} The probe {kernel} here.\n\n"
        f"{table(head, rows)}\n\n{limits}\n"
    )


def gpu_limits(result: dict[str, Any] | None) -> list[Limit]:
    limits = []
    for run in [] if result is None or result["tiny"] else result["runs"]:
        probe, trained = run["ways"][PROBE], run["ways"].get(CHECKPOINTED, {})
        name = f"GPU: {run['model']}, batch {run['batch']}"
        if "device" in probe:
            ratio = probe["device"]["ratio"]
            limits.append(Limit(f"{name}: probe step", "1.01 of the bare forward", f"{ratio:.3f}", ratio <= 1.01))
            states = probe["extra_peak_bytes"] / run["last_state_bytes"]
            limits.append(Limit(f"{name}: extra peak memory", "2 states", f"{states:.2f}", states <= 2))
            limits.append(Limit(f"{name}: synchronisations", "0", str(probe["syncs"]), probe["syncs"] == 0))
        if "device" in probe and "device" in trained:
            faster = trained["device"]["ratio"] / probe["device"]["ratio"]
            limits.append(Limit(f"{name}: training step", "3 times the probe's", f"{faster:.1f} times", faster >= 3))
    return limits


def analysis_limits(result: dict[str, Any]) -> list[Limit]:
    ways, stored = result["ways"], result["storage_bytes_per_sample"]
    limits = []
    for label in (LARGE_SHARDS, SMALL_SHARDS):
        seconds = ways[label]["seconds"]
        name = f"analysis of {result['samples']:,} samples, {label.partition(', ')[2]}"
        limits.append(Limit(name, "0.5 s", f"{seconds} s", seconds <= 0.5))
    memory = max(ways[label]["extra_megabytes"] for label in (LARGE_SHARDS, SMALL_SHARDS))
    faster = ways[PLAIN]["seconds"] / ways[LARGE_SHARDS]["seconds"]
    limits.append(Limit("its memory beyond the imports", "150 MB", f"{memory} MB", memory <= 150))
    limits.append(Limit("against the notebook's logic", "30 times faster", f"{faster:.0f} times", faster >= 30))
    if len(result["slope"]) > 1:
        rates = [one["microseconds_per_sample"] for one in result["slope"].values()]
        growth = rates[-1] / rates[0]
        counts = [f"{int(count):,}" for count in result["slope"]]
        name = f"time a sample, from {counts[0]} to {counts[-1]}"
        limits.append(Limit(name, "linear", f"{growth:.2f} times", growth <= 1.25))
    for label in (ONE_READING, TWO_READINGS, f"{TWO_READINGS}, shards of 30 samples"):
        limits.append(Limit(f"bytes a sample and reading: {label}", "340", str(stored[label]), stored[label] <= 340))
    return limits


def analysis(result: dict[str, Any]) -> str:
    rows = [[label, f"{one['seconds']} s", f"{one['extra_megabytes']} MB"] for label, one in result["ways"].items()]
    slope = [
        [f"{int(count):,}", f"{one['seconds']} s", f"{one['extra_megabytes']} MB", one["microseconds_per_sample"]]
        for count, one in result["slope"].items()
    ]
    same = "gave the same factors" if result["same_factors"] else "**did not give the same factors**"
    return f"""## From samples to factors

{about(result["machine"])}

{result["samples"]:,} made-up samples with SD3.5 Large's 38 image and 37 text distances, from the files (in the page
cache) to the factors; each in a process of its own, the median of five for the run folders and one run for the others.
Memory is the peak beyond what the process had after its imports. The run folder, the import and the notebook's logic
{same}. The config and its proof against LyCORIS are not in these times; they do not depend on the samples. The whole
command `layerprobe lokr`, from the start of its process to the config in a file, took {result["command"]["seconds"]} s
and {result["command"]["peak_megabytes"]} MB in all, most of it the imports of torch and LyCORIS and the bootstrap that
says how sure the factors are; it ended with "{result["command"]["said"]}".

{table(["from", "seconds", "extra memory"], rows)}

{table(["samples", "seconds", "extra memory", "microseconds a sample"], slope)}

{table(["storage", "bytes a sample and reading"], result["storage_bytes_per_sample"].items())}

A recorded run has two readings; one alone comes from an import, in large shards.

{limits_table(analysis_limits(result))}
"""


def startup_limits(result: dict[str, Any]) -> list[Limit]:
    added, cpu = result["autoload"]["added_ms"], result["autoload"]["added_cpu_ms"]
    seconds = result["help_seconds"]["median"]
    return [
        Limit(
            "autoload, added to `python -c pass`",
            "2 ms",
            f"{added['median']} ms ({added['first_quartile']} to {added['third_quartile']}), CPU {cpu['median']} ms",
            added["median"] <= 2,
        ),
        Limit("`layerprobe --help`", "0.3 s", f"{seconds} s", seconds <= 0.3),
    ]


def startup(result: dict[str, Any]) -> str:
    simpletuner = result["import_simpletuner"]
    text = f"""## Start-up

{about(result["machine"])}

The median of {result["pairs"]} pairs of starts with and without the .pth file, in a fresh virtual environment.

{limits_table(startup_limits(result))}
"""
    if simpletuner:
        add = simpletuner["added_cpu_ms"]
        text += f"""
`import simpletuner` takes {simpletuner["without_seconds"]} s; with the autoload its CPU time differs by
{add["median"]} ms ({add["first_quartile"]} to {add["third_quartile"]}), which is what any two such imports differ by.
"""
    return text


def stratified(result: dict[str, Any]) -> str:
    def row(what: str, found: dict[str, Any]) -> list[str]:
        low, high = found["interval"]
        return [what, f"{found['times']:.2f} ({low:.2f} to {high:.2f})", f"{1 - 1 / found['times']:.0%}"]

    rows = []
    if result["recorded"]:
        rows.append(row(f"{result['recorded']['what']} ({result['recorded']['date']})", result["recorded"]))
    for slope, found in result["made_up"].items():
        rows.append(row(f"made up, distances fall by {float(slope):.0%} from sigma 0 to 1", found))
    head = ["runs", "times the samples with uniform sigmas", "samples saved"]
    settled = ""
    if result["recorded"]:
        words = [
            f"{statistics.median(one['settled']):,.0f} ({statistics.median(one['filled']):,.0f})"
            if one["settled"]
            else "not at all"
            for one in result["recorded"]["until_settled"].values()
        ]
        settled = f"""
By the rule of layerprobe_stop_when_stable with the article's recipe the recorded runs settled after {words[0]} samples
with uniform sigmas, after {words[1]} with stratified ones: the median of the consecutive stretches, in brackets when
every bin had its ten samples. A tiny model with few photographs is settled as soon as it may be judged, so nearly all
of this gain is the even filling of the bins.
"""
    return f"""## Samples to a settled config

{about(result["machine"])}

How many times the samples uniform sigmas need for the same standard error of a block's contribution as stratified ones:
the variance over stretches of 100 samples, uniform by stratified, the median over the blocks, with its 95% interval.
The gain is what sigma explains of the scatter within a bin: large where distances follow sigma closely and images
differ little, as with the few photographs of the tiny pipeline.

{table(head, rows)}
{settled}"""


def page(folder: Path = RESULTS) -> str:
    """The whole of docs/benchmarks.md."""
    parts = [
        """# Benchmarks

`make bench` measures all of this again, but for the GPU, and writes this file from `benchmarks/results/`. Each ratio
comes from pairs that ran interleaved in one process on the same inputs, and the medians are shown. The machine is a
virtual one that was shared with other work: the clock is noisy, the CPU time of the process less so.
"""
    ]
    for name, part in (
        ("overhead", overhead),
        ("analysis", analysis),
        ("startup", startup),
        ("stratified", stratified),
    ):
        result = load(name, folder)
        if result is not None:
            parts.append(part(result))
        if name == "overhead":
            parts.append(gpu(load("gpu", folder)))
    return "\n\n".join(map(filled, "\n".join(parts).strip().split("\n\n"))) + "\n"


def filled(block: str) -> str:
    """A paragraph with its lines filled; a table or a heading as it is."""
    block = block.strip("\n")
    return block if block.startswith(("|", "#")) else textwrap.fill(block, 120, break_long_words=False)


def short_table(folder: Path = RESULTS) -> str:
    """The README's table: every limit with what was found."""
    limits: list[Limit] = []
    dates, machines = set(), set()
    for name, of in (
        ("overhead", overhead_limits),
        ("gpu", gpu_limits),
        ("analysis", analysis_limits),
        ("startup", startup_limits),
    ):
        result = load(name, folder)
        if result is not None:
            limits += of(result)
            machine = result["machine"]
            dates.add(machine["date"])
            machines.add(
                f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
                f"torch {machine['versions'].get('torch', 'none')}, "
                f"SimpleTuner {machine['versions'].get('simpletuner', 'none')}"
            )
    return f"{limits_table(limits)}\n\nMeasured {', '.join(sorted(dates))} on {'; '.join(sorted(machines))}."


def renewed(readme: str, folder: Path = RESULTS) -> str:
    """The README with its table renewed; as it is if it has no place for one."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{start}\n{short_table(folder)}\n{end}{after}" if end else readme


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    root = parser.parse_args(arguments).root
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "benchmarks.md").write_text(page())
    readme = root / "README.md"
    if readme.exists():
        readme.write_text(renewed(readme.read_text()))


if __name__ == "__main__":
    main()
