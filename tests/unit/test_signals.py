"""What `simpletuner train` and `accelerate launch` do with signals while a probe-only run ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner_layerprobe.training import signals


@pytest.fixture
def sent(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """The signals that were handed on; none leaves this process."""
    monkeypatch.setattr(signals._Launcher, "terminated", False)
    monkeypatch.setattr(signals._Launcher, "asked", 0)
    monkeypatch.delenv(signals.FOLDER_VARIABLE, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    received: list[tuple[int, int]] = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: received.append((pid, number)))
    yield received
    signal.signal(signal.SIGTERM, handler)


def deliver(number: int) -> None:
    handler: Any = signal.getsignal(number)
    handler(number, None)


def launcher(run: Callable[[Any], int]) -> SimpleNamespace:
    """SimpleTuner's command module: `run_training` ends its processes as the real one does."""
    module = SimpleNamespace(_terminate_process_group=lambda process: process.ended.append("by force"))

    def run_training() -> int:
        process = SimpleNamespace(ended=[], wait=lambda timeout: 0)
        try:
            return run(process)
        except KeyboardInterrupt:
            module._terminate_process_group(process)
            return 130

    module.run_training = run_training
    signals.install_cli(module)
    return module


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_training_process_gets_the_signal_of_the_launcher_and_ends_well(sent, number):
    def run(process: Any) -> int:
        signals.announce()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        deliver(signal.SIGTERM)
        raise AssertionError("a SIGTERM ends the waiting")

    assert launcher(run).run_training() == 0
    assert sent == [(os.getpid(), number)]


def test_a_second_sigterm_is_not_handed_on_and_a_second_ctrl_c_is(sent):
    def run(process: Any) -> int:
        signals.announce()

        def wait(timeout: float) -> int:
            deliver(signal.SIGTERM)  # while it waits for the end of the step
            return 0

        process.wait = wait
        raise KeyboardInterrupt

    module = launcher(run)
    assert module.run_training() == 0
    assert sent == [(os.getpid(), signal.SIGINT)]


def test_two_ctrl_c_reach_the_training_process_as_two(sent):
    def run(process: Any) -> int:
        signals.announce()
        waits = iter([KeyboardInterrupt, None])

        def wait(timeout: float) -> int:
            if (error := next(waits)) is not None:
                raise error
            return 0

        process.wait = wait
        try:
            raise KeyboardInterrupt
        finally:  # as SimpleTuner's own `finally` asks again
            with pytest.raises(KeyboardInterrupt):
                module._terminate_process_group(process)

    module = launcher(run)
    assert module.run_training() == 0
    assert sent == [(os.getpid(), signal.SIGINT)] * 2


def test_without_a_probe_only_run_a_sigterm_ends_the_launcher_as_always(sent):
    def run(process: Any) -> int:
        deliver(signal.SIGTERM)
        return 3

    assert launcher(run).run_training() == 3
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_training_process_that_does_not_end_is_ended(sent, capsys):
    def run(process: Any) -> int:
        signals.announce()
        process.wait = lambda timeout: (_ for _ in ()).throw(subprocess.TimeoutExpired("train", timeout))
        ended.append(process.ended)
        raise KeyboardInterrupt

    ended: list[list[str]] = []
    assert launcher(run).run_training() == 130
    assert ended == [["by force"]] and "did not stop; ending it" in capsys.readouterr().err


def test_accelerate_hands_sigterm_on_and_waits(sent, tmp_path, monkeypatch):
    monkeypatch.setenv(signals.FOLDER_VARIABLE, str(tmp_path))

    def simple_launcher() -> None:
        signals.announce()
        deliver(signal.SIGTERM)
        raise subprocess.CalledProcessError(7, "train")

    module = SimpleNamespace(simple_launcher=simple_launcher)
    signals.install_accelerate(module)
    with pytest.raises(SystemExit) as ended:
        module.simple_launcher()
    assert ended.value.code == 7
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("said", [True, False])
def test_below_an_error_of_one_line_accelerate_prints_no_traceback(said, tmp_path, monkeypatch):
    monkeypatch.setenv(signals.FOLDER_VARIABLE, str(tmp_path))

    def simple_launcher() -> None:
        if said:
            signals.refused()
        raise subprocess.CalledProcessError(1, "train")

    module = SimpleNamespace(simple_launcher=simple_launcher)
    signals.install_accelerate(module)
    with pytest.raises(SystemExit if said else subprocess.CalledProcessError) as ended:
        module.simple_launcher()
    assert (ended.value.code if said else ended.value.returncode) == 1
