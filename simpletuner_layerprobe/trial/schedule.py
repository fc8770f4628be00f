"""The trainings of a trial and their order: every arm's learning rate first, then the seeds that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.trial.arms import SHUFFLE, is_shuffle
from simpletuner_layerprobe.trial.settings import TRAININGS, Trial

SWEEP = "sweep"


@dataclass(frozen=True)
class Training:
    """One training of an arm. rate: None for the run's own learning rate. sweep: whether it only chooses one."""

    arm: str
    seed: int
    rate: float | None
    sweep: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}/rate-{self.rate:g}" if self.sweep else f"{self.arm}/seed-{self.seed}"

    def folder(self, trial: Trial) -> Path:
        return trial.folder / TRAININGS / self.name


def sweeps(trial: Trial) -> list[Training]:
    """Every arm with every learning rate on the tuning seed. The shuffles are one arm in this: the first is tried."""
    if not trial.learning_rates:
        return []
    return [
        Training(arm.name, trial.tuning_seed, rate, sweep=True)
        for rate in trial.learning_rates
        for arm in trial.arms
        if not is_shuffle(arm.name) or arm.name == swept_as(arm.name)
    ]


def swept_as(arm: str) -> str:
    """The arm whose sweep an arm goes by."""
    return f"{SHUFFLE}-1" if is_shuffle(arm) else arm


def finals(trial: Trial, rate_of: Mapping[str, float | None]) -> list[Training]:
    """The trainings that count, seed by seed, of the arms whose learning rate is known."""
    return [
        Training(arm.name, seed, rate_of[arm.name]) for seed in trial.seeds for arm in trial.arms if arm.name in rate_of
    ]


def best(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest tuning loss, the smaller one of equals."""
    return min(sorted(losses), key=lambda rate: losses[rate])


@dataclass(frozen=True)
class Only:
    """A part of a trial: `arm`, and of it one seed, its sweep, or all with part ""."""

    arm: str
    part: str = ""

    def covers(self, training: Training) -> bool:
        """The sweep of an arm belongs to each of its seeds: without it their learning rate is not known."""
        if training.sweep:
            return training.arm == swept_as(self.arm)
        return training.arm == self.arm and self.part in ("", str(training.seed))


def parse_only(text: str | None, trial: Trial) -> tuple[Only, ...]:
    """ "plan/1,uniform": seed 1 of plan, all of uniform; () for None. Raises ConfigError for what the trial lacks."""
    if text is None:
        return ()
    parts: list[Only] = []
    names = [arm.name for arm in trial.arms]
    for item in text.split(","):
        arm, _, part = item.strip().partition("/")
        if arm not in names or part not in ("", SWEEP, *map(str, trial.seeds)):
            raise ConfigError(
                f"--only {item.strip()!r}: expected ARM, ARM/SEED or ARM/{SWEEP}, with the arms {', '.join(names)} and "
                f"the seeds {', '.join(map(str, trial.seeds))}"
            )
        parts.append(Only(arm, part))
    return tuple(parts)


def wanted(trainings: Sequence[Training], only: Sequence[Only]) -> list[Training]:
    return [each for each in trainings if not only or any(part.covers(each) for part in only)]
