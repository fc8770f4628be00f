from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from failing import fails

from simpletuner_layerprobe.run import lock
from simpletuner_layerprobe.run.lock import locked

HOLD = """
import os, signal, sys
from pathlib import Path
from simpletuner_layerprobe.run.lock import locked
with locked(Path(sys.argv[1]), "taken") as held:
    child = os.fork() if sys.argv[2] == "fork" else 1
    if child == 0:
        signal.pause()  # a data worker that outlives its parent
    print(int(held), child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(path: Path, fork: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process holds the lock: the process, and its child's id if it forks."""
    command = [sys.executable, "-c", HOLD, str(path), fork]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held, child = process.stdout.readline().split()
        assert held == "1"
        yield process, int(child)


def test_a_second_process_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path), fails("it is taken"), locked(path, "it is taken"):
        pass
    assert os.listdir(tmp_path) == []
    with locked(path, "it is taken") as held:
        assert held and path.exists()
    assert os.listdir(tmp_path) == []


def test_sigkill_leaves_no_lock_not_even_with_a_child_alive(tmp_path: Path) -> None:
    with holding(tmp_path / "lock", "fork") as (process, child):
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)  # it is alive
            with locked(tmp_path / "lock", "it is taken") as held:
                assert held
        finally:
            os.kill(child, signal.SIGKILL)


def test_one_at_a_time_among_many(tmp_path: Path) -> None:
    """Whoever gets the lock is alone inside, however the lock's file comes and goes."""
    script = """
import os, sys
from pathlib import Path
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.lock import locked
folder, got = Path(sys.argv[1]), 0
while got < 200:
    try:
        with locked(folder / "lock", "taken"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            got += 1
            os.unlink(folder / "inside")
    except ProbeError as error:
        assert str(error) == "taken", error
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_without_locks_everybody_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)  # as on a system without it
    with locked(tmp_path / "lock", "taken") as first, locked(tmp_path / "lock", "taken") as second:
        assert not first and not second
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "lock"
    with fails(f"cannot make the lock file {absent}: No such file"), locked(absent, "taken"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with fails("cannot make the lock file"), locked(tmp_path / "link", "taken"):
        pass
    assert os.listdir(tmp_path) == ["link"]
