"""Every point at which a process can be killed while it puts files into folders.

In the process that is to die, `install` wraps what the package calls for that: opening to write, each write, fsync,
link, rename, truncation, unlink, mkdir, rmdir. Each is a point before the call and one after it; a write has a third,
with half of the bytes written. At the chosen point the process sends itself SIGKILL: no handler, no `finally`, no
flush.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir", "ftruncate")
CRASH, CUT, ZEROS = "crash", "power cut", "power cut, zeros"
DEATHS = (CRASH, CUT, ZEROS)
_unlink, _write, _open = os.unlink, os.write, os.open


class Points:
    """Counts points from 0 and dies at number `at`; with -1 it only counts.

    death: CRASH leaves what the kernel has taken over. A power cut is modelled from the calls: of what was not synced
    by then half is lost, cut off (CUT) or zeros in its place (ZEROS), and so are the names made since their folder was
    last synced.
    """

    def __init__(self, at: int, death: str = CRASH) -> None:
        self.at = at
        self.death = death
        self.count = 0
        self._synced_bytes: dict[str, int] = {}  # files that were written to -> how much is on the disk for sure
        self._names: dict[str, set[str]] = {}  # folder -> names that may not be on the disk

    def point(self) -> None:
        if self.count == self.at:
            if self.death != CRASH:
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _lose(self) -> None:
        for path, synced_bytes in self._synced_bytes.items():
            if os.path.lexists(path):
                size_bytes = os.path.getsize(path)
                os.truncate(path, synced_bytes + max(0, size_bytes - synced_bytes) // 2)
                if self.death == ZEROS:
                    os.truncate(path, size_bytes)
        for folder, names in self._names.items():
            for path in (os.path.join(folder, name) for name in names):
                if os.path.isfile(path):
                    _unlink(path)

    def written(self, path: str) -> None:
        self._synced_bytes.setdefault(path, 0)

    def made(self, path: str) -> None:
        self._names.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))

    def called(self, name: str, arguments: tuple[Any, ...]) -> None:
        """After a call: what is on the disk and what may not be."""
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if os.path.isfile(path):
                self._synced_bytes[path] = os.path.getsize(path)
            self._names.pop(path, None)
        elif name in ("link", "rename", "replace"):
            old, new = (os.path.abspath(path) for path in arguments[:2])
            if old in self._synced_bytes:
                self._synced_bytes[new] = self._synced_bytes[old]
            self.made(new)


def install(points: Points) -> None:
    """Wrap the calls in this process, for good."""

    def write(descriptor: int, data: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        view = memoryview(data)
        if not os.path.isfile(path):
            return _write(descriptor, view)
        points.written(path)
        points.point()
        half = _write(descriptor, view[: len(view) // 2])
        points.point()
        rest = _write(descriptor, view[half:])
        points.point()
        return half + rest

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            return write(self.fileno(), data)

    opening = builtins.open

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("xwa+"):
            return opening(file, mode, *arguments, **options)
        assert "b" in mode and not arguments and not options, (file, mode)
        points.point()
        raw = File(file, mode.replace("b", ""))
        points.made(os.path.abspath(file))
        points.point()
        return io.BufferedWriter(raw)

    def os_open_counted(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if not flags & os.O_CREAT:
            return _open(path, flags, *arguments, **options)
        points.point()
        descriptor = _open(path, flags, *arguments, **options)
        points.made(os.path.abspath(path))
        points.point()
        return descriptor

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            points.point()
            result = call(*arguments, **options)
            points.called(name, arguments)
            points.point()
            return result

        return wrapped

    builtins.open = open_counted
    os.open, os.write = os_open_counted, write
    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
