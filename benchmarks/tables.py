"""Writes docs/costs.md and docs/bases.md from the measurements in results/: no number in them is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from measure import PROBE, RESULTS, load

ROOT = Path(__file__).parent.parent


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def about(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = machine["device"] if machine["device"] != "cpu" else f"{machine['processor']}, {machine['cores']} cores"
    return f"{machine['date']}, {device}, Python {machine['python']}, {versions}."


def size(count: int) -> str:
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} kB"
    )


def users_words(run: dict[str, Any]) -> str:
    """What a user wants to know first."""
    rate = run["samples_per_second"]
    speed = f"{rate:.1f} samples a second" if rate >= 1 else f"{1 / rate:.1f} s a sample"
    allocated = run["bare"].get("allocated_bytes")
    memory = f", {allocated / 1e9:.1f} GB" if allocated else ""
    ablated = run.get("ablated_samples_per_second")
    left_out = f"; with every block left out 200 samples in {200 / ablated / 60:.1f} minutes" if ablated else ""
    return (
        f"**{run['model']}**, batch {run['batch']}: {speed}{memory}, 2,000 samples in {2000 / rate / 60:.1f} minutes"
        f"{left_out} (the forward with the probe; SimpleTuner's loop comes on top)."
    )


def steps(result: dict[str, Any], clock: str) -> str:
    parts = [about(result["machine"])]
    for run in result["runs"]:
        tokens = run["tokens"]
        parts.append(
            f"{users_words(run)} {run['blocks']} blocks, width {run['width']}, {tokens['image']} image and "
            f"{tokens['text']} text tokens, bf16; a block's states take {size(run['state_bytes'])}."
        )
        rows = []
        for label, found in run["ways"].items():
            if "out_of_memory" in found:
                rows.append([label, "out of memory", "", ""])
                continue
            low, high = found[clock]["ratio_quartiles"]
            extra, syncs = max(0, found["extra_peak_bytes"]), max(0, found["syncs"])
            rows.append([label, f"{found[clock]['ratio']:.3f} ({low:.3f} to {high:.3f})", size(extra), syncs])
        parts.append(table(["way", "time / bare forward", "extra peak memory", "synchronisations"], rows))
    if not result["complete"]:
        parts.append("Not all ways were measured in this run: its time was limited.")
    return "\n\n".join(parts)


def kernel(result: dict[str, Any]) -> str:
    copied = f"A copy moves {result['copy_bytes_per_second'] / 1e12:.1f} TB/s here."
    rows = []
    for row in result["rows"]:
        fused, plain = row["kernel"]["device_us"], row["torch"]["device_us"]
        rows.append(
            [
                row["states"],
                "rows" if row["rows"] else "transposed",
                "angle, norm, cosine" if row["updates"] else "angle",
                f"{fused:.0f} us",
                f"{2 * row['state_bytes'] / fused / 1e6:.1f} TB/s",
                f"{plain:.0f} us",
                f"{plain / fused:.0f} x",
            ]
        )
    head = ["states (bf16)", "in memory", "readings", "kernel", "read", "torch's operations", ""]
    parts = [about(result["machine"]), copied, table(head, rows)]
    return "\n\n".join(parts if result["complete"] else [*parts, "Not all states were measured in this run."])


def analysis(result: dict[str, Any]) -> str:
    rows = [
        [label, f"{way['seconds']:.2f} s", f"{way['extra_megabytes']:.0f} MB"] for label, way in result["ways"].items()
    ]
    command = result["command"]
    rows.append(
        [
            "`layerprobe lokr`, the whole process to the proved config",
            f"{command['seconds']:.1f} s",
            f"{command['peak_megabytes']} MB in all",
        ]
    )
    stored = [[what, f"{value:.0f}"] for what, value in result["storage_bytes_per_sample"].items()]
    return f"""{about(result["machine"])}

{result["samples"]:,} samples with SD3.5 Large's 38 image and 37 text distances, in two readings.

{table(["from records to contributions and factors", "time", "memory beyond the imports"], rows)}

{table(["stored", "bytes a sample"], stored)}"""


def startup(result: dict[str, Any]) -> str:
    added, helped = result["autoload"]["added_ms"], result["help_seconds"]
    return f"""{about(result["machine"])}

The `.pth` file adds {added["median"]:.2f} ms ({added["first_quartile"]:.2f} to {added["third_quartile"]:.2f}) to every
start of the environment's Python. `layerprobe --help` takes {helped["median"]:.3f} s."""


def page() -> str:
    parts = [
        f"""# What it costs

`make bench` measures this again on a CPU, `python benchmarks/steps.py --device cuda` on a GPU, and
`benchmarks/tables.py` writes this page from benchmarks/results/. Ratios are medians of pairs that ran interleaved in
one process on the same inputs, in brackets the middle half of the pairs. `{PROBE}` is what a probe run does; the last
rows are what others do, and the floor is the least that any distance of all tokens has to read."""
    ]
    sections = [
        ("steps-cuda", "A step on a GPU", lambda result: steps(result, "device")),
        ("steps-cpu", "A step on a CPU", lambda result: steps(result, "cpu")),
        ("loop-cuda", "In SimpleTuner's loop, on a GPU", loop),
        ("loop-cpu", "In SimpleTuner's loop, on a CPU", loop),
        ("analysis", "From records to factors", analysis),
        ("startup", "Start-up", startup),
    ]
    if load("kernel-cuda"):
        sections.insert(1, ("kernel-cuda", "The fused kernel", kernel))
    for name, title, words in sections:
        result = load(name)
        parts.append(f"## {title}\n\n{words(result) if result else '**Not measured.**'}")
    parts.append(
        """## Not measured

Several GPUs, other cards, quantised bases and offloading on a GPU ([bases.md](bases.md) has a CPU's). The steps on a
GPU were measured with the fused kernel that read each state twice and left the residual readings to torch's operations;
`python benchmarks/kernel.py` measures the one that reads it once for all readings. Of SimpleTuner's own loop one figure
is known: on an H200 the real `simpletuner train` probed SD3.5 Large at 1024 px, batch 1, at 4 to 6 samples a second
after a start of some ten seconds, in 17.3 GB."""
    )
    return "\n\n".join(parts) + "\n"


def loop(result: dict[str, Any]) -> str:
    rows = [[part, f"{found['step_ms']:.2f}", f"{found['first_ms']:.0f}"] for part, found in result["parts"].items()]
    return f"""{about(result["machine"])} {result["model"].capitalize()}, {result["steps"]} steps.

{table(["part", "ms a step, on the host", "ms in the first steps"], rows)}

The probe takes {result["plugin_share"]:.1%} of a step of {result["step_ms"]:.1f} ms, and
{result["plugin_start_seconds"]:.2f} s of the start. The larger the model, the smaller its part. What a user can do
about the rest: a larger `train_batch_size` (one pass of the loop for more samples) and `dataloader_prefetch` (the next
batch is read during the forward)."""


def bases(result: dict[str, Any]) -> str:
    rows = []
    for name, found in result["bases"].items():
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(found["layers"].items()))
        rows.append([f"`{name}`", found["word"], layers, found["said"].replace("|", "\\|")])
    words = Counter(found["word"] for found in result["bases"].values())
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return f"""{about(result["machine"])} {len(result["bases"])} bases: {counts}.

{table(["base or mode", "verdict", "linear layers", "largest difference of a distance, or why not"], rows)}"""


def page_of_bases() -> str:
    parts = [
        """# Bases and modes

Does the probe record the right angles on every base that SimpleTuner can train on? `python benchmarks/bases.py` makes a
probe-only run of the real SimpleTuner on the tiny SD3 for each quantised base, way of offloading, compilation and
attention back end that SimpleTuner offers, and compares every recorded distance with the article's formula in float64,
on copies of the states that hooks of another kind took. *exact*: equal within 2e-6. *fails*: SimpleTuner itself ends
with that error here, with the probe or without. Layers that are too small are not quantised. `benchmarks/tables.py`
writes this page."""
    ]
    for device, title in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        result = load(f"bases-{device}")
        why = f"**Not measured**: `python benchmarks/bases.py --device {device}` measures it."
        parts.append(f"## {title}\n\n{bases(result) if result else why}")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the pages")
    options = parser.parse_args(arguments)
    for name, text in (("costs.md", page()), ("bases.md", page_of_bases())):
        (options.out / name).write_text(text, encoding="utf-8")
        print(f"wrote {name} from {RESULTS.name}/")


if __name__ == "__main__":
    main()
