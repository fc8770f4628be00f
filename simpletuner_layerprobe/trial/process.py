"""`simpletuner train` as a process of its own, which never outlives its trial unseen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from simpletuner_layerprobe.errors import ConfigError, ProbeError

MARK = "LAYERPROBE_TRIAL"
"""Environment variable of every process that a training starts: the folder of the training."""
GRACE_SECONDS = 20
LAST_LINES = 200


def simpletuner() -> str:
    """The `simpletuner` command of this Python, else of PATH. Raises ConfigError if there is none."""
    beside = Path(sys.executable).with_name("simpletuner")
    command = str(beside) if beside.exists() else shutil.which("simpletuner")
    if command is None:
        raise ConfigError("there is no `simpletuner` command beside this Python or on PATH; install SimpleTuner there")
    return command


def train(config: Path, log: Path) -> None:
    """Train with this config.json, its output in `log`. Raises ProbeError with the last words of one that fails.

    What is still running of an earlier start with the same config is ended first: it would write into the same folder.
    Hashes of strings are held: SimpleTuner's order of images goes through sets of names, and arms are to see the same.
    """
    end_leftovers(config.parent)
    environment = os.environ | {
        "CONFIG_PATH": str(config.with_suffix("")),
        "CONFIG_BACKEND": "json",
        "SIMPLETUNER_CONFIG_BACKEND": "json",
        "PYTHONHASHSEED": "0",
        MARK: str(config.parent.resolve()),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [simpletuner(), "train", f"env={config.parent.name}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            end_leftovers(config.parent)
            process.wait()
            raise
    if code:
        raise ProbeError(f"simpletuner train ended with {code}: {last_words(log)} (all of it: {log})")


def end_leftovers(folder: Path) -> None:
    """End every process that carries this folder's mark, and wait until it has gone."""
    import psutil

    mark, alive = str(folder.resolve()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.send_signal(signal.SIGTERM)
                alive.append(process)
    _, alive = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)


def last_words(log: Path) -> str:
    """The last line of a log that tells of an error, else its last line, without colours."""
    import re

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
    errors = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    return " ".join((errors or lines or ["no output"])[-1].split())[:300]
