"""The user's trackers, and when to look at a run that is being recorded: what the watchers stand on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

COST = 0.01
"""Looking may take at most this part of the time, from the second look on."""

# What a tracker of this name needs besides (N, H, W, 3) uint8 images.
IMAGE_OPTIONS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}}


class Pace:
    """When to look again: not before `every_seconds`, and seldom enough that looks take COST of the time."""

    def __init__(self, every_seconds: float = 0.0) -> None:
        self._every_seconds = every_seconds
        self._next_time = time.monotonic() + every_seconds

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next_time

    @contextmanager
    def look(self) -> Iterator[None]:
        """Around a look, whose time counts."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next_time = ended + max(self._every_seconds, (ended - started) / COST)


class Live:
    """Logs to accelerate's trackers. The first one that fails is named once, then nothing is logged any more.

    trackers: gives those that the run has, none on ranks that log nothing. step: gives the training step that the
    values belong to.
    """

    def __init__(self, trackers: Callable[[], Sequence[Any]], step: Callable[[], int]) -> None:
        self._trackers = trackers
        self._step = step
        self._failed = False

    @property
    def wanted(self) -> bool:
        """Whether somebody would see what is logged."""
        return not self._failed and bool(self._trackers())

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Around making and logging: trackers are other people's software and talk to disks and networks.

        Whatever they raise, recording goes on.
        """
        try:
            yield
        except Exception as error:
            self._failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"\nlayerprobe: warning: nothing more is logged to the trackers: {text}", flush=True)

    def log(self, values: Mapping[str, float], images: Mapping[str, Any]) -> None:
        """values: name -> number. images: name -> (N, H, W, 3) uint8."""
        for tracker in self._trackers():
            tracker.log(dict(values), step=self._step())
            # A tracker for numbers only, such as SimpleTuner's own, has no such method.
            log_images = getattr(tracker, "log_images", None)
            if images and log_images is not None:
                log_images(dict(images), step=self._step(), **IMAGE_OPTIONS.get(tracker.name, {}))
