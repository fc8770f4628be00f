"""One probe-only run inside the training process: from the observer's distances to the run folder."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Decide
from simpletuner_layerprobe.analyse.running import RunningTally
from simpletuner_layerprobe.analyse.settled import BINS, Stability
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import preset_parameters
from simpletuner_layerprobe.lokr.decision import of_preset
from simpletuner_layerprobe.probe.families import Family
from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.probe.observer import READINGS, Observer
from simpletuner_layerprobe.probe.rows import Facts, RowBuffer
from simpletuner_layerprobe.run.lock import locked
from simpletuner_layerprobe.run.manifest import (
    EXTRA_SCHEMA,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    Stream,
    utc_now,
    write_new_file,
)
from simpletuner_layerprobe.run.records import SHARDS_NAME, Rows, ShardWriter, create_run, open_run, stream_sizes
from simpletuner_layerprobe.training.live import Live
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas
from simpletuner_layerprobe.training.signals import last_line

CONFIG_NAME = "config.json"


class Session:
    """The state of one probe-only run in one process.

    recorded: samples that the run folder had before this start. changed: what was switched off in the user's
    config, one line per reason. idle_parameter: the one parameter that the optimizer gets.
    """

    def __init__(self, settings: ProbeSettings, options: Mapping[str, Any]) -> None:
        self.settings = settings
        self.family: Family
        self.options = dict(options)
        self.changed: list[str] = []
        self.idle_parameter: torch.nn.Parameter
        self.rank = int(os.environ.get("RANK", "0"))
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.recorded = self._count_recorded()
        if self.recorded and not self.nothing_to_do:
            with self._alone():  # refused here, before the model is loaded, and not only when recording starts
                pass
        self.observer: Observer | None = None
        self._writer: ShardWriter
        self._buffer: RowBuffer
        self._kept = 0
        self._nonfinite = 0
        self._drawn = 0
        self._stop_requested = False
        self._unwritten: list[Rows] = []
        self._whole = False
        self._interrupted = False
        self._tally = RunningTally(settings.directory, bins=BINS)
        self._stability = (
            Stability(settings.directory, settings.stop_when_stable, self._decide_of, self._tally)
            if self._judges
            else None
        )
        self._live: Live | None = None
        self._settled = False
        self._ended_by = ""
        self._armed: tuple[Mapping[str, Any], torch.Tensor, torch.Tensor | None, Facts] | None = None
        self._distances: dict[tuple[str, str], torch.Tensor] | None = None
        self._started = time.monotonic()
        self._flushed = self._started
        self._summary = ""

    def _count_recorded(self) -> int:
        if not (Path(self.settings.directory) / MANIFEST_NAME).exists():
            return 0
        return open_run(self.settings.directory).sample_count()

    def _alone(self) -> AbstractContextManager[bool]:
        """Nobody else records this rank of this run meanwhile. Raises ProbeError if another process does."""
        directory = Path(self.settings.directory)
        return locked(
            directory / SHARDS_NAME / f"rank{self.rank:05d}.lock",
            f"another process is recording rank {self.rank} of the run {directory} already; wait for it, or choose "
            f"another layerprobe_dir",
        )

    # What this rank still has to record.

    @property
    def quota(self) -> float:
        """How many samples this rank keeps in this start; infinite if the epochs or max_train_steps decide."""
        if not self.settings.samples:
            return float("inf")
        left = max(0, self.settings.samples - self.recorded)
        return left // self.ranks + (self.rank < left % self.ranks)

    @property
    def nothing_to_do(self) -> bool:
        return bool(self.settings.samples) and self.recorded >= self.settings.samples

    @property
    def finished(self) -> bool:
        return self._kept >= self.quota

    @property
    def _judges(self) -> bool:
        """Whether this rank looks at the run folder now and then, to end the run when all factors are settled."""
        return self.rank == 0 and self.settings.stop_when_stable > 0

    def _decide_of(self, manifest: Manifest) -> Callable[[Bootstrap], Decide]:
        return of_preset(manifest, preset_parameters(self.settings.preset))

    def wants_to_stop(self) -> bool:
        return self.finished or self._stop_requested or self._settled

    def agree(self, reached_epoch_end: bool) -> tuple[bool, bool]:
        """What the ranks decide together: (the epoch is over, the run stops). All of them ask at the same step.

        The run stops when one was told to, or when all have their samples: uneven batches may let one finish first.
        """
        epoch_end, asked, unfinished = reached_epoch_end, self._stop_requested or self._settled, not self.finished
        if self.ranks > 1:
            device = self.idle_parameter.device
            flags = torch.tensor([epoch_end, asked, unfinished], dtype=torch.int32, device=device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            epoch_end, asked, unfinished = (bool(flag) for flag in flags.tolist())
        return epoch_end, asked or not unfinished

    def last_step(self, global_step: int, max_train_steps: int) -> int:
        """The number of steps after which SimpleTuner's loop ends by itself, asked in the middle of each step."""
        if self.ranks == 1 and self.wants_to_stop():
            return global_step
        if self.settings.samples:
            return max(max_train_steps, global_step + 2)
        return max_train_steps

    # Recording.

    @contextmanager
    def recording(
        self,
        denoiser: nn.Module,
        flavour: str,
        run_settings: Mapping[str, object],
        versions: Mapping[str, str],
    ) -> Iterator[None]:
        """Hook the denoiser, open the run folder, keep the rows safe until the end, whatever ends it.

        Raises ProbeError if the folder holds a run with other settings or of another model.
        """
        with (
            Observer(denoiser, self.family, self.settings.residual, self.settings.block_pairs) as observer,
            self._stop_on_signals(),
        ):
            manifest = Manifest(
                schema=EXTRA_SCHEMA if observer.extra else SCHEMA_VERSION,
                family=self.family.name,
                flavour=flavour,
                model_class=type(denoiser).__name__,
                streams=tuple(Stream(name, blocks) for name, blocks in observer.streams.items()),
                tokens=READINGS,
                modules=module_table(denoiser),
                versions=dict(versions),
                settings={"sigmas": self.settings.sigmas, **run_settings},
                fingerprint=fingerprint(denoiser),
                created=utc_now(),
                source="probe",
                extra=observer.extra,
            )
            create_run(self.settings.directory, manifest)
            with self._alone() as alone:
                if self.rank == 0:
                    self._keep_options()
                self._writer = ShardWriter(self.settings.directory, manifest, self.rank, alone=alone)
                self._buffer = RowBuffer(stream_sizes(manifest))
                self.observer = observer
                self._started = self._flushed = time.monotonic()
                try:
                    yield
                except BaseException as error:
                    self._ended_by = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by an error"
                    raise
                finally:
                    self.observer = None
                    self._flush_at_the_end()

    def _keep_options(self) -> None:
        """Put the user's SimpleTuner options beside the manifest, for the follow-up's config."""
        path = Path(self.settings.directory) / CONFIG_NAME
        if not path.exists():
            data = json.dumps(self.options, indent=4).encode()
            write_new_file(path, lambda file: file.write(data + b"\n"))

    def arm(
        self, batch: Mapping[str, Any], sigma_B: torch.Tensor, text_mask_BS: torch.Tensor | None, facts: Facts
    ) -> None:
        """The next forward is the one of a training step on `batch`, with these sigmas and facts."""
        self._armed = (batch, sigma_B, text_mask_BS, facts)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the model: observed if armed, else let through."""
        if self.observer is None or self._armed is None or self._distances is not None:
            yield
            return
        self.observer.begin(self._armed[0], self._armed[2])
        yield
        self._distances = self.observer.finish()

    def commit(self, loss: torch.Tensor, text_tokens: int) -> None:
        """Keep the rows of the armed step. text_tokens: length of the text, for batches without a mask.

        Raises ProbeError if the step ran no forward.
        """
        assert self._armed is not None
        if self._distances is None:
            raise ProbeError("the training step ran no forward of the model; there is nothing to record")
        _, sigma_B, mask_BS, facts = self._armed
        count = len(sigma_B)
        sizes = {len(value) for value in self._distances.values()}
        if sizes != {count}:
            raise ProbeError(f"the model's forward gave {sorted(sizes)} rows for a batch of {count} samples")
        tokens_B = torch.full((count,), text_tokens, device=sigma_B.device) if mask_BS is None else mask_BS.sum(dim=1)
        keep = int(min(count, self.quota - self._kept))
        with self._not_interrupted():
            self._buffer.append(self._distances, sigma_B, tokens_B, loss, facts, keep)
        self._kept += keep
        self._armed = None
        self._distances = None
        if time.monotonic() - self._flushed >= self.settings.flush_seconds:
            self.flush()
            self._judge()
            self.show()

    def flush(self) -> None:
        """Write the rows since the last flush as one shard. Rows that the disk refuses are kept for another try."""
        self._flushed = time.monotonic()
        with self._not_interrupted():
            rows = self._buffer.take()
            if rows is not None:
                self._unwritten.append(rows)
                self._nonfinite += rows.nonfinite()
            while self._unwritten:
                self._writer.write(self._unwritten[0])
                self._unwritten.pop(0)

    def _flush_at_the_end(self) -> None:
        try:
            self.flush()
        except ProbeError as error:
            lost = sum(map(len, self._unwritten))
            raise ProbeError(
                f"{error}; the {lost} samples since the last flush are lost, all before them are kept: "
                "make room or set another layerprobe_dir, then start the same command again"
            ) from None

    @contextmanager
    def _not_interrupted(self) -> Iterator[None]:
        """A second Ctrl-C in here takes effect at the end: no row is kept by halves or written twice."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def _judge(self) -> None:
        """Ask the run to end, as a signal does, when all factors are settled. A run that cannot be judged goes on."""
        if self._stability is None or self._settled:
            return
        try:
            self._settled = self._stability.settled()
        except ProbeError as error:
            print(f"layerprobe: warning: layerprobe_stop_when_stable has no effect any more: {error}", flush=True)
            self._stability = None
            return
        if self._settled:
            print(
                f"\nlayerprobe: at least {self.settings.stop_when_stable:.1%} of the bootstrap replicates of "
                f"{self._stability.samples} samples agree with every factor: stopping after this step",
                flush=True,
            )

    def show_in(self, trackers: Callable[[], Sequence[Any]], step: Callable[[], int]) -> None:
        """Log to the trackers of the main process from now on: see `record.live`."""
        if self.rank == 0:
            self._live = Live(trackers, step, self._tally, self.recorded, self._stability)

    def show(self, *, last: bool = False) -> None:
        """Let the trackers see how far the run is, if it is time. last: the run is over."""
        if self._live is not None:
            self._live.update(last=last)

    def draw_sigmas(self, count: int, seed: int) -> np.ndarray:
        """The sigmas of the next `count` samples of this rank, (count,) float64 in [0, 1)."""
        first = self._drawn
        self._drawn += count
        if self.settings.sigmas == "uniform":
            return uniform_sigmas(count, seed=seed, rank=self.rank, first=self.recorded + first)
        sample_N = self.recorded + self.rank + self.ranks * np.arange(first, first + count)
        return stratified_sigmas(sample_N, seed=seed)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop_requested:
                if self._whole:
                    self._interrupted = True
                    return
                raise KeyboardInterrupt
            self._stop_requested = True
            print("\nlayerprobe: stopping after this step; once more to stop at once", flush=True)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def interrupt_on_terminate(self) -> None:
        """Before the loop there is nothing to finish: SIGTERM ends the process as Ctrl-C does."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    # What the user sees.

    def start_text(self, device: str) -> str:
        """The summary at the start: what the probe records and what it switched off."""
        assert self.observer is not None
        blocks = ", ".join(f"{len(paths)} {stream}" for stream, paths in self.observer.streams.items())
        lines = [
            f"layerprobe: probe-only run, nothing is trained. Blocks: {blocks}. Sigmas: {self.settings.sigmas}. "
            f"Samples: {self.settings.samples or 'as max_train_steps or the epochs give'}. Device: {device}.",
            f"layerprobe: run folder {self.settings.directory}"
            + (f", goes on after {self.recorded} samples" if self.recorded else ""),
        ]
        if self.observer.extra:
            lines.append(f"layerprobe: further readings: {', '.join(self.observer.extra)}")
        if self.settings.stop_when_stable:
            lines.append(
                f"layerprobe: ends by itself when every factor of the preset {self.settings.preset} is agreed by "
                f"{self.settings.stop_when_stable:.1%} of the bootstrap replicates"
            )
        lines += [f"layerprobe: switched off or overridden - {line}" for line in self.changed]
        return "\n".join(lines)

    def finish(self) -> None:
        """After the loop, on every rank: count what the run has now, for the last line."""
        directory = self.settings.directory
        if self._nonfinite:
            print(
                f"\nlayerprobe: warning: {self._nonfinite} of the {self._kept} samples of rank {self.rank} have "
                "distances that are not finite (NaN or infinite states): counted by layerprobe status, left out of "
                "every mean",
                flush=True,
            )
        total = open_run(directory).sample_count()
        new = total - self.recorded
        seconds = time.monotonic() - self._started
        figures = os.path.join(directory, "figures")
        self._summary = (
            f"layerprobe: {new} samples in {seconds:.1f} s ({new / seconds:.2f} samples/s), "
            f"{total} in the run {directory}; next: layerprobe heatmap {directory} --out {figures}"
        )

    def finish_early(self) -> None:
        directory = self.settings.directory
        self._summary = (
            f"layerprobe: the run {directory} has its {self.recorded} samples already, nothing to do; "
            f"raise layerprobe_samples ({self.settings.samples}) for more"
        )

    def print_summary(self) -> None:
        """The last line, once, on the main process."""
        if self._ended_by:
            self._summary = f"layerprobe: {self._ended_by}; what was written is kept in {self.settings.directory}"
        if self._summary and self.rank == 0:
            last_line(self._summary)
        self._summary = ""
        self._ended_by = ""
