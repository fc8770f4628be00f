"""The `layerprobe` command in this process, and what tests say of its results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = {
    "image": tuple(f"transformer_blocks.{i}" for i in range(6)),
    "text": tuple(f"transformer_blocks.{i}" for i in range(5)),
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, ""), self
        return json.loads(self.out)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """An error: this exit code, nothing but one line on stderr, which has these parts."""
    assert result.code == code, result
    assert result.err.startswith("layerprobe: error: ")
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for part in parts:
        assert part in result.err


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; stderr is kept."""
    command = [sys.executable, "-m", "simpletuner_layerprobe.cli", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)
