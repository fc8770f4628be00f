"""From a step's distances to the run folder: the rows of one rank, kept on the device until they are flushed.

Shape letters: B samples of the batch, C columns of one reading.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from simpletuner_layerprobe.errors import RunError, SeamError
from simpletuner_layerprobe.probe.rows import RowBuffer
from simpletuner_layerprobe.readings import parse_reading
from simpletuner_layerprobe.run.manifest import Manifest
from simpletuner_layerprobe.run.records import RecordWriter, Rows
from simpletuner_layerprobe.training.noise_check import NoiseCheck
from simpletuner_layerprobe.training.stop import Stop

SIGMA_ROUNDING = 2.0**-20
"""By so much float32 arithmetic may put a sigma outside [0, 1]; it is recorded as 0 or 1 then."""


class Recorder:
    """Keeps rows and writes them, for one rank in one start.

    seen: how often each image came before in this run; it counts on. nonfinite: how many of the rows written so far
    have angles that are not finite. flushed: when the last flush was, by time.monotonic().
    """

    def __init__(
        self, directory: str, manifest: Manifest, rank: int, check: NoiseCheck, seen: Counter[int], stop: Stop
    ) -> None:
        self.check = check
        self.nonfinite = 0
        self.flushed = time.monotonic()
        self._writer = RecordWriter(directory, manifest, rank)
        self._buffer = RowBuffer({key: len(blocks) for key, blocks in manifest.columns().items()})
        readings = {key: parse_reading(key[1]) for key in manifest.columns()}
        self._angles = [key for key, reading in readings.items() if reading.complete and not reading.ablation]
        self._noise = str(manifest.settings.get("noise", ""))
        self._unwritten: list[tuple[Rows, dict[str, str]]] = []
        self._seen = seen
        self._stop = stop
        self._first = True

    def keep(
        self,
        distances: Mapping[tuple[str, str], torch.Tensor],
        sigma_B: torch.Tensor,
        loss_B: torch.Tensor,
        text_tokens_B: torch.Tensor,
        facts: Mapping[str, Sequence[Any]],
        count: int,
    ) -> None:
        """Keep the first `count` samples of a batch: distances (B, C) each, none of a reading that was not taken.

        Nothing waits for the device.
        """
        with self._stop.not_now():
            facts = {**facts, "repeat": self._repeats(facts["image"], count)}
            self._buffer.append(distances, sigma_B, loss_B, text_tokens_B, facts, count)
        if self._first:
            self._first = False
            self.check.require()  # once: a run that would be wrong ends after its first step

    def _repeats(self, images: Sequence[int], count: int) -> list[int]:
        """How often each image came before, -1 for those that are not known; the first `count` count from now on."""
        repeats = []
        for number, image in enumerate(images):
            repeats.append(self._seen[image] if image else -1)
            self._seen[image] += number < count
        return repeats

    def flush(self) -> None:
        """Write the rows since the last flush as one batch. Rows that the disk refuses are kept for another try.

        Raises SeamError, and writes none of them, if their sigmas are not those of their noise.
        """
        self.flushed = time.monotonic()
        with self._stop.not_now():
            taken = self._buffer.take()
            try:
                difference = self.check.require()
            finally:
                self.check.forget()
            if taken is not None:
                rows = self._rows(taken)
                self._unwritten.append((rows, {} if difference is None else {"noise_difference": f"{difference:.6f}"}))
                self.nonfinite += self._not_finite(rows)
            while self._unwritten:
                self._writer.write(*self._unwritten[0])
                self._unwritten.pop(0)

    def close(self) -> None:
        """Flush and close. Raises RunError saying how many rows are lost if the disk refuses them."""
        try:
            self.flush()
        except RunError as error:
            lost = sum(len(rows) for rows, _ in self._unwritten)
            raise RunError(
                f"{error}; the {lost} samples since the last flush are lost, all before them are kept: "
                "make room or set another layerprobe_dir, then start the same command again"
            ) from None
        finally:
            self._writer.close()

    def _rows(self, taken: Mapping[str, Any]) -> Rows:
        sigma_N = taken["sigma"]
        outside_N = ~((sigma_N >= -SIGMA_ROUNDING) & (sigma_N <= 1 + SIGMA_ROUNDING))
        if outside_N.any():
            raise SeamError(
                f"a batch has sigma {sigma_N[outside_N][0]:.4g} by the rule {self._noise!r}, expected 0 to 1; this "
                f"SimpleTuner prepares its noise in another way than the layer probe knows"
            )
        return Rows(np.clip(sigma_N, 0, 1), taken["loss"], taken["facts"], taken["distances"])

    def _not_finite(self, rows: Rows) -> int:
        finite_N = np.ones(len(rows), dtype=bool)
        for key in self._angles:
            finite_N &= np.isfinite(rows.distances[key]).all(axis=1)
        return int((~finite_N).sum())
