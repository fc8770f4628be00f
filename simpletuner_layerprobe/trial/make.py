"""`trial new`: the arms, their environments and the data of a trial, written as one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import json_bytes, write_files
from simpletuner_layerprobe.targets import require_new_folder
from simpletuner_layerprobe.training.environment import OPTIONS_NAME, changed_options, option, read_options
from simpletuner_layerprobe.trial.arms import Arm, arm_names, make_arms
from simpletuner_layerprobe.trial.data import split_data
from simpletuner_layerprobe.trial.settings import ARMS, DATA, TRIAL_NAME, ArmFacts, Trial

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run

TUNING_SEED, NOISE_SEED = 1001, 1
HELD_OUT, TRAIN = "held-out.json", "train.json"
NOT_TAKEN = (
    "checkpointing_steps",
    "checkpoint_step_interval",
    "checkpoint_epoch_interval",
    "resume_from_checkpoint",
    "push_to_hub",
    "push_checkpoints_to_hub",
    "webhook_config",
    "seed_for_each_device",
)
"""Options of the run that no training of a trial has: it keeps no checkpoints, and tells nobody."""


@dataclass(frozen=True)
class Wish:
    """What `trial new` is asked for; see Trial."""

    parameters: int
    arms: str
    seeds: int
    steps: int
    held_out: str
    contrast: float
    learning_rates: tuple[float, ...] = ()


def new_trial(folder: Path, run: Run, wish: Wish) -> Trial:
    """Write the folder. Nothing is left of it if something is wrong, which is a ConfigError."""
    require_new_folder(folder)
    names = arm_names(wish.arms)
    options = read_options(run.path)
    warm_up = option(options, "lr_warmup_steps")
    if isinstance(warm_up, int | float) and warm_up >= wish.steps:
        raise ConfigError(
            f"the run's config has {warm_up} steps of warm-up (lr_warmup_steps), and the trial {wish.steps} steps in "
            "all; take more --steps"
        )
    backends = option(options, "data_backend_config")
    if not backends:
        raise ConfigError("the run's config names no data_backend_config, so its data are not known")
    data = split_data(Path(str(backends)), wish.held_out)
    arms = make_arms(run, names, wish.parameters, wish.contrast)
    trial = Trial(
        folder=folder,
        run=str(run.path),
        model=run.model,
        parameters=wish.parameters,
        arms=tuple(ArmFacts(arm.name, arm.plan.parameters, _hash(arm), arm.note) for arm in arms),
        seeds=tuple(range(1, wish.seeds + 1)),
        steps=wish.steps,
        learning_rates=wish.learning_rates,
        tuning_seed=TUNING_SEED,
        noise_seed=NOISE_SEED,
        held_out=data.held_out_ids,
        images=data.images,
        notes=data.notes,
    )
    try:
        write_files({folder / DATA / TRAIN: _lines(data.train), folder / DATA / HELD_OUT: _lines(data.held_out)})
        for arm in arms:
            where = trial.arm_folder(arm.name)
            own = _training_options(trial, arm, where.as_posix())
            written = {**arm.plan.files(), OPTIONS_NAME: json_bytes(changed_options(options, own))}
            write_files({where / name: content for name, content in written.items()})
        write_files({folder / TRIAL_NAME: json_bytes(trial.to_json())})  # last: without it the folder is no trial
    except BaseException:
        for part in (ARMS, DATA):
            shutil.rmtree(folder / part, ignore_errors=True)
        raise
    return trial


def _training_options(trial: Trial, arm: Arm, folder: str) -> dict[str, Any]:
    """What every training of an arm has in common, over the run's own options; None: left out."""
    return {
        **dict.fromkeys(NOT_TAKEN),
        **arm.plan.options(folder),
        "data_backend_config": (trial.folder / DATA / TRAIN).as_posix(),
        "output_dir": (trial.arm_folder(arm.name) / "output").as_posix(),
        "max_train_steps": trial.steps,
        "num_train_epochs": 0,
        "seed": trial.seeds[0],
        "checkpoint_step_interval": trial.steps + 1,
        "validation_disable": True,
        "report_to": "none",
    }


def _hash(arm: Arm) -> str:
    (content,) = arm.plan.files().values()
    return hashlib.sha256(content).hexdigest()


def _lines(backends: Sequence[Any]) -> bytes:
    return (json.dumps(backends, indent=2, ensure_ascii=False) + "\n").encode()
