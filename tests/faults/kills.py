"""Kills of real processes that write: the writer of a probe run, and every command that makes files.

    python tests/faults/kills.py --kills 1000 --seed 1

Children are forked from this one warm process. The writer's are killed from outside after a random time, chained: the
next one goes on in the same folder. Then every operation is killed from inside at each of its points (points.py), as a
crash of the process and as a modelled power cut. What must hold is looked at after each kill; the counts are printed as
JSON. Any violation ends this script with an AssertionError.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from points import Points, install

from simpletuner_layerprobe.commands.output import replace_files
from simpletuner_layerprobe.lokr.config import environment
from simpletuner_layerprobe.run.article import export_jsonl, import_jsonl
from simpletuner_layerprobe.run.manifest import Manifest, Stream
from simpletuner_layerprobe.run.records import Rows, ShardWriter, create_run, open_run

MANIFEST = Manifest(
    schema=1,
    family="sd3",
    flavour="",
    model_class="",
    streams=(Stream("image", ("b.0", "b.1", "b.2")), Stream("text", ("b.0", "b.1"))),
    tokens=("last", "mean"),
    modules=(),
    versions={},
    settings={"sigmas": "uniform"},
    fingerprint="",
    created="2026-01-01T00:00:00+00:00",
    source="probe",
)
LENGTHS = {("image", "last"): 3, ("image", "mean"): 3, ("text", "last"): 2, ("text", "mean"): 2}
CHAIN = 12  # kills in one folder
MOST_ROWS = 9


@dataclass
class Counts:
    """tried: kills. committed: rows whose write() had returned. lost: those of them that were not found again."""

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
        width_N=number_N.astype(np.int32),
        height_N=(number_N * 7 % 1024).astype(np.int32),
        text_tokens_N=(number_N % 77).astype(np.int32),
        caption_dropped_N=(number_N % 3 - 1).astype(np.int8),
        backend_N=np.zeros(count, np.int16),
        backends=("photographs",),
        distances={
            key: (np.outer(number_N + 1, np.arange(1, length + 1)) % 997 / 997).astype(np.float32)
            for key, length in LENGTHS.items()
        },
    )


def numbers_in(folder: Path) -> list[int]:
    """The numbers of all rows in the run; every value of every row is compared with what was written."""
    run = open_run(folder)
    found: list[int] = []
    for rows in run.rows():
        expected = rows_of(int(rows.width_N[0]), len(rows))
        for name, column in rows.columns().items():
            np.testing.assert_array_equal(column, expected.columns()[name])
        for key, value_NL in rows.distances.items():
            np.testing.assert_array_equal(value_NL, expected.distances[key])
        found += rows.width_N.tolist()
    assert run.sample_count() == len(found)
    return found


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


def write_like_a_session(folder: Path, first: int, seed: int, shards: int, report: Callable[[int], None]) -> None:
    """What a probe run's process does with its folder: make or open the run, then one shard per flush."""
    draw = random.Random(seed)
    create_run(folder, MANIFEST)
    writer = ShardWriter(folder, MANIFEST, rank=0)
    report(-1)
    for _ in range(shards):
        count = draw.randint(1, MOST_ROWS)
        writer.write(rows_of(first, count))
        first += count
        report(first)


def check_chain(folder: Path, first: int, reports: list[int], before: list[int], counts: Counts) -> list[int]:
    """After a kill: nothing committed is lost, nothing is there twice, and at most the shard in hand was added."""
    if not os.path.lexists(folder / "manifest.json"):
        assert not reports and not before
        return []
    committed = max([first, *reports])
    found = numbers_in(folder)
    assert len(set(found)) == len(found), "rows twice"
    lost = {*before, *range(first, committed)} - set(found)
    counts.committed += committed - first
    counts.lost += len(lost)
    assert not lost, f"lost: {sorted(lost)[:5]}"
    added = sorted(set(found) - {*before} - {*range(first, committed)})
    assert added == list(range(committed, committed + len(added))) and len(added) <= MOST_ROWS
    counts.unfinished += bool(added)
    return found


def random_kills(kills: int, seed: int, scratch: Path) -> Counts:
    """SIGKILL from outside at random moments, `CHAIN` of them in one folder after another."""
    draw = random.Random(seed)
    counts = Counts()
    found: list[int] = []
    folder = scratch
    for kill in range(kills):
        if kill % CHAIN == 0:
            folder, found = scratch / f"random-{kill}", []
        first = 1 + max(found, default=-1)
        pid, reading = child(partial(write_like_a_session, folder, first, draw.randrange(2**32), 10**6))
        seen = wait_and_kill(pid, reading, draw)
        code, reports = ended(pid, reading, seen)
        assert code == -signal.SIGKILL, code
        counts.tried += 1
        found = check_chain(folder, first, reports, found, counts)
        if kill % CHAIN == CHAIN - 1 or kill == kills - 1:
            goes_on(folder, found)
    return counts


def wait_and_kill(pid: int, reading: int, draw: random.Random) -> bytes:
    """Kill it at a random moment of its next write, 0 to 5 writes after its start. Returns its reports so far."""
    data, times = b"", [time.monotonic()]
    for _ in range(draw.randint(0, 6)):
        data += os.read(reading, 8)
        times.append(time.monotonic())
    time.sleep(draw.random() * (times[-1] - times[-2] if len(times) > 1 else 0.003))
    os.kill(pid, signal.SIGKILL)
    return data


def goes_on(folder: Path, found: list[int]) -> None:
    """A new writer takes the folder as it was left, and everything from before is still there."""
    create_run(folder, MANIFEST)
    first = 1 + max(found, default=-1)
    ShardWriter(folder, MANIFEST, rank=0).write(rows_of(first, 3))
    assert sorted(numbers_in(folder)) == sorted([*found, *range(first, first + 3)])
    shutil.rmtree(folder)


def at_points(run: Callable[[int, bool, Points | None], int]) -> tuple[int, int]:
    """Count the points of an operation, then kill it at each one, as a crash and as a power cut: (points, kills)."""
    kills = 0
    total = run(-1, False, None)
    assert total > 8
    for power_cut in (False, True):
        for at in range(total):
            assert run(at, power_cut, Points(at)) == -signal.SIGKILL
            kills += 1
    return total, kills


def writer_at_points(scratch: Path) -> Counts:
    """The writer, killed at each point of its first start and of its start in a run that exists."""
    counts = Counts()

    def one(at: int, power_cut: bool, exists: bool) -> int:
        folder = scratch / "points"
        before: list[int] = []
        if exists:
            create_run(folder, MANIFEST)
            ShardWriter(folder, MANIFEST, rank=0).write(rows_of(0, 4))
            before = [0, 1, 2, 3]

        def work(report: Callable[[int], None]) -> None:
            points = Points(at, power_cut=power_cut)
            install(points)
            write_like_a_session(folder, len(before), seed=at, shards=3, report=report)
            if at < 0:
                report(points.count)

        pid, reading = child(work)
        code, reports = ended(pid, reading)
        if at < 0:
            assert code == 0
            shutil.rmtree(folder)
            return reports[-1]
        counts.tried += 1
        found = check_chain(folder, len(before), [one for one in reports if one >= 0], before, counts)
        goes_on(folder, found)
        return code

    for exists in (False, True):
        total, _ = at_points(lambda at, power_cut, _, exists=exists: one(at, power_cut, exists))
        counts.points["going on" if exists else "first start"] = total
    return counts


# What else makes files: complete or absent, and a second try works.


def records(folder: Path) -> Path:
    path = folder / "records.jsonl"
    lines = [
        json.dumps({"timestep": i / 40, "encoder_hidden_states": [0.25] * 2, "hidden_states": [0.5] * 3})
        for i in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def some_run(folder: Path) -> Path:
    create_run(folder / "run", MANIFEST)
    writer = ShardWriter(folder / "run", MANIFEST, rank=0)
    for part in range(3):
        writer.write(rows_of(20 * part, 20))
    return folder / "run"


def do_import(folder: Path) -> None:
    import_jsonl(records_of(folder), folder / "imported" / "run")


def records_of(folder: Path) -> Path:
    return folder / "records.jsonl"


def imported(folder: Path) -> bool:
    if not (folder / "imported" / "run").exists():
        return False
    return open_run(folder / "imported" / "run").sample_count() == 40


def do_export(folder: Path) -> None:
    export_jsonl(open_run(folder / "run"), folder / "out.jsonl")


def exported(folder: Path) -> bool:
    if not (folder / "out.jsonl").exists():
        return False
    return len([json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]) == 60


ENVIRONMENT = {"model_type": "full", "output_dir": "output/probe", "layerprobe": True}


def do_environment(folder: Path) -> None:
    environment("weighted", ENVIRONMENT, {"algo": "lokr"}, config_dir=folder / "config", force=True)


def has_environment(folder: Path) -> bool:
    """An environment is what has a config.json; where there is one, the file that it names is there too."""
    path = folder / "config" / "weighted"
    if not (path / "config.json").exists():
        return False
    options = json.loads((path / "config.json").read_bytes())
    return json.loads(Path(options["lycoris_config"]).read_bytes()) == {"algo": "lokr"}


PAGE = b"<!doctype html>" + b"x" * 5000 + b"</html>"


def do_page(folder: Path) -> None:
    replace_files(folder / "run", {"report.html": PAGE})


def has_page(folder: Path) -> bool:
    return (folder / "run" / "report.html").exists() and (folder / "run" / "report.html").read_bytes() == PAGE


@dataclass(frozen=True)
class Operation:
    """prepare: what is there before. do: what is killed. done: True if its result is there, False if nothing of it is;
    it fails on half a result."""

    prepare: Callable[[Path], object]
    do: Callable[[Path], None]
    done: Callable[[Path], bool]
    result: str


OPERATIONS = {
    "import": Operation(records, do_import, imported, "imported/run"),
    "export": Operation(some_run, do_export, exported, "out.jsonl"),
    "lokr --env": Operation(some_run, do_environment, has_environment, "config/weighted/config.json"),
    "report": Operation(some_run, do_page, has_page, "run/report.html"),
}


def operation_at_points(operation: Operation, scratch: Path) -> Counts:
    counts = Counts()

    def one(at: int, power_cut: bool, _: Points | None) -> int:
        folder = scratch / "operation"
        folder.mkdir()
        operation.prepare(folder)

        def work(report: Callable[[int], None]) -> None:
            points = Points(at, power_cut=power_cut)
            install(points)
            operation.do(folder)
            report(points.count)

        pid, reading = child(work)
        code, reports = ended(pid, reading)
        if at >= 0:
            counts.tried += 1
            is_done = operation.done(folder)
            assert is_done == (folder / operation.result).exists(), "half a result"
            counts.unfinished += not is_done
            if (folder / "run").exists():
                assert sorted(numbers_in(folder / "run")) == list(range(60))
            if not is_done:
                operation.do(folder)
        assert operation.done(folder)
        shutil.rmtree(folder)
        return reports[-1] if at < 0 else code

    counts.points["all"], _ = at_points(one)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=150, help="random kills of the writer")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="layerprobe-kills-"))
    try:
        found = {"random": random_kills(arguments.kills, arguments.seed, scratch), "points": writer_at_points(scratch)}
        for name, operation in OPERATIONS.items():
            found[name] = operation_at_points(operation, scratch)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps({name: vars(counts) for name, counts in found.items()}))


if __name__ == "__main__":
    main()
