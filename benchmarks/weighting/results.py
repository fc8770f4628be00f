"""What a run leaves: a npz for every chunk of trainings, complete or not at all.

Shape letters: E trainings, Q images, U sigmas, T steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weighting.arm import Training

SWEEP, FINAL = "sweep", "final"


@dataclass(frozen=True)
class Result:
    """A training's losses: loss_QU by image and sigma, mean over the noises, of the split that its phase looks at."""

    base: str
    phase: str
    arm: str
    seed: int
    rate: float
    loss_QU: NDArray[np.float32]

    @property
    def mean(self) -> float:
        return float(self.loss_QU.astype(np.float64).mean())


def write_chunk(
    folder: Path,
    base: str,
    phase: str,
    trainings: Sequence[Training],
    loss_EQU: NDArray[np.float32],
    loss_TE: NDArray[np.float32],
    about: dict[str, object],
) -> Path:
    """loss_TE: the training's own losses, for a look."""
    number = len(list(folder.glob(f"{base}-*.npz")))
    path = folder / f"{base}-{number:03}-{phase}-{os.getpid()}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            loss_EQU=loss_EQU,
            loss_TE=loss_TE,
            rate=np.array([training.rate for training in trainings]),
            seed=np.array([training.seed for training in trainings]),
            arm=np.array([training.arm.name for training in trainings]),
            about=json.dumps({"base": base, "phase": phase, **about}),
        )
    os.replace(partial, path)
    return path


def read_results(folder: Path) -> Iterator[Result]:
    """All trainings of all chunks, in the order in which they were made."""
    for path in sorted(folder.glob("*-[0-9][0-9][0-9]-*.npz")):
        with np.load(path) as read:
            about = json.loads(str(read["about"]))
            loss_EQU, arms = read["loss_EQU"], read["arm"].tolist()
            for e, (arm, seed, rate) in enumerate(zip(arms, read["seed"].tolist(), read["rate"].tolist(), strict=True)):
                yield Result(about["base"], about["phase"], arm, seed, rate, loss_EQU[e])


def mean_by_rate(results: Sequence[Result], base: str, arms: Sequence[str]) -> dict[float, float]:
    """Mean tuning loss of these arms at each learning rate of the sweep; inf where a training diverged."""
    found: dict[float, list[float]] = {}
    for result in results:
        if (result.base, result.phase) == (base, SWEEP) and result.arm in arms:
            found.setdefault(result.rate, []).append(result.mean if np.isfinite(result.loss_QU).all() else float("inf"))
    return {rate: float(np.mean(means)) for rate, means in sorted(found.items())}
