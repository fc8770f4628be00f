"""Kills of real processes that write: the writer of a probe run, and what else makes files and folders.

    python tests/faults/kills.py --kills 1000 --seed 1

Children are forked from this one warm process. The writer's die by SIGKILL: from this process once they have said that
so many batches are on the disk, while they go on, or by their own hand at a random point (points.py); the next one goes
on in the same folder. Then every operation is killed at each of its points, as a crash and as two kinds of power cut.
What must hold is looked at after each kill; nothing waits for a time, and a child may have ended before it is killed.
The counts are printed as JSON. Any violation ends this script with an AssertionError.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from faults.points import CRASH, DEATHS, Points, install
from synthetic_run import manifest, read_rows, rows_at

from simpletuner_layerprobe.run.article import export_article, import_article
from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.run.manifest import create_run, read_manifest
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.run.records import RecordWriter, stream_files
from simpletuner_layerprobe.run.rows import Rows

MANIFEST = manifest({"image": ("b.0", "b.1", "b.2"), "text": ("b.0", "b.1")})
CHAIN = 12  # kills in one folder
MOST_ROWS = 9
FURTHER_BATCHES = 50  # that a child writes at most beyond the last that is waited for


@dataclass
class Counts:
    """tried: kills. committed: rows whose write() had returned. lost: those of them that were not there afterwards.

    unfinished: kills after which there were rows of the batch in hand, or an operation had left no result.
    """

    tried: int = 0
    committed: int = 0
    lost: int = 0
    unfinished: int = 0
    points: dict[str, int] = field(default_factory=dict)


def rows_of(first: int, count: int) -> Rows:
    """Rows that say who they are: number `first` and the following, all values a function of the number."""
    number_N = np.arange(first, first + count)
    return Rows(
        sigma_N=(number_N % 1000) / 1000,
        loss_N=number_N.astype(np.float32),
        facts={
            "image": number_N + 2**40,
            "repeat": number_N % 5,
            "width": number_N,
            "height": number_N * 7 % 1024,
            "dropped": number_N % 3 - 1,
            "backend": np.array(["photographs", ""], object)[number_N % 2],
        },
        distances={
            key: (np.outer(number_N + 1, np.arange(1, len(blocks) + 1)) % 997 / 997).astype(np.float32)
            for key, blocks in MANIFEST.columns().items()
        },
    )


def numbers_in(folder: Path) -> list[int]:
    """The numbers of all rows in the run; every value of every row is compared with what was written."""
    what = read_manifest(folder)
    rows = read_rows(folder, what)
    numbers: list[int] = rows.facts["width"].tolist()
    if numbers:
        expected = rows_at(rows_of(0, max(numbers) + 1), np.array(numbers))
        np.testing.assert_array_equal(rows.sigma_N, expected.sigma_N)
        np.testing.assert_array_equal(rows.loss_N, expected.loss_N)
        for name, fact_N in rows.facts.items():
            np.testing.assert_array_equal(fact_N, expected.facts[name])
        for key, distance_NC in rows.distances.items():
            np.testing.assert_array_equal(distance_NC, expected.distances[key])
    return numbers


def child(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Fork a process that does `work(report)`. Returns (its id, the pipe that its reports come from)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        work(lambda number: (os.write(writing, struct.pack("<q", number)), None)[1])
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, reading: int, data: bytes = b"") -> tuple[int, list[int]]:
    """(the exit code, negative for a signal; the reports, `data` the first of them), when the child is gone."""
    while part := os.read(reading, 65536):
        data += part
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), [number for (number,) in struct.iter_unpack("<q", data)]


# The writer


def write_like_a_session(
    report: Callable[[int], None], folder: Path, first: int, seed: int, batches: int, points: Points | None = None
) -> None:
    """What a probe run's process does with its folder: make or open the run, then one batch per flush."""
    if points:
        install(points)
    draw = random.Random(seed)
    what = create_run(folder, MANIFEST)
    with RecordWriter(folder, what, rank=0) as writer:
        report(-1)
        for number in range(batches):
            count = draw.randint(1, MOST_ROWS)
            writer.write(rows_of(first, count), {"number": str(number)})
            first += count
            report(first)


def check_chain(folder: Path, first: int, reports: list[int], before: list[int], counts: Counts) -> list[int]:
    """After a kill: nothing committed is lost, nothing is there twice, and at most the batch in hand was added."""
    if not os.path.lexists(folder / "manifest.json"):
        assert not reports and not before
        return []
    committed = max([first, *reports])
    numbers = numbers_in(folder)
    assert len(set(numbers)) == len(numbers), "rows twice"
    lost = {*before, *range(first, committed)} - set(numbers)
    counts.committed += committed - first
    counts.lost += len(lost)
    assert not lost, f"lost: {sorted(lost)[:5]}"
    added = sorted(set(numbers) - {*before} - {*range(first, committed)})
    assert added == list(range(committed, committed + len(added))) and len(added) <= MOST_ROWS
    counts.unfinished += bool(added)
    return numbers


def kill_after(pid: int, reading: int, batches: int, folder: Path) -> bytes:
    """Kill the child once it has said that so many batches are on the disk; look at the run before, as it grows."""
    data = b""
    while len(data) < 8 * (batches + 1) and (part := os.read(reading, 8)):
        data += part
    if len(data) >= 8:
        committed = max(0, *struct.unpack(f"<{len(data) // 8}q", data))
        numbers = numbers_in(folder)
        assert set(range(committed)) <= set(numbers)
    os.kill(pid, signal.SIGKILL)  # of a process that has ended too: it has not been waited for
    return data


def random_kills(kills: int, seed: int, scratch: Path) -> Counts:
    """SIGKILL at random moments, from outside and by its own hand, `CHAIN` of them in one folder after another."""
    draw = random.Random(seed)
    counts = Counts()
    numbers: list[int] = []
    folder = scratch
    while counts.tried < kills:
        if counts.tried % CHAIN == 0:
            folder, numbers = scratch / f"random-{counts.tried}", []
        first = 1 + max(numbers, default=-1)
        batches = draw.randint(0, 6)
        points = Points(draw.randrange(60)) if draw.random() < 0.5 else None
        session = {"folder": folder, "first": first, "seed": draw.randrange(2**32), "points": points}
        pid, reading = child(partial(write_like_a_session, batches=batches + FURTHER_BATCHES, **session))
        data = b"" if points else kill_after(pid, reading, batches, folder)
        code, reports = ended(pid, reading, data)
        assert code in (0, -signal.SIGKILL), code
        counts.tried += code != 0
        numbers = check_chain(folder, first, reports, numbers, counts)
        if counts.tried % CHAIN == 0 or counts.tried == kills:
            goes_on(folder, numbers)
            folder, numbers = scratch / f"next-{counts.tried}", []
    return counts


def goes_on(folder: Path, numbers: list[int]) -> None:
    """A new writer takes the folder as it was left, and everything from before is still there."""
    what = create_run(folder, MANIFEST)
    first = 1 + max(numbers, default=-1)
    with RecordWriter(folder, what, rank=0) as writer:
        writer.write(rows_of(first, 3))
    assert sorted(numbers_in(folder)) == sorted([*numbers, *range(first, first + 3)])
    assert sum(file.samples for file in stream_files(folder, what)) == len(numbers) + 3
    shutil.rmtree(folder)


def at_points(run: Callable[[int, str], int], every: int) -> int:
    """Count the points of an operation, then kill it at them in each of the DEATHS: the points.

    every: at each point (1), or at each second, third, ... other ones in each of the DEATHS.
    """
    total = run(-1, CRASH)
    assert total > 8
    for number, death in enumerate(DEATHS):
        for at in range(number % every, total, every):
            assert run(at, death) == -signal.SIGKILL
    return total


def writer_at_points(scratch: Path, every: int) -> Counts:
    """The writer, killed at each point of its first start and of its start in a run that exists."""
    counts = Counts()

    def die(at: int, death: str, exists: bool) -> int:
        folder = scratch / "points"
        before: list[int] = []
        if exists:
            with RecordWriter(folder, create_run(folder, MANIFEST), rank=0) as writer:
                writer.write(rows_of(0, 4))
            before = [0, 1, 2, 3]

        def work(report: Callable[[int], None]) -> None:
            points = Points(at, death)
            write_like_a_session(report, folder, len(before), seed=at, batches=3, points=points)
            if at < 0:
                report(points.count)

        code, reports = ended(*child(work))
        if at < 0:
            assert code == 0
            shutil.rmtree(folder)
            return reports[-1]
        counts.tried += 1
        numbers = check_chain(folder, len(before), [number for number in reports if number >= 0], before, counts)
        goes_on(folder, numbers)
        return code

    for exists in (False, True):
        counts.points["going on" if exists else "first start"] = at_points(partial(die, exists=exists), every)
    return counts


# What else makes files: complete or absent, and a second try works.


@dataclass(frozen=True)
class Operation:
    """prepare: what is there before. do: what is killed. done: True if its result is there, False if nothing of it is;
    it fails on half a result. result: where it is."""

    prepare: Callable[[Path], object]
    do: Callable[[Path], object]
    done: Callable[[Path], bool]
    result: str


def article_file(folder: Path) -> None:
    lines = [
        json.dumps({"timestep": i / 40, "encoder_hidden_states": [0.25] * 2, "hidden_states": [0.5] * 3})
        for i in range(40)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")


def some_runs(folder: Path) -> None:
    """Two runs, the second with a copy of a file of the first."""
    for name, first in (("run", 0), ("other", 60)):
        with RecordWriter(folder / name, create_run(folder / name, MANIFEST), rank=0) as writer:
            for part in range(3):
                writer.write(rows_of(first + 20 * part, 20))
    (copied,) = (folder / "run").glob("*.arrows")
    shutil.copy(copied, folder / "other")


def lines_in(path: Path) -> int:
    return len([json.loads(line) for line in path.read_bytes().splitlines()])


OPERATIONS = {
    "import": Operation(
        article_file,
        lambda folder: import_article(folder / "records.jsonl", folder / "new" / "run"),
        lambda folder: (folder / "new" / "run").exists() and load_run(folder / "new" / "run").samples == 40,
        "new/run",
    ),
    "export": Operation(
        some_runs,
        lambda folder: export_article(load_run(folder / "run"), folder / "out.jsonl"),
        lambda folder: (folder / "out.jsonl").exists() and lines_in(folder / "out.jsonl") == 60,
        "out.jsonl",
    ),
    "merge": Operation(
        some_runs,
        lambda folder: merge([folder / "run", folder / "other"], folder / "new" / "both"),
        lambda folder: (
            (folder / "new").exists()
            and (folder / "new" / "both").exists()
            and sorted(numbers_in(folder / "new" / "both")) == list(range(120))
        ),
        "new/both",
    ),
}


def operation_at_points(operation: Operation, scratch: Path, every: int) -> Counts:
    counts = Counts()

    def die(at: int, death: str) -> int:
        folder = scratch / "operation"
        folder.mkdir()
        operation.prepare(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def work(report: Callable[[int], None]) -> None:
            points = Points(at, death)
            install(points)
            operation.do(folder)
            report(points.count)

        code, reports = ended(*child(work))
        if at >= 0:
            counts.tried += 1
            is_done = operation.done(folder)
            assert is_done == (folder / operation.result).exists(), "half a result"
            counts.unfinished += not is_done
            assert all(path.read_bytes() == data for path, data in before.items()), "what was there has changed"
            if not is_done:
                operation.do(folder)
        assert operation.done(folder)
        shutil.rmtree(folder)
        return reports[-1] if at < 0 else code

    counts.points["all"] = at_points(die, every)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="random kills of the writer")
    parser.add_argument(
        "--every", type=int, default=1, help="kill at each second, third, ... point of an operation alone"
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="layerprobe-kills-"))
    try:
        results = {
            "random": random_kills(arguments.kills, arguments.seed, scratch),
            "points": writer_at_points(scratch, arguments.every),
        }
        for name, operation in OPERATIONS.items():
            results[name] = operation_at_points(operation, scratch, arguments.every)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps({name: vars(counts) for name, counts in results.items()}))


if __name__ == "__main__":
    main()
