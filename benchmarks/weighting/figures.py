"""The two figures of the study. Small PNGs for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, RED, GREY = "#2b6cb0", "#c05621", "#8a8f98"


def differences(path: Path, rows: Sequence[dict], margin: float, title: str) -> None:
    """A point with its 95% interval per arm, the best on top; the band is what 10% more parameters give."""
    ordered = sorted(rows, key=lambda row: row["difference"], reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.19 * len(ordered) + 1.2), layout="constrained")
    if margin > 0:
        axes.axvspan(-margin * 1e3, margin * 1e3, color="#e2e8f0", zorder=0, label="10% more or fewer parameters")
    axes.axvline(0, color=GREY, linewidth=0.8)
    for place, row in enumerate(ordered):
        colour = GREY if row["arm"].startswith("shuffle-") else BLUE if row["difference"] < 0 else RED
        low, high = (1e3 * end for end in row["interval"])
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot(1e3 * row["difference"], place, "o", color=colour, markersize=3.5)
    axes.set_yticks(range(len(ordered)), [row["arm"] for row in ordered], fontsize=7)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set_xlabel("held-out loss against equal factors, thousandths (left is better)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    if margin > 0:
        axes.legend(fontsize=7, loc="upper right", frameon=False)
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    plt.close(figure)


def by_size(path: Path, rows: Sequence[dict], title: str) -> None:
    """Loss against parameters: the equal plans as a line, the other arms as points."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    equal = sorted((row for row in rows if row["arm"].startswith("uniform") and "-lr" not in row["arm"]), key=_size)
    others = [row for row in rows if row not in equal]
    axes.plot(
        [row["parameters"] for row in equal], [row["loss"] for row in equal], "o-", color=BLUE, label="equal factors"
    )
    for label, colour, of in (
        ("uneven plans", RED, [row for row in others if not row["arm"].startswith("shuffle-")]),
        ("shuffles", GREY, [row for row in others if row["arm"].startswith("shuffle-")]),
    ):
        axes.scatter([row["parameters"] for row in of], [row["loss"] for row in of], s=12, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters", fontsize=8)
    axes.set_ylabel("held-out loss", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    plt.close(figure)


def _size(row: dict) -> int:
    return int(row["parameters"])
