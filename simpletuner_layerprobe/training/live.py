"""What the user's trackers see of a probe-only run: how far it is, and its heatmaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES
from simpletuner_layerprobe.analyse.running import RunningTally
from simpletuner_layerprobe.analyse.settled import Stability

EVERY_SECONDS = 60.0
"""At least so long between two updates."""
COST = 0.01
"""Updates may take at most this part of the time, from the second one on."""
GROWTH = 1.5
"""The samples must have grown by so much since the last images before the next ones."""

# What a tracker of this name needs besides (N, H, W, 3) uint8 images.
IMAGE_OPTIONS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}}


class Live:
    """Logs to accelerate's trackers. The first one that fails is named once, then nothing is logged any more.

    trackers: gives those that the run has, none on ranks that log nothing; without any, nothing is read or drawn.
    step: gives the training step that the values belong to. tally: the run's sums. recorded: samples of the run before
    this start. stability: what judges the factors, None if nobody does.
    """

    def __init__(
        self,
        trackers: Callable[[], Sequence[Any]],
        step: Callable[[], int],
        tally: RunningTally,
        recorded: int,
        stability: Stability | None,
    ) -> None:
        self._trackers = trackers
        self._step = step
        self._tally = tally
        self._stability = stability
        self._samples = recorded
        self._since = time.monotonic()
        self._next_time = self._since + EVERY_SECONDS
        self._next_images = 0.0
        self._failed = False

    def update(self, *, last: bool = False) -> None:
        """Log, if it is time again or the run ends. Called after a flush; it reads files, never the device."""
        started = time.monotonic()
        if self._failed or (started < self._next_time and not last) or not self._trackers():
            return
        try:
            self._log(started, last)
        except Exception as error:
            # Trackers are other people's software and talk to disks and networks: whatever they raise, recording goes
            # on.
            self._failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"\nlayerprobe: warning: nothing more is logged to the trackers: {text}", flush=True)
        ended = time.monotonic()
        self._next_time = ended + max(EVERY_SECONDS, (ended - started) / COST)

    def _log(self, now: float, last: bool) -> None:
        tally = self._tally.read()
        means = tally.means()
        enough = [(count_T >= MIN_SAMPLES).mean() for _, count_T in means.values()]
        values = {
            "layerprobe/samples": float(tally.samples),
            "layerprobe/sigma_coverage": float(min(enough)),
        }
        if now > self._since and tally.samples > self._samples:
            values["layerprobe/samples_per_second"] = (tally.samples - self._samples) / (now - self._since)
        if self._stability is not None:
            values["layerprobe/settled"] = self._stability.settled_share
        images = {}
        if tally.samples and (last or tally.samples >= self._next_images):
            from simpletuner_layerprobe.show.live_image import live_image

            for stream, (mean_TL, count_T) in means.items():
                title = f"{stream} stream, {tally.tokens} token, {tally.samples} samples"
                images[f"layerprobe/heatmap_{stream}"] = live_image(title, mean_TL, count_T)[None]
            self._next_images = GROWTH * tally.samples
        self._samples, self._since = tally.samples, now
        for tracker in self._trackers():
            tracker.log(values, step=self._step())
            # A tracker for numbers only, such as SimpleTuner's own, has no such method.
            log_images = getattr(tracker, "log_images", None)
            if images and log_images is not None:
                log_images(images, step=self._step(), **IMAGE_OPTIONS.get(tracker.name, {}))
