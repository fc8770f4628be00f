"""What the probe adds to the processes that start a training: a clean stop and a clean error.

`simpletuner train` starts `accelerate launch`, which starts the training process. On Ctrl-C the first one ends the
others and returns 130; on SIGTERM it leaves them behind, and the second one dies of it. A probe-only run shall end with
its rows written and exit code 0 instead. The training process announces itself by a file whose folder the first process
names in the environment; without such a file everything stays SimpleTuner's.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "SIMPLETUNER_LAYERPROBE_PROCESSES"
LAST_LINE = "last-line"
ENDED = "ended"
REFUSED = "refused"
STOP_SECONDS = 600.0

_pending: list[str] = []


class _Launcher:
    """What `simpletuner train` was told. asked: how often it has asked the training processes to end."""

    terminated = False
    asked = 0


def announce() -> None:
    """In a training process: this one is a probe-only run and stops cleanly on SIGTERM."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and os.path.isdir(folder):
        Path(folder, str(os.getpid())).touch()


def refused() -> None:
    """In a training process: its error is one of this package, and has been said in one line."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and os.path.isdir(folder):
        Path(folder, REFUSED).touch()


def last_line(text: str) -> None:
    """Print the run's last line, where `simpletuner train` waits for this process: after all of its output."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and os.path.isdir(folder):
        Path(folder, LAST_LINE).write_text(text, encoding="utf-8")
    else:
        print(text, flush=True)


def _print_pending() -> None:
    for text in _pending:
        print(text, flush=True)


def announced(folder: str) -> list[int]:
    """The processes that announced themselves."""
    return [int(name) for name in os.listdir(folder) if name.isdecimal()] if os.path.isdir(folder) else []


def _hand_on(number: int, folder: str) -> bool:
    """Send a signal to the training processes; whether there are any."""
    pids = announced(folder)
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return bool(pids)


def install_cli(module: Any) -> None:
    """Wrap `run_training` and the end of its processes in `simpletuner.cli.train`."""
    # Registered before torch's own: it runs after that has logged its say.
    atexit.register(_print_pending)
    module.run_training = _clean_stop(module.run_training)
    module._terminate_process_group = _ask_before_ending(module._terminate_process_group)


def _clean_stop(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def run_training(*args: Any, **kwargs: Any) -> int:
        folder = tempfile.mkdtemp(prefix="layerprobe-")
        os.environ[FOLDER_VARIABLE] = folder

        def on_terminate(number: int, frame: Any) -> None:
            if _Launcher.terminated or _Launcher.asked:  # we are waiting for the end of the step
                return
            if announced(folder):
                _Launcher.terminated = True
                raise KeyboardInterrupt
            signal.signal(signal.SIGTERM, previous)
            os.kill(os.getpid(), signal.SIGTERM)

        previous = signal.signal(signal.SIGTERM, on_terminate)
        try:
            code = original(*args, **kwargs)
            return 0 if code == 130 and Path(folder, ENDED).exists() else code
        finally:
            last = Path(folder, LAST_LINE)
            if last.exists():
                _pending.append(last.read_text(encoding="utf-8"))
            signal.signal(signal.SIGTERM, previous)
            os.environ.pop(FOLDER_VARIABLE, None)
            shutil.rmtree(folder, ignore_errors=True)

    return run_training


def _ask_before_ending(original: Callable[..., None]) -> Callable[..., None]:
    """Called for a Ctrl-C or a SIGTERM, and again for a Ctrl-C while it waits."""

    @functools.wraps(original)
    def terminate(process: Any, *args: Any, **kwargs: Any) -> None:
        folder = os.environ.get(FOLDER_VARIABLE, "")
        number = signal.SIGTERM if _Launcher.terminated and not _Launcher.asked else signal.SIGINT
        if _hand_on(number, folder):
            _Launcher.asked += 1
            try:
                if process.wait(timeout=STOP_SECONDS) == 0:
                    Path(folder, ENDED).touch()
                return
            except subprocess.TimeoutExpired:
                print("layerprobe: the training process did not stop; ending it", file=sys.stderr, flush=True)
        original(process, *args, **kwargs)

    return terminate


def install_accelerate(module: Any) -> None:
    """In `accelerate launch`: it outlives a SIGTERM, and prints no traceback below an error that is one line."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return
    original = module.simple_launcher

    def on_terminate(number: int, frame: Any) -> None:
        if not _hand_on(number, folder):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    @functools.wraps(original)
    def simple_launcher(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, on_terminate)
        try:
            original(*args, **kwargs)
        except subprocess.CalledProcessError as error:
            if not announced(folder) and not os.path.exists(os.path.join(folder, REFUSED)):
                raise
            sys.exit(error.returncode if error.returncode > 0 else 1)

    module.simple_launcher = simple_launcher
