"""Time limits that hold: a clock with a watchdog, progress by time, and a host that does not run ahead of the GPU."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CLOSING_SECONDS = 30  # before the deadline: for the last evaluation, the last save and the samples


class Clock:
    """Seconds since the start, the log, and the watchdog that ends the process at the deadline."""

    def __init__(self, start: float, deadline: float, log_file: Path):
        self.start, self.deadline = start, deadline
        self.log_file = log_file.open("w", buffering=1)
        watchdog = threading.Timer(self.left(), self._end)
        watchdog.daemon = True
        watchdog.start()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.deadline - self.seconds()

    def closing(self) -> bool:
        return self.left() < CLOSING_SECONDS

    def log(self, *words: object) -> None:
        line = f"[{self.seconds():6.1f}] " + " ".join(map(str, words))
        print(line, flush=True)
        self.log_file.write(line + "\n")

    def _end(self) -> None:
        self.log("deadline: ended by the watchdog; what was saved last counts")
        os._exit(3)


class Progress:
    """How far a training is, from 0 to 1: by time, or by steps if their number is given."""

    def __init__(self, clock: Clock, seconds: float, steps: int):
        self.clock, self.steps, self.step = clock, steps, 0
        self.begin = self.next_report = clock.seconds()
        self.end = min(self.begin + seconds, clock.deadline - CLOSING_SECONDS)

    def fraction(self) -> float:
        if self.clock.closing():
            return 1.0
        if self.steps:
            return min(1.0, self.step / self.steps)
        return min(1.0, self.seconds() / max(1e-9, self.end - self.begin))

    def seconds(self) -> float:
        return self.clock.seconds() - self.begin

    def report_due(self, every: float = 10.0) -> bool:
        due = self.clock.seconds() >= self.next_report
        if due:
            self.next_report = self.clock.seconds() + every
        return due


class Pace:
    """Keeps the host at most `ahead` steps before the GPU without emptying its queue."""

    def __init__(self, device: torch.device, ahead: int = 8):
        self.on, self.ahead = device.type == "cuda", ahead
        self.events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        if self.on:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > self.ahead:
                self.events.popleft().synchronize()


class TooSlow(Exception):
    """Something took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the main thread once the time is over."""

    def stop(*_: object) -> None:
        raise TooSlow(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
