"""`trial run`: every training with `simpletuner train`, then a probe-only run of its adapter on the held-out images.

A training that is done has `done.json` in its folder. One that was cut off starts anew, with nothing of what it left,
and so gives the same as one that was not cut off.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ProbeError, RunError
from simpletuner_layerprobe.files import ADAPTER_NAME, json_bytes, read_object, write_files
from simpletuner_layerprobe.run.lock import locked
from simpletuner_layerprobe.training.environment import OPTIONS_NAME, changed_options
from simpletuner_layerprobe.trial.make import HELD_OUT
from simpletuner_layerprobe.trial.process import train
from simpletuner_layerprobe.trial.results import best_rates, held_out_run, mean_loss
from simpletuner_layerprobe.trial.schedule import Only, Training, finals, sweeps, wanted
from simpletuner_layerprobe.trial.settings import BASE, DATA, DONE, PREPARED, Trial, is_done

LOCK = ".lock"
WAIT_SECONDS = 5.0

Say = Callable[[str], None]


@dataclass
class Work:
    """What one process does of a trial. say: takes a line for the user.

    seconds: that its trainings took. count: of the trainings that it is to see done; before: done when it began.
    """

    trial: Trial
    only: tuple[Only, ...]
    say: Say
    seconds: list[float] = field(default_factory=list)
    count: int = 0
    before: int = 0

    def run(self) -> None:
        """All that is missing. Raises ProbeError if a training fails, with its last words; what is done stays done."""
        self.trial.require_unchanged()
        self._each([self.trial.folder / PREPARED], self._prepare)
        tuned = wanted(sweeps(self.trial), self.only)
        counted = wanted(finals(self.trial, dict.fromkeys(self.trial.parameters_of())), self.only)
        self.count = len(tuned) + len(counted)
        self.before = sum(is_done(each.folder(self.trial)) for each in (*tuned, *counted))
        self._trainings(tuned)
        rate_of = best_rates(self.trial)
        self._trainings(wanted(finals(self.trial, rate_of), self.only))

    def _trainings(self, trainings: Sequence[Training]) -> None:
        by_folder = {each.folder(self.trial): each for each in trainings}
        self._each(list(by_folder), lambda folder: self._training(by_folder[folder]))

    def _each(self, folders: Sequence[Path], act: Callable[[Path], None]) -> None:
        """Act on every folder that is not done; what another process has is waited for."""
        told = False
        while left := [folder for folder in folders if not is_done(folder)]:
            acted = False
            for folder in left:
                with claimed(folder) as mine:
                    if mine and not is_done(folder):
                        act(folder)
                        acted = True
            if not acted:
                if not told:
                    self.say(f"waiting for another process that works on {left[0]}")
                    told = True
                time.sleep(WAIT_SECONDS)

    def _prepare(self, folder: Path) -> None:
        """One step of training, so that SimpleTuner's caches are there, and the base's own loss on the held-out images.

        Filling its caches draws random numbers: the first training would see other images than those after it.
        """
        began = time.monotonic()
        self.say("preparing: SimpleTuner's caches, and the base without an adapter")
        arm = self.trial.arms[0].name
        first = folder / "train"
        own = {"max_train_steps": 1, "lr_warmup_steps": 0, "seed": self.trial.tuning_seed}
        self._start(arm, first, own)
        shutil.rmtree(first / "output", ignore_errors=True)
        base = self.trial.folder / BASE
        self._probe(arm, base, None)
        self._done(folder, began)
        loss = mean_loss(held_out_run(base))
        self.say(f"prepared in {duration(time.monotonic() - began)}: held-out loss {loss:.4f} without an adapter")

    def _training(self, training: Training) -> None:
        began = time.monotonic()
        folder = training.folder(self.trial)
        own: dict[str, Any] = {"seed": training.seed}
        if training.rate is not None:
            own["learning_rate"] = training.rate
        self._start(training.arm, folder, own)
        adapter = folder / "output" / ADAPTER_NAME
        if not adapter.is_file():
            raise ProbeError(f"the training left no {adapter}; its log is {folder / 'train.log'}")
        trained = time.monotonic()
        self._probe(training.arm, folder / "held-out", adapter)
        self._done(folder, began)
        self.seconds.append(time.monotonic() - began)
        self._tell(training, trained - began, mean_loss(held_out_run(folder / "held-out")))

    def _tell(self, training: Training, trained_seconds: float, loss: float) -> None:
        done = self.before + len(self.seconds)
        left = max(0, self.count - done) * sum(self.seconds) / len(self.seconds)
        rate = "" if training.rate is None else f", learning rate {training.rate:g}"
        what = "sweep" if training.sweep else f"seed {training.seed}"
        after = f"; {duration(left)} left" if left else ""
        self.say(
            f"[{done}/{self.count}] {training.arm} {what}{rate}: trained in {duration(trained_seconds)}, held-out "
            f"loss {loss:.4f}{after}"
        )

    def _start(self, arm: str, folder: Path, own: dict[str, Any]) -> None:
        """Train an arm into a folder that holds nothing else."""
        shutil.rmtree(folder / "output", ignore_errors=True)
        self._simpletuner(arm, folder, {**own, "output_dir": (folder / "output").as_posix()}, "train.log")

    def _probe(self, arm: str, folder: Path, adapter: Path | None) -> None:
        """A probe-only run over the held-out images, once through, with the trial's noise."""
        shutil.rmtree(folder, ignore_errors=True)
        own = {
            "layerprobe": True,
            "layerprobe_samples": 0,
            "layerprobe_noise_seed": str(self.trial.noise_seed),
            "layerprobe_sigmas": "stratified",
            "layerprobe_adapter": "none" if adapter is None else adapter.as_posix(),
            "data_backend_config": (self.trial.folder / DATA / HELD_OUT).as_posix(),
            "output_dir": folder.as_posix(),
            "num_train_epochs": 1,
            "max_train_steps": 0,
            "lr_warmup_steps": 0,
            "caption_dropout_probability": 0.0,
            "seed": self.trial.tuning_seed,
        }
        self._simpletuner(arm, folder, own, "probe.log")

    def _simpletuner(self, arm: str, folder: Path, own: dict[str, Any], log: str) -> None:
        options = read_object(self.trial.arm_folder(arm) / OPTIONS_NAME, "an environment of the trial")
        config = folder / OPTIONS_NAME
        write_files({config: json_bytes(changed_options(options, own))}, force=True)
        train(config, folder / log)

    def _done(self, folder: Path, began: float) -> None:
        content = json.dumps({"seconds": round(time.monotonic() - began, 1)}) + "\n"
        write_files({folder / DONE: content.encode()}, force=True)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether the folder is this process's, for as long as the context is open."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, "taken"):
            yield True
    except RunError as error:
        if str(error) != "taken":
            raise
        yield False


def duration(seconds: float) -> str:
    """ "4 min 12 s"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
