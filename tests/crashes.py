"""Kills `compact` and `merge` at every moment that the disk can tell, and looks at what is left.

A process of its own (it forks; numpy must have no threads): prints what it found as JSON. A child is killed with
SIGKILL at its k-th step on the file system (open, rename, remove, link, ...), for every k until one gets through; then
at random times beside a writer that is killed too.

    python crashes.py FOLDER steps|times NUMBER
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from synthetic_run import manifest, rows

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.compact import compact
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run

STEPS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.listdir"}
MANIFEST = manifest({"image": ("a", "b")}, tokens=("last",))


def write(folder: Path, rank: int, counts: list[int], first: int) -> None:
    """Shards of so many rows; the numbers of the rows, from `first` on, are in their sigmas and distances."""
    create_run(folder, MANIFEST)
    writer = ShardWriter(folder, MANIFEST, rank)
    for count in counts:
        write_rows(writer, first, count)
        first += count


def write_rows(writer: ShardWriter, first: int, count: int) -> None:
    number_N = np.arange(first, first + count)
    distance_NL = np.stack([number_N, -number_N], axis=1).astype(np.float32)
    writer.write(rows(number_N / 2**20, {("image", "last"): distance_NL}))


def numbers(folder: Path) -> list[int]:
    """The numbers of the run's rows, in the order in which they are read, by all three ways of reading."""
    run = open_run(folder)
    found = [int(number) for part in run.rows() for number in part.distances["image", "last"][:, 0]]
    streamed = [round(sigma * 2**20) for sigma_N, _ in run.distances("last") for sigma in sigma_N]
    assert found == streamed and len(found) == run.sample_count(), (len(found), len(streamed), run.sample_count())
    return found


def in_child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        before()
        work()
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_step(step: int) -> None:
    """SIGKILL for this process just before its `step`-th step on the file system."""
    left = step

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def compact_at_every_step(base: Path) -> dict[str, int]:
    """Every first crash; after each another crash at a random step of the compaction that cleans up."""
    random.seed(0)
    write(base / "run", 0, [1, 2, 1, 3, 1, 1], 100)
    write(base / "run", 1, [2, 2, 2], 200)
    compact(base / "run")
    write(base / "run", 0, [1, 1, 2], 300)  # goes on after a compaction
    write(base / "run", 1, [1, 1], 400)
    expected = numbers(base / "run")
    assert sorted(expected) == [*range(100, 109), *range(200, 206), *range(300, 304), *range(400, 402)]
    kills = steps = 0
    for step in range(1, 10_000):
        steps = step
        folder = base / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / "run", folder)
        for attempt in (step, random.randint(1, max(1, step))):
            code = ended(in_child(partial(compact, folder), partial(kill_at_step, attempt)))
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
            found = numbers(folder)
            assert found == expected, (step, attempt, found)
            if attempt == step and code == 0:
                return {"steps": steps, "kills": kills}
        compact(folder)
        assert numbers(folder) == expected
        assert sorted(os.listdir(folder / "shards")) == ["rank00000-000008.safetensors", "rank00001-000004.safetensors"]
    raise AssertionError("no end")


def merge_at_every_step(base: Path) -> dict[str, int]:
    write(base / "a", 0, [1, 2, 1], 100)
    write(base / "b", 0, [2, 1], 200)
    shutil.copytree(base / "a", base / "c")
    expected = [*range(100, 104), *range(200, 203)]
    inputs = [base / name for name in "abc"]
    before = {path: path.read_bytes() for folder in inputs for path in folder.rglob("*") if path.is_file()}
    for step in range(1, 10_000):
        out = base / f"out{step}"
        code = ended(in_child(partial(merge, inputs, out), partial(kill_at_step, step)))
        assert {path: path.read_bytes() for folder in inputs for path in folder.rglob("*") if path.is_file()} == before
        if out.exists():
            assert numbers(out) == expected
        elif code:
            merge(inputs, out)
        if code == 0:
            return {"steps": step, "kills": step - 1}
        assert code == -signal.SIGKILL, code
    raise AssertionError("no end")


def kills_at_random_times(base: Path, times: int) -> dict[str, int]:
    """A writer and a compaction, both killed at random times, again and again in the same run; and a reader of it."""
    random.seed(1)
    folder = base / "run"
    create_run(folder, MANIFEST)
    committed = lost = twice = 0
    for _ in range(times):
        end, start = os.pipe()

        def record(first: int = committed, pipe: int = start) -> None:
            writer = ShardWriter(folder, MANIFEST, 0, alone=random.random() < 0.5)
            for number in range(first, first + 1000):
                write_rows(writer, number, 1)
                os.write(pipe, b".")

        def again() -> None:
            while True:
                compact(folder)

        both = [in_child(record), in_child(again)]
        time.sleep(random.uniform(0, 0.02))
        found = numbers(folder)  # in the middle of it all
        twice += len(found) - len(set(found))
        for pid in random.sample(both, 2):
            os.kill(pid, signal.SIGKILL)
        codes = [ended(pid) for pid in both]
        assert set(codes) == {-signal.SIGKILL}, codes
        os.close(start)
        said = committed
        while chunk := os.read(end, 4096):
            said += len(chunk)
        os.close(end)
        found = numbers(folder)
        lost += len(set(range(said)) - set(found))
        twice += len(found) - len(set(found))
        committed = len(found)  # one more than was said, if it was killed in between
        assert found == list(range(committed)), found
    before = len(os.listdir(folder / "shards"))
    compact(folder)
    assert numbers(folder) == list(range(committed))
    return {"kills": 2 * times, "rows": committed, "lost": lost, "twice": twice, "shards": before}


def main() -> None:
    base, what, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    base.mkdir(parents=True, exist_ok=True)
    result: dict[str, dict[str, int]] = {}
    if what == "steps":
        result["compact"] = compact_at_every_step(base / "compact")
        result["merge"] = merge_at_every_step(base / "merge")
    else:
        result["times"] = kills_at_random_times(base / "times", times)
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except ProbeError as error:
        raise SystemExit(f"unexpected: {error}") from error
