"""trial.json: what a trial compares and how, written once by `trial new`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import read_object

SCHEMA = 1
TRIAL_NAME = "trial.json"
ARMS, DATA, TRAININGS, BASE, PREPARED = "arms", "data", "trainings", "base", "prepared"
DONE = "done.json"
"""In the folder of a training that is trained and judged."""


@dataclass(frozen=True)
class ArmFacts:
    """parameters: trainable ones. sha256: of the arm's lycoris_config.json."""

    name: str
    parameters: int
    sha256: str
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """What the folder of a trial holds.

    folder: it. model: SimpleTuner's names. parameters: asked for. arms: the reference first. seeds: of the trainings
    that count, never 0, which SimpleTuner takes for none. learning_rates: tried on tuning_seed first, () for the run's
    own alone. noise_seed: of the held-out samples. images: held out, None if unknown.
    """

    folder: Path
    run: str
    model: str
    parameters: int
    arms: tuple[ArmFacts, ...]
    seeds: tuple[int, ...]
    steps: int
    learning_rates: tuple[float, ...]
    tuning_seed: int
    noise_seed: int
    held_out: tuple[str, ...]
    images: int | None
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def arm_folder(self, arm: str) -> Path:
        return self.folder / ARMS / arm

    def parameters_of(self) -> dict[str, int]:
        return {arm.name: arm.parameters for arm in self.arms}

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.schema} | {
            name: value for name, value in asdict(self).items() if name not in ("folder", "schema")
        }

    def require_unchanged(self) -> None:
        """Raises ConfigError if a config of the trial is not the one that was proved."""
        for arm in self.arms:
            path = self.arm_folder(arm.name) / "lycoris_config.json"
            try:
                changed = hashlib.sha256(path.read_bytes()).hexdigest() != arm.sha256
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}; make the trial anew") from None
            if changed:
                raise ConfigError(f"{path} was changed after the trial was made, so its arms cannot be compared")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trial:
        """Raises ConfigError if the folder holds no trial."""
        path = Path(folder) / TRIAL_NAME
        if not path.is_file():
            raise ConfigError(f"{folder} is no trial: it has no {TRIAL_NAME}; make it with layerprobe trial new")
        read = read_object(path, "a trial")
        if read.get("schema") != SCHEMA:
            raise ConfigError(f"{path} has schema {read.get('schema')!r}; this version reads {SCHEMA}")
        try:
            return cls(**_typed(Path(folder), read))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ConfigError(f"{path} is damaged; make the trial anew with layerprobe trial new") from None


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def _typed(folder: Path, read: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(Trial)} - {"folder"}
    values: dict[str, Any] = {name: read[name] for name in known}
    values["arms"] = tuple(ArmFacts(**arm) for arm in read["arms"])
    if not all(re.fullmatch(r"[\w-]+", arm.name) for arm in values["arms"]):
        raise ValueError("an arm's name is that of its folder, whose trainings are made anew")
    values["seeds"] = tuple(int(seed) for seed in read["seeds"])
    values["learning_rates"] = tuple(float(rate) for rate in read["learning_rates"])
    values["held_out"] = tuple(map(str, read["held_out"]))
    values["notes"] = tuple(map(str, read["notes"]))
    return {"folder": folder, **values}
