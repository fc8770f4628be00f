"""What the trainings of a trial left: their losses on the same held-out samples.

Shape letters: N samples of a run, P samples that all trainings have, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.api import load
from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.trial.arms import is_shuffle
from simpletuner_layerprobe.trial.schedule import Training, best, finals, sweeps, swept_as
from simpletuner_layerprobe.trial.settings import Trial, is_done

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run

TUNING_SHARE, LEAST_TUNING = 5, 5
"""One in so many held-out images chooses the learning rate and does not judge, if at least so many choose."""


@dataclass(frozen=True)
class HeldOut:
    """loss: arm -> (S, P). image_P: the images' numbers. sigma_P. seeds: S that every arm has."""

    loss: Mapping[str, NDArray[np.float64]]
    image_P: NDArray[np.uint64]
    sigma_P: NDArray[np.float64]
    seeds: tuple[int, ...]


def held_out_run(folder: Path) -> Run:
    """The probe-only run of a training's adapter."""
    return load(folder / "layerprobe")


def mean_loss(run: Run) -> float:
    return float(np.asarray(run.facts["loss"], dtype=np.float64).mean())


def tuning_images(trial: Trial, image_P: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The images that choose learning rates: none without a sweep, all where there are too few to keep some apart."""
    images = np.unique(image_P)
    if not trial.learning_rates:
        return images[:0]
    chosen = images[::TUNING_SHARE]  # numbers of images are hashes: every fifth is a draw
    return chosen if len(chosen) >= LEAST_TUNING else images


def judging_images(trial: Trial, image_P: NDArray[np.uint64]) -> NDArray[np.uint64]:
    images, tuning = np.unique(image_P), tuning_images(trial, image_P)
    return images if len(tuning) == len(images) else np.setdiff1d(images, tuning)


def tuning_losses(trial: Trial) -> dict[str, dict[float, float]]:
    """Arm -> learning rate -> loss on the tuning images, of the sweeps that are done; infinite where one diverged."""
    losses: dict[str, dict[float, float]] = {}
    for training in sweeps(trial):
        folder = training.folder(trial)
        if training.rate is None or not is_done(folder):
            continue
        run = held_out_run(folder / "held-out")
        image_N = run.facts["image"]
        used_N = np.isin(image_N, tuning_images(trial, image_N))
        loss = float(np.asarray(run.facts["loss"], dtype=np.float64)[used_N].mean())
        losses.setdefault(training.arm, {})[training.rate] = loss if np.isfinite(loss) else float("inf")
    return losses


def best_rates(trial: Trial) -> dict[str, float | None]:
    """Arm -> the learning rate of its trainings that count, of the arms whose sweep is complete; None for the run's."""
    if not trial.learning_rates:
        return {arm.name: None for arm in trial.arms}
    losses = tuning_losses(trial)
    return {
        arm.name: best(losses[swept_as(arm.name)])
        for arm in trial.arms
        if len(losses.get(swept_as(arm.name), {})) == len(trial.learning_rates)
    }


def done_seeds(trial: Trial, trainings: Sequence[Training]) -> tuple[int, ...]:
    """The seeds that every arm has."""
    done = {(each.arm, each.seed) for each in trainings if is_done(each.folder(trial))}
    return tuple(seed for seed in trial.seeds if all((arm.name, seed) in done for arm in trial.arms))


def held_out_losses(trial: Trial) -> HeldOut:
    """The judging samples that all trainings have. Raises RunError if no seed is complete."""
    trainings = finals(trial, best_rates(trial))
    seeds = done_seeds(trial, trainings)
    if not seeds:
        raise RunError(
            f"{trial.folder} has no seed yet for which every arm is trained; go on with layerprobe trial run "
            f"{trial.folder}"
        )
    tables = {
        (each.arm, each.seed): _table(held_out_run(each.folder(trial) / "held-out"))
        for each in trainings
        if each.seed in seeds
    }
    common = set.intersection(*(set(table) for table in tables.values()))
    images = set(judging_images(trial, np.array([image for image, _ in common], dtype=np.uint64)).tolist())
    places = sorted(place for place in common if place[0] in images)
    first = next(iter(tables.values()))
    return HeldOut(
        loss={
            arm.name: np.array([[tables[arm.name, seed][place][1] for place in places] for seed in seeds])
            for arm in trial.arms
        },
        image_P=np.array([image for image, _ in places], dtype=np.uint64),
        sigma_P=np.array([first[place][0] for place in places]),
        seeds=seeds,
    )


def _table(run: Run) -> dict[tuple[int, int], tuple[float, float]]:
    """(image, repeat) -> (sigma, loss)."""
    facts = run.facts
    keys = zip(facts["image"].tolist(), facts["repeat"].tolist(), strict=True)
    values = zip(run.sigma.tolist(), facts["loss"].tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


def shuffles(trial: Trial) -> tuple[str, ...]:
    return tuple(arm.name for arm in trial.arms if is_shuffle(arm.name))
