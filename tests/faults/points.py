"""Every point at which a process can be killed while it puts files into folders.

In the process that is to die, `install` wraps what the package calls for that: open, the writes to the file, fsync,
link, rename, replace, unlink, mkdir, rmdir. Each is a point before the call and one after it; a write has a third, with
half of the bytes written. At the chosen point the process sends itself SIGKILL: no handler, no `finally`, no flush.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir")


class Points:
    """Counts points from 0 and dies at number `at`; with -1 it only counts.

    power_cut: what is not on the disk by then is lost too. Modelled from the calls: the bytes of files that were not
    synced, and the names made since their folder was last synced.
    """

    def __init__(self, at: int, *, power_cut: bool = False) -> None:
        self.at = at
        self.power_cut = power_cut
        self.count = 0
        self._unsynced: set[str] = set()  # files with bytes that may not be on the disk
        self._names: dict[str, set[str]] = {}  # folder -> names that may not be on the disk

    def point(self) -> None:
        if self.count == self.at:
            if self.power_cut:
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _lose(self) -> None:
        for path in self._unsynced:
            if os.path.lexists(path):
                os.truncate(path, os.path.getsize(path) // 2)
        for folder, names in self._names.items():
            for name in names:
                path = os.path.join(folder, name)
                if os.path.isfile(path):
                    _unlink(path)

    def called(self, name: str, arguments: tuple[Any, ...]) -> None:
        """After a call: what is on the disk and what may not be."""
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            self._unsynced.discard(path)
            self._names.pop(path, None)
        elif name in ("link", "rename", "replace"):
            old, new = (os.path.abspath(path) for path in arguments[:2])
            if old in self._unsynced:
                self._unsynced.add(new)
            self._names.setdefault(os.path.dirname(new), set()).add(os.path.basename(new))


_unlink = os.unlink


def install(points: Points) -> None:
    """Wrap the calls in this process, for good."""

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data)
            points._unsynced.add(os.path.abspath(str(self.name)))
            points.point()
            half = super().write(view[: len(view) // 2])
            points.point()
            rest = super().write(view[half:])
            points.point()
            return (half or 0) + (rest or 0)

    opening = builtins.open

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("xwa+"):
            return opening(file, mode, *arguments, **options)
        assert "b" in mode and not arguments and not options, (file, mode)
        points.point()
        raw = File(file, mode.replace("b", ""))
        points.point()
        return io.BufferedWriter(raw)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            points.point()
            result = call(*arguments, **options)
            points.called(name, arguments)
            points.point()
            return result

        return wrapped

    builtins.open = open_counted
    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
