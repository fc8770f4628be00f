"""Writes docs/costs.md and docs/bases.md from the measurements in results/: no number in them is typed by hand.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def title(name: str) -> str:
    """A model of denoisers.SHAPES by the name that it is published under."""
    return {"sd3.5-large": "SD3.5 Large", "flux.1-dev": "Flux.1-dev", "emoji": "examples/emoji"}.get(name, name)


def users_words(run: dict[str, Any], device: str) -> str:
    """What a user wants to know first, of one model of steps.py."""
    rate = run["samples_per_second"]
    speed = f"{rate:.1f} samples a second" if rate >= 1 else f"{1 / rate:.1f} s a sample"
    allocated = run["bare"].get("allocated_bytes")
    memory = f", {allocated / 1e9:.1f} GB" if allocated else ""
    ablated = run.get("ablated_samples_per_second")
    left_out = f"; with every block left out, 200 samples in {200 / ablated / 60:.1f} minutes" if ablated else ""
    return (
        f"{title(run['model'])}, {pixels(run)} px, batch {run['batch']}, {device}: {speed}{memory}, 2,000 samples in "
        f"{2000 / rate / 60:.1f} minutes{left_out}"
    )


def pixels(run: dict[str, Any]) -> int:
    """The image's side: a token stands for 16 x 16 pixels in SD3 and Flux."""
    return 16 * math.isqrt(run["tokens"]["image"])


def loop_words(result: dict[str, Any]) -> str:
    """The same of a run of loop.py."""
    ranks = f", {result['ranks']} ranks" if result["ranks"] > 1 else ""
    rate = f"{result['samples_per_second']:.1f} samples a second, " if "samples_per_second" in result else ""
    clock = "ms" if rate else "ms of CPU time"
    return (
        f"{title(result['model'])} in SimpleTuner's loop, batch {result['batch']}{ranks}: "
        f"{rate}{result['step_ms']:.0f} {clock} a step, of which the probe has {result['plugin_share']:.1%} on the "
        f"host, and {result['plugin_start_seconds']:.2f} s of the start"
    )


def bases_words(result: dict[str, Any]) -> str:
    words = Counter(found["word"] for found in result["bases"].values())
    return f"{len(result['bases'])} bases and modes: " + ", ".join(f"{n} {word}" for word, n in words.most_common())


def figures(device: str, folder: Path, since: float = 0.0) -> list[str]:
    """What was measured on a device, a line for each figure, what a user wants to know first.

    since: the time of the oldest result that counts, in seconds since the epoch.
    """
    names = {path.stem for path in folder.glob("*.json") if path.stat().st_mtime >= since}
    found = {name: load(name, folder) or {} for name in sorted(names)}
    steps = found.get(f"steps-{device}", {"runs": []})
    lines = [users_words(run, steps["machine"]["device"]) for run in steps["runs"] if "samples_per_second" in run]
    lines += [loop_words(result) for name, result in found.items() if name.startswith(f"loop-{device}")]
    for name, (blocks, us) in found.get(f"hooks-{device}", {"models": {}})["models"].items():
        lines.append(f"{title(name)}, the hooks of each of {blocks} blocks: {us} us of the host")
    for run in steps["runs"]:
        for label, way in run["ways"].items():
            clock = way.get("device") or way.get("cpu")
            ratio = f"{clock['ratio']} of the bare forward" if clock else "out of memory"
            lines.append(f"{title(run['model'])}, batch {run['batch']}, {label}: {ratio}")
    lines += [kernel_line(row) for row in found.get(f"kernel-{device}", {"rows": []})["rows"]]
    return lines + [bases_words(result) for name, result in found.items() if name == f"bases-{device}"]


def kernel_line(row: dict[str, Any]) -> str:
    """A row of kernel.py: times on the device, what the kernel reads a second, how much faster it is."""
    kernel, plain = row["kernel"], row["torch"]
    others = f", the other kernel {row['other']['device_us']:7.1f} us" if "other" in row else ""
    layout, readings = "rows" if row["rows"] else "transposed", "updates" if row["updates"] else "angles"
    return (
        f"{row['states']:27} {layout:10} {readings:7} "
        f"{kernel['device_us']:7.1f} us (host {kernel['host_us']:5.1f}) "
        f"{2 * row['state_bytes'] / kernel['device_us'] / 1e6:4.1f} TB/s, torch {plain['device_us']:7.1f} us, "
        f"{plain['device_us'] / kernel['device_us']:4.1f} x, differs by {kernel['differs']:.0e}{others}"
    )


def steps(result: dict[str, Any], clock: str) -> str:
    parts = [
        f"""{about(result["machine"])}

Ratios are medians of pairs that ran interleaved in one process on the same inputs, in brackets the middle half of the
pairs. *{PROBE}* is what a probe run does. The last rows are what others do, and the floor is the least that any
distance of all tokens has to read."""
    ]
    for run in result["runs"]:
        tokens = run["tokens"]
        hooks = run.get("host_us_per_block")
        host = f" The hooks of a block take {hooks:.0f} us of the host." if hooks else ""
        parts.append(
            f"**{title(run['model'])}**, batch {run['batch']}: {run['blocks']} blocks, width {run['width']}, "
            f"{tokens['image']} image and {tokens['text']} text tokens, bf16; a block's states take "
            f"{size(run['state_bytes'])}.{host}"
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
                f"{row['other']['device_us']:.0f} us" if "other" in row else "",
            ]
        )
    head = ["states (bf16)", "in memory", "readings", "kernel", "read", "torch's operations", "", "the kernel before"]
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


def first(result: dict[str, Any]) -> str:
    """What a user wants to know first, a column for each model of steps.py: `result` is a GPU's."""
    unknown = "not measured"

    def ablated(run: dict[str, Any]) -> str:
        rate = run.get("ablated_samples_per_second")
        return f"{200 / rate / 60:.1f} minutes" if rate else unknown

    def looped(run: dict[str, Any]) -> str:
        measured, seen = load("loop-cuda"), load("loop-h200-seen")
        if measured and (measured["model"], measured["batch"]) == (run["model"], run["batch"]):
            return f"{measured['samples_per_second']:.1f}"
        if seen and (seen["model"], seen["batch"]) == (run["model"], run["batch"]):
            low, high = seen["samples_per_second"]
            return f"{low} to {high}, after {seen['first_steps_seconds']} s for the first four; {seen['gigabytes']} GB"
        return unknown

    questions: dict[str, Callable[[dict[str, Any]], str]] = {
        "samples a second": lambda run: f"**{run['samples_per_second']:.1f}**",
        "2,000 samples": lambda run: f"**{2000 / run['samples_per_second'] / 60:.1f} minutes**",
        "GPU memory": lambda run: f"**{run['bare']['allocated_bytes'] / 1e9:.1f} GB**",
        "what the probe adds to the forward's time": lambda run: f"{run['ways'][PROBE]['device']['ratio'] - 1:.1%}",
        "what it adds to the memory": lambda run: size(run["ways"][PROBE]["extra_peak_bytes"]),
        "samples a second in SimpleTuner's loop": looped,
        "200 samples with every block left out": ablated,
    }
    runs = [run for run in result["runs"] if PROBE in run["ways"]]
    head = [f"{title(run['model'])}, {pixels(run)} px, batch {run['batch']}" for run in runs]
    rows = [[question, *map(answer, runs)] for question, answer in questions.items()]
    return f"""On an {result["machine"]["device"]}, in bf16:

{table(["", *head], rows)}

The first lines are the forward with the probe in it, with random weights of the real shapes; SimpleTuner's loop, the
same as in a training, comes on top."""


def small_things() -> Iterator[str]:
    """What a run costs elsewhere."""
    if stored := load("analysis"):
        bytes_a_sample = stored["storage_bytes_per_sample"]["run folder, two readings, 1,000 samples a flush"]
        fastest = min(way["seconds"] for way in stored["ways"].values())
        yield f"2,000 samples of SD3.5 Large take {size(round(2000 * bytes_a_sample))} on disk."
        yield f"{stored['samples']:,} samples become factors in {fastest:.1f} s on a CPU."
    if started := load("startup"):
        added = started["autoload"]["added_ms"]["median"]
        yield f"Where it is installed and not used, the plugin adds {added:.1f} ms to each start of Python."


def hooks(result: dict[str, Any]) -> str:
    rows = [[title(model), blocks, f"{us:.0f} us"] for model, (blocks, us) in result["models"].items()]
    on_gpu = load("steps-cuda")
    times = [
        f"{title(run['model'])} {run['ways'][PROBE]['device']['base_seconds'] / run['blocks'] * 1e3:.1f} ms"
        for run in (on_gpu["runs"] if on_gpu else [])
    ]
    beside = f" Beside it, a block on an {on_gpu['machine']['device']}: {', '.join(times)}." if on_gpu else ""
    return f"""{about(result["machine"])}

The time of Python and of torch's dispatcher that a block's hooks take, and its share of the readings after the forward,
the arithmetic left out (a narrow model, and a kernel that does nothing), each in the step in which it was least
disturbed. A GPU computes meanwhile: as long as a block gives it more to do than the host, nothing waits for
this.{beside}

{table(["a narrow model with the blocks of", "blocks", "host time of the hooks per block"], rows)}"""


def loop(result: dict[str, Any]) -> str:
    rows = [[part, f"{found['step_ms']:.2f}", f"{found['first_ms']:.0f}"] for part, found in result["parts"].items()]
    return f"""{about(result["machine"])} {result["steps"]} steps.

{loop_words(result)}.

{table(["part", "ms a step", "ms in all before the fifth"], rows)}

The wider a model, the smaller the share of its distances. What a user can do about the rest: a larger
`train_batch_size` (one pass of the loop for more samples) and `dataloader_prefetch` (the next batch is read during the
forward).

In a process of its own the first step of a run takes seconds longer, with the probe or without: SimpleTuner 4.10 calls
`torch.compiler.cudagraph_mark_step_begin` also where nothing is compiled (its `dynamo_backend` is "no" then, and only
an empty one counts as none), and that imports torch's compiler. The measured process had it imported before."""


def several_gpus() -> str:
    """What is known of more than one."""
    loops = [load(path.stem) for path in sorted(RESULTS.glob("loop-cuda-*.json"))]
    if loops:
        return "\n\n".join(loop(found) for found in loops if found)
    on_cpu = (load("bases-cpu") or {"bases": {}})["bases"].get("two ranks")
    exact = f" On a CPU two ranks are {on_cpu['word']}: {on_cpu['said']} ([bases.md](bases.md))." if on_cpu else ""
    return f"**Not measured**: `python benchmarks/loop.py --device cuda --ranks 2`, where two are.{exact}"


def page() -> str:
    on_gpu = load("steps-cuda")
    parts = ["# What it costs"]
    if on_gpu:
        parts.append(first(on_gpu))
    parts.append("\n".join(f"- {thing}" for thing in small_things()))
    parts.append(
        """`python benchmarks/gpu.py` measures a GPU in ten minutes, `make bench` a CPU, and `benchmarks/tables.py`
writes this page from benchmarks/results/. What was not measured stands at the end."""
    )
    sections = [
        ("steps-cuda", "A step on a GPU", lambda result: steps(result, "device")),
        ("kernel-cuda", "The fused kernel", kernel),
        ("loop-cuda", "In SimpleTuner's loop, on a GPU", loop),
        ("hooks-cpu", "The hooks on the host", hooks),
        ("loop-cpu", "In SimpleTuner's loop, on a CPU", loop),
        ("analysis", "From records to factors", analysis),
        ("startup", "Start-up", startup),
    ]
    if load("steps-cpu"):
        sections.insert(4, ("steps-cpu", "A step on a CPU", lambda result: steps(result, "cpu")))
    missing = []
    for name, title_of, words in sections:
        if result := load(name):
            parts.append(f"## {title_of}\n\n{words(result)}")
        else:
            missing.append(title_of)
    parts.append(f"## Several GPUs\n\n{several_gpus()}")
    parts.append(not_measured(missing))
    return "\n\n".join(parts) + "\n"


def not_measured(missing: Sequence[str]) -> str:
    """What this page lacks. missing: the titles of whole sections."""
    lacks = ["Cards other than those named above.", "Bases and offloading on a GPU: [bases.md](bases.md) has a CPU's."]
    lacks += [f"*{title_of}.*" for title_of in missing if title_of != "The fused kernel"]
    if "The fused kernel" in missing:
        lacks.append(
            "*The fused kernel* of today: the steps on a GPU were measured with the one before, which read each state "
            "twice and left the residual readings to torch's operations. *The readings of all blocks at once*: they "
            "were taken after each block then, by small kernels; today a number a token and block is kept until the "
            "forward is over, 0.66 MB a sample of SD3.5 Large at 1024 px."
        )
    return "## Not measured\n\n" + "\n".join(f"- {what}" for what in lacks)


def bases(result: dict[str, Any]) -> str:
    rows = []
    for name, found in result["bases"].items():
        layers = ", ".join(f"{count} {kind}" for kind, count in sorted(found["layers"].items()))
        rows.append([f"`{name}`", found["word"], layers, found["said"].replace("|", "\\|")])
    cut = "" if result["complete"] else " Not all were tried in this run: its time was limited."
    return f"""{about(result["machine"])} {bases_words(result)}.{cut}

{table(["base or mode", "verdict", "linear layers", "largest difference of a distance, or why not"], rows)}"""


def page_of_bases() -> str:
    parts = [
        """# Bases and modes

Does the probe record the right angles on every base that SimpleTuner can train on? `python benchmarks/bases.py` makes a
probe-only run of the real SimpleTuner on a tiny SD3 for each quantised base, way of offloading, compilation and
attention back end that SimpleTuner offers, some of them also on a tiny Flux and on a tiny Wan with clips, and compares
every recorded distance with the article's formula in float64, on copies of the states that hooks of another kind took.
*exact*: equal within 2e-6. *fails*: SimpleTuner itself ends with that error here, with the probe or without. Layers
that are too small are not quantised. Group offloading is none of SimpleTuner 4.10's options; `layerprobe.observe` is
tested with diffusers' own.
`benchmarks/tables.py` writes this page."""
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
