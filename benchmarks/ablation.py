"""The study of docs/ablation.md: is the angle worth anything? Three probe runs with every block left out, and one page.

python benchmarks/ablation.py FOLDER            makes the runs in FOLDER (half an hour on two cores), then the numbers
python benchmarks/ablation.py FOLDER --runs     the runs alone; started again, it goes on where it was
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import simpletuner_layerprobe as layerprobe
from simpletuner_layerprobe.analyse.ablation import Ablation
from simpletuner_layerprobe.analyse.ranks import Interval, agreement

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ablation.md"
START, END = "<!-- results: made by benchmarks/ablation.py -->", "<!-- /results -->"
SAMPLES = 600
# name -> (environment of examples/emoji, seed)
RUNS = {"A": ("emoji-seen", 0), "B": ("emoji-probe", 0), "C": ("emoji-seen", 1)}
STYLES = {"A": "trained styles", "B": "unseen style", "C": "trained styles, other seed"}


def record(folder: Path) -> None:
    """Make the runs that FOLDER does not have yet, by `simpletuner train`."""
    if not (folder / "config").exists():
        shutil.copytree(ROOT / "examples" / "emoji", folder, dirs_exist_ok=True)
        subprocess.run([sys.executable, "unpack.py"], cwd=folder, check=True)
    for name, (environment, seed) in RUNS.items():
        config = folder / "config" / f"study-{name}"
        shutil.copytree(folder / "config" / environment, config, dirs_exist_ok=True)
        options = json.loads((config / "config.json").read_text(encoding="utf-8"))
        options |= {
            "layerprobe_samples": SAMPLES,
            "layerprobe_sigmas": "stratified",
            "layerprobe_ablation": "both",
            "layerprobe_ablation_samples": SAMPLES,
            "layerprobe_residual": True,
            "seed": seed,
            "output_dir": f"output/study-{name}",
        }
        (config / "config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(["simpletuner", "train", f"env=study-{name}"], cwd=folder, env=environ, check=True)


def answers(runs: dict[str, layerprobe.Run]) -> dict[str, Any]:
    """Every number that the page tells, and the protocol's verdicts."""
    made = {name: run.ablation(reading="mean") for name, run in runs.items()}
    levels = {name: run.levels("ablation") for name, run in runs.items()}
    half, other_half = runs["A"].parted_images()
    fifty, _ = runs["A"].parted_images(50)
    pairs = {
        "two halves of A's images": [runs["A"].levels("ablation", images=images) for images in (half, other_half)],
        "50 of A's images, and all": [runs["A"].levels("ablation", images=fifty), levels["A"]],
        "two seeds, A and C": [levels["A"], levels["C"]],
        "trained and unseen styles, A and B": [levels["A"], levels["B"]],
    }
    stable = {name: asdict(agreement(*pair)) for name, pair in pairs.items()}
    for numbers in stable.values():
        numbers["stable"] = numbers["correlation"] >= 0.9 and numbers["most"] >= 2 and numbers["least"] >= 2
    told = {name: one_run(runs[name], made[name]) for name in RUNS}
    return {"runs": told, "verdicts": verdicts(made), "stability": stable}


def one_run(run: layerprobe.Run, made: Ablation) -> dict[str, Any]:
    image, text = made.told["image"], made.text
    assert text is not None
    return {
        "samples": made.samples,
        "images": made.images,
        "loss": round(float(np.nanmean(run.facts["loss"])), 4),
        "loss increase": rounded(made.loss.value_L),
        "low": rounded(made.loss.low_L),
        "high": rounded(made.loss.high_L),
        "loss increase by sigma": [rounded(row_L) for row_L in made.loss_TL],
        "angle": rounded(made.angle["image"].value_L),
        "text loss increase": rounded(text.loss.value_L),
        "text angle": rounded(made.angle["text"].value_L),
        "needed": list(made.needed),
        "hardly": list(made.hardly),
        "over blocks": compared(image.angle.blocks, image.baselines, image.better, "blocks"),
        "over cells": compared(image.angle.cells, image.baselines, image.better, "cells"),
        "profile": {"mean": shown(image.profile.mean), "limit": round(image.profile.limit, 3), "p": image.profile.p},
        "text share": shown(text.share),
        "text angle tells": shown(text.told.angle.blocks),
    }


def compared(angle: Interval, baselines: Any, better: Any, what: str) -> dict[str, Any]:
    return {"angle": shown(angle)} | {
        name: {
            "itself": shown(getattr(baselines[name], what)),
            "angle is better by": shown(getattr(better[name], what)),
        }
        for name in baselines
    }


def verdicts(made: dict[str, Ablation]) -> dict[str, str]:
    """Yes, no or undecided, by the protocol."""
    judged = [made["A"], made["B"]]
    images = [one.told["image"] for one in judged]
    texts = [one.text for one in judged if one.text is not None]

    def tells(intervals: list[Interval]) -> str:
        if any(interval.high < 0.5 for interval in intervals):
            return "no"
        return "yes" if all(interval.low >= 0.5 for interval in intervals) else "undecided"

    said = {
        "the angle tells the blocks that the loss needs": tells([image.angle.blocks for image in images]),
        "the angle tells the cells that the loss needs": tells([image.angle.cells for image in images]),
    }
    for baseline in images[0].baselines:
        for what in ("blocks", "cells"):
            clear = all(getattr(image.better[baseline], what).low > 0 for image in images)
            said[f"better than {baseline}, over {what}"] = "yes" if clear else "no"
    clear = all(image.profile.mean.value > image.profile.limit and image.profile.mean.low > 0 for image in images)
    said["a block's angle profile over sigma foretells its ablation profile"] = "yes" if clear else "no"
    clear = all(text.told.angle.blocks.low > 0 for text in texts)
    said["the text angle tells what the text updates are worth"] = "yes" if clear else "no"
    return said


def rounded(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 5) for value in values]


def shown(interval: Interval) -> list[float]:
    return [round(float(end), 3) for end in (interval.value, interval.low, interval.high)]


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    text = ["| question | answer by the protocol |", "|---|---|"]
    text += [f"| {question} | **{answer}** |" for question, answer in results["verdicts"].items()]
    text += ["", "| | " + " | ".join(f"{name}: {STYLES[name]}" for name in RUNS) + " |", "|---" * (len(RUNS) + 1) + "|"]
    rows: list[tuple[str, Any]] = [
        ("samples of images", lambda run: f"{run['samples']} of {run['images']}"),
        ("mean loss", lambda run: f"{run['loss']:.3f}"),
        ("needed clearly more than most", lambda run: ", ".join(map(str, run["needed"])) or "none"),
        ("hardly needed", lambda run: ", ".join(map(str, run["hardly"])) or "none"),
    ]
    for what in ("blocks", "cells"):
        rows.append((f"angle, over {what}", lambda run, what=what: written(run[f"over {what}"]["angle"])))
        for name in results["runs"]["A"][f"over {what}"]:
            if name != "angle":
                rows.append(
                    (
                        f"{name}, over {what}; the angle is better by",
                        lambda run, what=what, name=name: "; ".join(
                            written(run[f"over {what}"][name][key]) for key in ("itself", "angle is better by")
                        ),
                    )
                )
    rows += [
        (
            "profile over sigma within a block; 97.5th percentile of shuffled blocks",
            lambda run: f"{written(run['profile']['mean'])}; {run['profile']['limit']:.2f}",
        ),
        ("text update alone, share of the loss increase", lambda run: written(run["text share"])),
        ("text angle against it, over blocks", lambda run: written(run["text angle tells"])),
    ]
    text += [f"| {name} | " + " | ".join(cell(results["runs"][run]) for run in RUNS) + " |" for name, cell in rows]
    text += ["", "| stability | rank correlation | same of the 3 most, of the 3 least | stable |", "|---|---|---|---|"]
    text += [
        f"| {name} | {one['correlation']:.2f} | {one['most']}, {one['least']} | {'yes' if one['stable'] else 'no'} |"
        for name, one in results["stability"].items()
    ]
    text += ["", "Loss increase of each block, and its 95% interval:", ""]
    text += ["| block | " + " | ".join(RUNS) + " | A, text update alone |", "|---" * (len(RUNS) + 2) + "|"]
    first = results["runs"]["A"]
    for number in range(len(first["loss increase"])):
        cells = [
            f"{run['loss increase'][number]:.4f} [{run['low'][number]:.4f}, {run['high'][number]:.4f}]"
            for run in results["runs"].values()
        ]
        alone = first["text loss increase"]
        text.append(
            f"| {number} | {' | '.join(cells)} | {f'{alone[number]:.4f}' if number < len(alone) else 'no text'} |"
        )
    return "\n".join(text)


def written(numbers: list[float]) -> str:
    value, low, high = numbers
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def figure(runs: dict[str, layerprobe.Run], path: Path) -> None:
    """Of A and B: both heatmaps, and the mean angle against the loss increase."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for row, name in zip(axes, ("A", "B"), strict=True):
        made = runs[name].ablation(reading="mean")
        angle_L, loss_L = made.angle["image"].value_L, made.loss.value_L
        for axis, values_TL, title in (
            (row[0], runs[name].heatmap("image", "mean").values_TL, "mean angular distance, image stream"),
            (row[1], np.clip(made.loss_TL, 0, None), "loss increase with the block left out"),
        ):
            mesh = axis.pcolormesh(
                np.arange(values_TL.shape[1] + 1) - 0.5,
                np.linspace(0, 1, len(values_TL) + 1),
                values_TL,
                norm=matplotlib.colors.PowerNorm(0.5, vmin=0),
                cmap="magma",
            )
            drawing.colorbar(mesh, ax=axis)
            axis.set(title=f"{name}: {title}", xlabel="block", ylabel="sigma")
        row[2].errorbar(
            angle_L,
            loss_L,
            yerr=[loss_L - made.loss.low_L, made.loss.high_L - loss_L],
            fmt="none",
            ecolor="#bbbbbb",
        )
        for number, (x, y) in enumerate(zip(angle_L, loss_L, strict=True)):
            row[2].text(x, y, str(number), ha="center", va="center", fontsize=9)
        row[2].set(title=f"{name}: {STYLES[name]}", xlabel="mean angle", ylabel="loss increase")
        row[2].set_yscale("symlog", linthresh=0.01)
        row[2].margins(0.08)
    drawing.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", action="store_true", help="do not look at the numbers")
    given = parser.parse_args()
    record(given.folder)
    if given.runs:
        return
    runs = {name: layerprobe.load(given.folder / "output" / f"study-{name}" / "layerprobe") for name in RUNS}
    results = answers(runs)
    (ROOT / "benchmarks" / "results" / "ablation.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(runs, PAGE.with_suffix(".png"))
    before, _, after = PAGE.read_text(encoding="utf-8").partition(START)
    after = after.partition(END)[2] or "\n"
    PAGE.write_text(f"{before}{START}\n{page(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
