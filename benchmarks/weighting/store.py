"""The files that `prepare` leaves and `run` and `report` read: arms and tasks. Needs nothing of the product."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from weighting.arm import Arm, Pair
from weighting.task import Task, encode, read_json, read_pictures

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


def pipelines(given: list[str]) -> dict[str, Path]:
    """name=folder, as often as given."""
    return {name: Path(path) for name, _, path in (one.partition("=") for one in given)}


def make_task(path: Path, pipeline: Path) -> None:
    """Write the task's file if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        Task(*(encode(pipeline, pictures) for pictures in read_pictures(EMOJI))).save(partial)
        partial.replace(path)


def load_task(path: Path, pipeline: Path, device: torch.device | str) -> Task:
    """From the file, which is made if it is not there."""
    make_task(path, pipeline)
    return Task.load(path, device)


def load_arms(path: Path) -> dict[str, Arm]:
    arms = {}
    for name, read in read_json(path).items():
        pairs = tuple(Pair(module, tuple(w1), tuple(w2), rate) for module, w1, w2, rate in read["pairs"])
        arms[name] = Arm(name, read["config"], pairs, read["note"])
    return arms


def save_arms(path: Path, arms: list[Arm]) -> None:
    written = {
        arm.name: {
            "note": arm.note,
            "pairs": [[pair.module, pair.w1, pair.w2, pair.rate] for pair in arm.pairs],
            "config": arm.config,
        }
        for arm in arms
    }
    path.write_text(json.dumps(written), encoding="utf-8")
