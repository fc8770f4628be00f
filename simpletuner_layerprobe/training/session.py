"""One probe-only run inside the training process: what is to be recorded, and what the user is told of it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.probe.families import Family
from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.modules import ModuleRow, module_table
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.readings import TOKENS, parse_reading
from simpletuner_layerprobe.run.folder import write_new_file
from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.lock import locked
from simpletuner_layerprobe.run.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    Manifest,
    Module,
    Stream,
    Target,
    create_run,
    new_run_id,
    utc_now,
)
from simpletuner_layerprobe.run.rows import UNKNOWN
from simpletuner_layerprobe.training.ablation import Predict, StepAblation
from simpletuner_layerprobe.training.adapter import AdapterFile
from simpletuner_layerprobe.training.facts import sample_facts, text_mask
from simpletuner_layerprobe.training.fixed_noise import FixedNoise, NoDraws
from simpletuner_layerprobe.training.goal import Goal
from simpletuner_layerprobe.training.guard import random_numbers_kept
from simpletuner_layerprobe.training.losses import predictions, sample_losses
from simpletuner_layerprobe.training.noise import RULES, sigma_of
from simpletuner_layerprobe.training.noise_check import NoiseCheck, how_checked
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.own import TRAINING_NAME
from simpletuner_layerprobe.training.recorder import Recorder
from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas
from simpletuner_layerprobe.training.spread import Spread
from simpletuner_layerprobe.training.stop import Stop
from simpletuner_layerprobe.training.summary import LastLine, start_text

CONFIG_NAME = "config.json"

OwnParameters = Callable[[Mapping[str, Any], Manifest], int | None]
"""(what a config trains, the model) -> its trainable parameters, None if they are not known."""


class Watcher(Protocol):
    """Looks at the run while it is recorded, on the main process. What goes wrong with it ends no run.

    wants_stop: whether the run shall end after the current step. told: what it adds to the progress bar.
    """

    @property
    def wants_stop(self) -> bool: ...

    @property
    def told(self) -> Mapping[str, str]: ...

    def begins(self, recorded: int) -> None:
        """Recording starts; the run has `recorded` samples from before."""

    def after_flush(self) -> None:
        """This rank has written rows."""

    def at_end(self) -> None:
        """All ranks have written their last rows."""


@dataclass
class _Step:
    """One training step's forward: what its batch says, and what is recorded of it."""

    sigma_B: torch.Tensor
    mask_BS: torch.Tensor | None
    facts: Mapping[str, Sequence[Any]]
    loss_B: torch.Tensor
    distances: Mapping[tuple[str, str], torch.Tensor]


class Session:
    """The state of one probe-only run in one process.

    options: as the user gave them. changed: what was switched off in them, one line per reason. training: what they
    would train (own.py), {} if that is not known; own_parameters: counts it, once and for the run. assistant: the
    strength of SimpleTuner's assistant LoRA, None without one. goal: how much is to be recorded. stop: what signals ask
    for.
    adapter: the file that goes onto the base, None for the base alone; adapter_settings: what decides its effect, and
    base: the module table and the fingerprint of the model without it, both set when it is loaded. fixed_noise: what
    the noise seed fixes, None without one. idle_parameter: the one parameter that the optimizer gets.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        options: Mapping[str, Any],
        watchers: Sequence[Watcher] = (),
        own_parameters: OwnParameters = lambda training, model: None,
    ) -> None:
        self.settings = settings
        self.options = dict(options)
        self.changed: list[str] = []
        self.training: dict[str, Any] = {}
        self._own_parameters = own_parameters
        self.assistant: float | None = None
        self.adapter = AdapterFile.read(settings.adapter) if settings.adapter else None
        self.adapter_settings: dict[str, object] = {}
        self.base: tuple[tuple[ModuleRow, ...], str] | None = None
        self.idle_parameter: nn.Parameter
        self.family: Family
        self.stop = Stop()
        self.recorder: Recorder | None = None
        before = self._before()
        self.goal = Goal(settings.samples, before.samples, before.counted) if before else Goal(settings.samples, 0)
        self._watchers = watchers if self.goal.rank == 0 else ()
        files = before.files if before else ()
        self._number = sum(file.samples for file in files if file.rank == self.goal.rank)
        self._seen = Counter(before.facts["image"].tolist() if before else ())
        seed = settings.noise_seed
        self.fixed_noise = None if seed is None else FixedNoise(seed, settings.sigmas == "stratified", self._seen)
        self._ablated = _ablated(before)
        if before and not self.goal.nothing_to_do:
            with self._alone():  # refused here, before the model is loaded, and not only when recording starts
                pass
        self._observer: Observer
        self._ablation: StepAblation | None = None
        self._spread: Spread
        self._drawn: NDArray[np.float64] | None = None
        self._armed = self._forwards_checked = False
        self._step: _Step | None = None
        self._started = time.monotonic()
        self.last_line = LastLine(settings.directory, self.goal.rank)

    def _before(self) -> RunData | None:
        """What the run folder has already."""
        directory = self.settings.directory
        return load_run(directory) if (Path(directory) / MANIFEST_NAME).exists() else None

    def _alone(self) -> AbstractContextManager[bool]:
        """Nobody else records this rank of this run meanwhile. Raises RunError if another process does."""
        directory, rank = Path(self.settings.directory), self.goal.rank
        return locked(
            directory / f"rank-{rank:04d}.lock",
            f"another process is recording rank {rank} of the run {directory} already; wait for it, or choose "
            f"another layerprobe_dir",
        )

    # When it ends.

    @property
    def wants_to_stop(self) -> bool:
        return self.goal.finished or self._asked

    @property
    def _asked(self) -> bool:
        return self.stop.requested or any(watcher.wants_stop for watcher in self._watchers)

    def agree(self, reached_epoch_end: bool) -> tuple[bool, bool]:
        """What the ranks decide together at each step: (the epoch is over, the run stops)."""
        return self.goal.agree(reached_epoch_end, self._asked, lambda: self.idle_parameter.device)

    def last_step(self, global_step: int, max_train_steps: int) -> int:
        """The number of steps after which SimpleTuner's loop ends by itself, asked in the middle of each step."""
        if self.goal.ranks == 1 and self.wants_to_stop:
            return global_step
        if self.goal.samples:
            return max(max_train_steps, global_step + 2)
        return max_train_steps

    @property
    def progress(self) -> dict[str, str]:
        """What the progress bar says: the samples so far, of all ranks, and what the watchers know."""
        goal = self.goal
        samples = goal.recorded + goal.kept * goal.ranks
        told = {"samples": f"{min(samples, goal.samples)}/{goal.samples}" if goal.samples else str(samples)}
        for watcher in self._watchers:
            told |= watcher.told
        return told

    # Recording.

    @contextmanager
    def recording(
        self,
        denoiser: nn.Module,
        flavour: str,
        settings: Mapping[str, object],
        versions: Mapping[str, str],
        to_come: float,
    ) -> Iterator[None]:
        """Hook the denoiser, open the run folder, keep the rows safe until the end, whatever ends it.

        to_come: how many samples this rank will see at most. Raises RunError if the folder holds a run with other
        settings or of another model.
        """
        residual, pairs = self.settings.residual, self.settings.block_pairs
        with Observer(denoiser, self.family, residual, pairs) as self._observer, self.stop.on_signals():
            self._prepare_ablation(min(to_come, self.goal.quota))
            manifest = create_run(self.settings.directory, self._manifest(flavour, settings, versions))
            with self._alone():
                if self.goal.rank == 0:
                    self._keep_options(manifest)
                check = NoiseCheck(RULES[self.family.noise], self.family.name)
                self.recorder = recorder = Recorder(
                    self.settings.directory, manifest, self.goal.rank, check, self._seen, self.stop
                )
                self._started = time.monotonic()
                for watcher in self._watchers:
                    watcher.begins(self.goal.recorded)
                try:
                    yield
                except BaseException as error:
                    self.last_line.ended_by(error)
                    raise
                finally:
                    self.recorder = None
                    recorder.close()

    def _prepare_ablation(self, to_come: float) -> None:
        """Which of the next samples of this rank, `to_come` at most, have blocks left out."""
        if self.settings.ablation == "none":
            return
        self._ablation = StepAblation(self._observer, self.settings.ablation, self.idle_parameter.device)
        left = max(0, self.settings.ablation_samples - self._ablated)
        own = left // self.goal.ranks + (self.goal.rank < left % self.goal.ranks)
        self._spread = Spread(own, to_come, seed=self.goal.rank)

    def _manifest(self, flavour: str, settings: Mapping[str, object], versions: Mapping[str, str]) -> Manifest:
        family, denoiser = self.family, self._observer.denoiser
        own: dict[str, object] = {"sigmas": self.settings.sigma_text, "text": family.text, "noise": family.noise}
        if self.fixed_noise is not None:
            own["noise_seed"] = self.fixed_noise.seed
        modules, base = self.base or (module_table(denoiser), fingerprint(denoiser))
        return Manifest(
            schema=SCHEMA,
            run_id=new_run_id(),
            family=family.name,
            flavour=flavour,
            model_class=type(denoiser).__name__,
            streams=tuple(Stream(name, blocks) for name, blocks in self._observer.streams.items()),
            targets=tuple(Target(target.blocks, target.at_factor, target.at_double) for target in family.targets),
            readings=(*TOKENS, *self._observer.extra, *(self._ablation.readings if self._ablation else ())),
            modules=tuple(Module(*row) for row in modules),
            versions=dict(versions),
            settings={**own, "noise_check": how_checked(family.name), **self.adapter_settings, **settings},
            fingerprint=base,
            created=utc_now(),
            source="probe",
        )

    def _keep_options(self, manifest: Manifest) -> None:
        """Put the user's SimpleTuner options beside the manifest, for the follow-up's config, and what they train."""
        if self.training and not (Path(self.settings.directory) / TRAINING_NAME).exists():
            # What cannot be counted ends no run; a command that needs the number says why.
            with random_numbers_kept(), suppress(Exception):
                self.training |= {"parameters": self._own_parameters(self.training, manifest)}
        for name, kept in ((CONFIG_NAME, self.options), (TRAINING_NAME, self.training)):
            path = Path(self.settings.directory) / name
            if kept and not path.exists():
                data = json.dumps(kept, indent=4).encode() + b"\n"
                write_new_file(path, partial(_write, data))

    def arm(self) -> None:
        """The next forward is the one of a training step."""
        self._armed, self._step = True, None

    def forward(self, model: Any, batch: dict[str, Any], predict: Predict) -> Any:
        """What `predict`, a forward of SimpleTuner's `model`, gives for a prepared batch: observed if armed."""
        if self.recorder is None or not self._armed:
            return predict(batch)
        self._armed = False
        # All of it before the forward: some families change the batch in theirs.
        sigma_B = sigma_of(RULES[self.family.noise], model, batch)
        count = len(sigma_B)
        mask_BS, facts = text_mask(batch, count), sample_facts(batch, count)
        self.recorder.check.add(model, batch, sigma_B)
        self._observer.begin(batch, mask_BS)
        with self._checked_draws():
            if self._ablation is not None and self._spread.choose(self._drawn_for(count), facts["image"]):
                output, loss_B, distances = self._ablation.run(model, batch, predict, self._observer.finish)
            else:
                output, distances = predict(batch), self._observer.finish()
                made = predictions(self.family.target, model, batch, output)
                loss_B = sample_losses(made) if made else torch.full_like(sigma_B, math.nan)
        self._step = _Step(sigma_B, mask_BS, facts, loss_B, distances)
        return output

    def commit(self) -> None:
        """Keep the rows of the armed step. Raises SeamError if it ran no forward, or one with other samples."""
        step, recorder = self._step, self.recorder
        if step is None or recorder is None:
            raise SeamError("the training step ran no forward of the model; there is nothing to record")
        count = len(step.sigma_B)
        sizes = {len(value) for value in (step.loss_B, *step.distances.values())}
        if sizes != {count}:
            raise SeamError(f"the model's forward gave {sorted(sizes)} rows for a batch of {count} samples")
        unknown_B = torch.full((count,), UNKNOWN["text_tokens"], dtype=torch.int32, device=step.sigma_B.device)
        tokens_B = unknown_B if step.mask_BS is None else step.mask_BS.sum(dim=1)
        kept = self.goal.keep(count)
        recorder.keep(step.distances, step.sigma_B, step.loss_B, tokens_B, step.facts, kept)
        self._number += kept
        self._step = None
        if time.monotonic() - recorder.flushed >= self.settings.flush_seconds:
            recorder.flush()
            for watcher in self._watchers:
                watcher.after_flush()

    def draw_sigmas(self, count: int, seed: int) -> NDArray[np.float64]:
        """The sigmas of the next `count` samples of this rank, (count,) in [0, 1): the same until these are kept."""
        if self.fixed_noise is not None:
            self._drawn = self.fixed_noise.sigmas(count)
            return self._drawn
        draw = uniform_sigmas if self.settings.sigmas == "uniform" else stratified_sigmas
        self._drawn = draw(range(self._number, self._number + count), seed=seed, rank=self.goal.rank)
        return self._drawn

    def _checked_draws(self) -> AbstractContextManager[object]:
        """With a noise seed, the first forward must draw nothing. Later ones are taken for its like, at no cost."""
        first, self._forwards_checked = not self._forwards_checked, True
        return NoDraws(self.family.name) if self.fixed_noise is not None and first else nullcontext()

    def _drawn_for(self, count: int) -> list[float] | None:
        """The sigmas of the batch if the probe drew them: what the host knows of them without asking the device."""
        return self._drawn.tolist() if self._drawn is not None and len(self._drawn) == count else None

    def end(self, wait_for_everyone: Callable[[], None]) -> None:
        """After the loop, on every rank: write the last rows, let the watchers look, count for the last line."""
        assert self.recorder is not None
        self.recorder.flush()
        wait_for_everyone()
        for watcher in self._watchers:
            watcher.at_end()
        if self.recorder.nonfinite:
            print(
                f"\nlayerprobe: warning: {self.recorder.nonfinite} of the {self.goal.kept} samples of rank "
                f"{self.goal.rank} have distances that are not finite (NaN or infinite states): counted by layerprobe "
                "status, left out of every mean",
                flush=True,
            )
        run = load_run(self.settings.directory)
        self.last_line.recorded(run.samples - self.goal.recorded, run.counted, time.monotonic() - self._started)

    def start_text(self, device: str) -> str:
        """What the user is told at the start."""
        observer = self._observer
        forwards = self._ablation.forwards if self._ablation else 0
        return start_text(self.settings, self.goal, observer.streams, observer.extra, self.changed, device, forwards)


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _ablated(run: RunData | None) -> int:
    """How many samples of a run have blocks left out."""
    ablations = [key for key in run.manifest.columns() if parse_reading(key[1]).ablation] if run else []
    return int((~np.isnan(run.distances(*ablations[0]))).any(axis=1).sum()) if run and ablations else 0
