"""Ctrl-C and SIGTERM in the training process: the run ends after the current step, with its rows written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """What was asked for by signals.

    requested: whether the run shall end after the current step. A second Ctrl-C interrupts at once. A second SIGTERM
    changes nothing: a scheduler sends it to all processes, and a launcher hands its own on.
    """

    def __init__(self) -> None:
        self.requested = False
        self._pressed = False  # Ctrl-C
        self._whole = False
        self._interrupted = False

    def before_the_loop(self) -> None:
        """There is nothing to finish yet: SIGTERM ends the process as Ctrl-C does."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to both. In another thread than the main one, as in jobs of the WebUI, signals are not ours.

        After a stop a SIGTERM is ignored for good: what is left is to end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if self.requested:
                previous[signal.SIGTERM] = signal.SIG_IGN
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._pressed:
            if not self._whole:
                raise KeyboardInterrupt
            self._interrupted = True
            return
        self._pressed |= number == signal.SIGINT
        if not self.requested:
            self.requested = True
            print("\nlayerprobe: stopping after this step; Ctrl-C once more to stop at once", flush=True)

    @contextmanager
    def not_now(self) -> Iterator[None]:
        """A second Ctrl-C in here takes effect at the end: no row is kept by halves or written twice."""
        self._whole = True
        try:
            yield
        finally:
            self._whole = False
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt
