"""The process of a `layerprobe` command: its standard streams, and how Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

SOON_SECONDS = 0.01


def open_streams() -> bool:
    """Let closed standard streams lead nowhere, or the next file that is opened takes a closed one's place.

    Returns whether standard output was open.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        number = ("stdin", "stdout", "stderr").index(name)
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    return "stdout" not in closed


class Interrupt:
    """Ctrl-C as a KeyboardInterrupt that is not lost: `came` holds whatever has become of it.

    While modules are imported, Python drops an exception in a callback with a traceback, and C code makes an
    ImportError of it, also with a traceback.
    """

    def __init__(self) -> None:
        self.came = False
        self._thread = threading.get_ident()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
            signal.signal(signal.SIGINT, self._interrupt)
            sys.unraisablehook, self._unraisable = self._dropped, sys.unraisablehook
            sys.excepthook, self._uncaught = self._printed, sys.excepthook

    def _interrupt(self, number: int, frame: Any) -> None:
        self.came = True
        raise KeyboardInterrupt

    def _dropped(self, what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            self._unraisable(what)
            return
        again = threading.Timer(SOON_SECONDS, signal.pthread_kill, (self._thread, signal.SIGINT))
        again.daemon = True
        again.start()

    def _printed(self, kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            self._uncaught(kind, *rest)
