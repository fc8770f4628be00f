"""A lock between processes: a rank of a run is recorded by one process at a time.

A lock belongs to its process and ends with it, however it ends: nothing stale is left behind that somebody would have
to remove. Its file lies in the run folder while it is held (and stays there, unlocked, after a SIGKILL).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simpletuner_layerprobe.errors import RunError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, taken: str) -> Iterator[bool]:
    """Hold the lock file `path`. Yields False where files cannot be locked: some network folders, not POSIX.

    It is a record lock and not `flock`: forked data workers do not inherit it, so it cannot outlive its process; and
    network folders that lock at all know it. A process can hold a lock file once, in one thread. Raises
    RunError(taken) if another process holds it, and if the file cannot be made.
    """
    descriptor, held = _acquire(path, taken)
    try:
        yield held
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, taken: str) -> tuple[int, bool]:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise RunError(f"cannot make the lock file {path}: {error.strerror}") from None
        try:
            if fcntl is None:
                return descriptor, False
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file between our opening and our locking it.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _TAKEN:
                return descriptor, False
            os.close(descriptor)
            raise RunError(taken) from None
        os.close(descriptor)
