"""Runs of the real SimpleTuner for the tests: one import of its trainer, one forked process per run."""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "SIMPLETUNER_LAYERPROBE": "1",
}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Result:
    code: int
    log: str
    seconds: float

    def line(self, start: str) -> str:
        """The last line of the log that starts with `start`, after colours are taken out."""
        return [line for line in self.log.splitlines() if line.startswith(start)][-1]


class Started:
    def __init__(self, pid: int, log: Path, codes: queue.Queue[int]) -> None:
        self.pid = pid
        self._log = log
        self._codes = codes
        self._since = time.monotonic()

    def text(self) -> str:
        return ANSI.sub("", self._log.read_text(errors="replace")) if self._log.exists() else ""

    def wait_for(self, text: str, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < end and not self.ended(), f"{text!r} did not come:\n{self.text()[-4000:]}"
            time.sleep(0.1)

    def ended(self) -> bool:
        return not self._codes.empty()

    def result(self, seconds: float = 600) -> Result:
        code = self._codes.get(timeout=seconds)
        return Result(code, self.text(), time.monotonic() - self._since)


class SimpleTuner:
    """The server process of simpletuner_server.py."""

    def __init__(self, log: Path) -> None:
        self._stderr = log.open("w")
        path = os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "simpletuner_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            # Off in the server itself: each run switches it on, as the .pth file would.
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SIMPLETUNER_LAYERPROBE": "0"},
        )
        self._pids: queue.Queue[int] = queue.Queue()
        self._codes: dict[int, queue.Queue[int]] = {}
        self._starting = threading.Lock()
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        assert first and json.loads(first) == {"ready": True}, log.read_text()[-4000:]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            codes = self._codes.setdefault(answer["pid"], queue.Queue())
            if "code" in answer:
                codes.put(answer["code"])
            else:
                self._pids.put(answer["pid"])

    def start(
        self,
        cwd: Path,
        env: str,
        *,
        argv: Sequence[str] = (),
        setup: str = "",
        environment: dict[str, str] | None = None,
        log: str = "log.txt",
    ) -> Started:
        """Start `train.py` for the SimpleTuner environment `env` of the folder `cwd`."""
        return self._start(
            cwd=str(cwd),
            out="",
            log=str(cwd / log),
            environment=ENVIRONMENT | {"ENV": env} | (environment or {}),
            script="",
            argv=list(argv),
            setup=f"{TESTS / setup}" if setup else "",
        )

    def _start(self, **job: Any) -> Started:
        assert self._process.stdin is not None
        with self._starting:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            pid = self._pids.get(timeout=600)
        return Started(pid, Path(job["log"]), self._codes.setdefault(pid, queue.Queue()))

    def start_ranks(
        self, cwd: Path, env: str, ranks: int, *, environment: dict[str, str] | None = None, **options: object
    ) -> list[Started]:
        """The same with several ranks, with the variables that torchrun sets; each has a log0.txt, log1.txt, ..."""
        if ranks == 1:
            return [self.start(cwd, env, environment=environment, **options)]  # type: ignore[arg-type]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        return [
            self.start(
                cwd,
                env,
                log=f"log{rank}.txt",
                environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment or {}),
                **options,  # type: ignore[arg-type]
            )
            for rank in range(ranks)
        ]

    def run(self, cwd: Path, env: str, **options: object) -> Result:
        return self.start(cwd, env, **options).result()  # type: ignore[arg-type]

    def start_script(
        self, cwd: Path, script: Path, *arguments: object, out: str = "", environment: dict[str, str] | None = None
    ) -> Started:
        """Start a script that imports what SimpleTuner's trainer does, without the seconds that it takes.

        Imported modules are as SimpleTuner left them: what depends on that needs a process of its own. The probe is
        there only if `environment` says so.
        """
        return self._start(
            cwd=str(cwd),
            out=str(cwd / out) if out else "",
            log=str(cwd / "log.txt"),
            environment=environment or {},
            script=str(script),
            argv=list(map(str, arguments)),
            setup="",
        )

    def script(self, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, in a folder that goes away."""
        with tempfile.TemporaryDirectory() as folder:
            result = self.start_script(Path(folder), script, *arguments, out="out.txt").result()
            out = ANSI.sub("", Path(folder, "out.txt").read_text())
            return subprocess.CompletedProcess([str(script), *map(str, arguments)], result.code, out, result.log)

    def pipeline(self, folder: Path, script: Path, *arguments: object) -> Path:
        """The folder in which the script makes a tiny pipeline."""
        done = self.script(script, *arguments)
        assert done.returncode == 0, done.stderr
        return folder

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # its loop over the lines ends
        self._process.wait(timeout=600)
        self._reader.join(timeout=600)
        self._process.stdout.close()
        self._stderr.close()
