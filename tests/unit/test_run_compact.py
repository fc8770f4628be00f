from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import fails
from synthetic_run import SD35_LARGE, manifest, write_run
from test_run_lock import holding
from test_run_shards import FIRST, MANIFEST, assert_same, rewrite, some_rows, some_run

from simpletuner_layerprobe.analyse.bootstrap import tally
from simpletuner_layerprobe.analyse.conditions import observe
from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.analyse.settled import Stability
from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.lokr.decision import of_preset
from simpletuner_layerprobe.run import compact as module
from simpletuner_layerprobe.run import lock, packed
from simpletuner_layerprobe.run.compact import LOCK_NAME, TEMPORARY_NAME, Compaction, compact
from simpletuner_layerprobe.run.records import (
    COMPACTED_SCHEMA,
    MAX_PIECES,
    Rows,
    Run,
    ShardWriter,
    create_run,
    open_run,
    shard_name,
)

TESTS = Path(__file__).parents[1]


def whole(run: Run) -> dict[int, Rows]:
    """Rank -> all its rows in one, with the backends by name."""
    found: dict[int, Rows] = {}
    for rank in sorted(run.samples_per_rank()):
        shards = tuple(path for path in run.shards if path.name.startswith(f"rank{rank:05d}"))
        every = list(replace(run, shards=shards).rows())
        names = sorted({name for part in every for name in part.backends})
        columns: dict[str, Any] = {
            f"{name}_N": np.concatenate([part.columns()[name] for part in every]) for name in every[0].columns()
        }
        columns["backend_N"] = np.array(
            [names.index(part.backends[i]) if i >= 0 else -1 for part in every for i in part.backend_N], np.int16
        )
        keys = every[0].distances
        distances = {key: np.concatenate([part.distances[key] for part in every]) for key in keys}
        found[rank] = Rows(**columns, backends=tuple(names), distances=distances)
    return found


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "shards"))


def test_every_row_stays_the_same_in_the_same_order(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    backends = [("photos",), ("b", "photos"), (), ("c",), ("photos", "b")]
    for rank in (0, 7):
        for seed, count in enumerate([3, 1, 5, 1, 2]):
            index_N = np.full(count, len(backends[seed]) - 1, np.int16)
            rows = some_rows(count, 10 * rank + seed, backends=backends[seed], backend_N=index_N)
            ShardWriter(tmp_path, MANIFEST, rank).write(rows)
    before, settings = whole(open_run(tmp_path)), (tmp_path / "manifest.json").read_bytes()
    assert compact(tmp_path) == Compaction(before=10, after=2, removed=0)
    assert names(tmp_path) == ["rank00000-000004.safetensors", "rank00007-000004.safetensors"]
    run = open_run(tmp_path)
    assert run.samples_per_rank() == {0: 12, 7: 12}
    for rank, rows in whole(run).items():
        assert_same(rows, before[rank])
    assert (tmp_path / "manifest.json").read_bytes() == settings
    # Nothing is left to do, and nothing is touched again.
    times = [path.stat().st_mtime_ns for path in run.shards]
    assert compact(tmp_path) == Compaction(before=2, after=2, removed=0)
    assert [path.stat().st_mtime_ns for path in run.shards] == times


def test_results_stay_the_same(tmp_path: Path) -> None:
    # Stratified: ten rows in a row are drawn together then, so that the order matters.
    stratified = replace(manifest(SD35_LARGE), settings={"sigmas": "stratified"})
    create_run(tmp_path / "run", stratified)
    for number, rows in enumerate(write_run(tmp_path / "uniform", SD35_LARGE, 3000, shards=60).rows()):
        ShardWriter(tmp_path / "run", stratified, rank=number % 2).write(rows)
    run = open_run(tmp_path / "run")
    before = (heatmaps(run), tally(run).bootstrap(replicates=50), observe(run))
    assert compact(tmp_path / "run") == Compaction(60, 2, 0)
    run = open_run(tmp_path / "run")
    after = (heatmaps(run), tally(run).bootstrap(replicates=50), observe(run))
    for name in SD35_LARGE:
        np.testing.assert_allclose(after[0][name].mean_TL, before[0][name].mean_TL, rtol=1e-13)
        np.testing.assert_array_equal(after[0][name].count_T, before[0][name].count_T)
        for field in ("mean_TL", "error_TL", "deviation_RTL"):
            one, other = getattr(after[1], field)[name], getattr(before[1], field)[name]
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(after[2].streams[name].variance_TL, before[2].streams[name].variance_TL, rtol=1e-9)
    assert after[2].backends == before[2].backends


def test_a_run_grows_between_compactions(tmp_path: Path) -> None:
    some_run(tmp_path, 2, 3)
    compact(tmp_path)
    path = ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(4, 77))
    assert path is not None and path.name == "rank00000-000002.safetensors"
    before = whole(open_run(tmp_path))[0]
    assert compact(tmp_path).after == 1
    assert_same(whole(open_run(tmp_path))[0], before)
    path = ShardWriter(tmp_path, MANIFEST, 0, alone=True).write(some_rows(1))
    assert path is not None and path.name == "rank00000-000003.safetensors"


def test_large_shards_stay_and_part_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes = some_run(tmp_path / "one", 100).shards[0].stat().st_size
    for part in (module, packed):
        monkeypatch.setattr(part, "PACKED_BYTES", size_bytes + 3000)
    some_run(tmp_path / "run", 5, 5, 100, 5, 5, 90, 40, 40, 5)
    before = whole(open_run(tmp_path / "run"))[0]
    large = (tmp_path / "run" / "shards" / shard_name(0, 2)).stat()
    compact(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert [len(rows) for rows in run.rows()] == [10, 100, 10, 90, 85]
    assert max(path.stat().st_size for path in run.shards) <= size_bytes + 3000
    assert run.shards[1].stat().st_ino == large.st_ino
    assert_same(whole(run)[0], before)


def test_what_does_not_fit_into_one_file_stays_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MAX_PIECES", 3)
    monkeypatch.setattr(packed, "MAX_NAMES", 40)
    create_run(tmp_path, MANIFEST)
    writer = ShardWriter(tmp_path, MANIFEST, 0)
    wide = {key: value.astype(np.float64) for key, value in some_rows(1).distances.items()}
    for rows in [some_rows(1)] * 4 + [some_rows(1, distances=wide)] * 2 + [some_rows(1, backends=("x" * 30, "y"))] * 2:
        writer.write(rows)
    compact(tmp_path)
    assert [len(rows) for rows in open_run(tmp_path).rows()] == [3, 1, 2, 2]
    assert {rows.distances["text", "last"].dtype.name for rows in open_run(tmp_path).rows()} == {"float32", "float64"}


def test_kills_at_every_step_and_at_random_times(tmp_path: Path) -> None:
    found: dict[str, dict[str, int]] = {}
    for what, times in (("steps", 0), ("times", 60)):
        done = subprocess.run(
            [sys.executable, str(TESTS / "crashes.py"), str(tmp_path / what), what, str(times)],
            capture_output=True,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found |= json.loads(done.stdout)
    assert found["compact"]["kills"] >= 60 and found["merge"]["kills"] >= 30
    assert found["times"] | {"rows": 0, "shards": 0} == {"kills": 120, "lost": 0, "twice": 0, "rows": 0, "shards": 0}
    assert found["times"]["rows"] > 0


# Others at work meanwhile


def test_readers_and_a_writer_meanwhile(tmp_path: Path) -> None:
    """Every reading finds at least what was there before it, in order, and nothing twice."""
    create_run(tmp_path, MANIFEST)
    written, wrong, done = [0], [], threading.Event()

    def write() -> None:
        writer = ShardWriter(tmp_path, MANIFEST, 0, alone=True)
        for number in range(120):
            writer.write(some_rows(1, sigma_N=np.array([number / 1024])))
            written[0] += 1
        done.set()

    def read() -> None:
        while not done.is_set():
            least = written[0]
            run = open_run(tmp_path)
            counted = run.sample_count()
            found = [round(1024 * sigma) for rows in run.rows() for sigma in rows.sigma_N.tolist()]
            if found != list(range(len(found))) or not least <= counted == len(found):
                wrong.append((least, counted, found))

    threads = [threading.Thread(target=write), threading.Thread(target=read), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        compact(tmp_path)
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert open_run(tmp_path).sample_count() == 120


@pytest.mark.parametrize("compactions", [1, 2])
@pytest.mark.parametrize("read_before", [0, 1, 3, 6])
def test_a_reader_under_which_shards_vanish(tmp_path: Path, read_before: int, compactions: int) -> None:
    some_run(tmp_path, 1, 2, 3, 1, 2, 1)
    some_run(tmp_path, 2, 2, rank=1)
    run = open_run(tmp_path)
    before = [rows.sigma_N.tolist() for rows in run.rows()]
    rows = run.rows()
    found = [next(rows).sigma_N.tolist() for _ in range(read_before)]
    for _ in range(compactions):
        some_run(tmp_path, 4)  # written since: not a part of what the reader opened
        compact(tmp_path)
    found += [part.sigma_N.tolist() for part in rows]
    assert [*chain(*found)] == [*chain(*before)]
    assert run.sample_count() == 14 and open_run(tmp_path).sample_count() == 14 + 4 * compactions
    assert sum(len(sigma_N) for sigma_N, _ in run.distances("last")) == 14
    assert run.size_bytes() <= open_run(tmp_path).size_bytes()


def test_a_shard_that_vanished_without_a_trace_is_an_error(tmp_path: Path) -> None:
    run = some_run(tmp_path, 1, 2, 3)
    compact(tmp_path)
    ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(1))
    (tmp_path / "shards" / shard_name(0, 2)).unlink()
    with fails(f"{FIRST} is not a plain file"):
        list(run.rows())
    (tmp_path / "shards" / shard_name(0, 3)).unlink()
    with fails(f"{FIRST} is not a plain file"):
        run.sample_count()


def test_watching_a_run_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner_layerprobe.analyse.settled.COST", float("inf"))
    write_run(tmp_path / "run", SD35_LARGE, 400, shards=20)
    watch = Stability(tmp_path / "run", 0.95, lambda manifest: of_preset(manifest, None))
    watch.settled()
    assert watch.samples == 400
    compact(tmp_path / "run")
    write_run(tmp_path / "run", SD35_LARGE, 400, shards=20, seed=1)
    compact(tmp_path / "run")
    watch.settled()
    assert watch.samples == 800 == open_run(tmp_path / "run").sample_count()


# Refused, or cleaned up


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    run = some_run(tmp_path, 1, 2, 3)
    kept = [path.read_bytes() for path in run.shards]
    before = whole(run)[0]
    compact(tmp_path)
    for path, data in zip(run.shards[:2], kept, strict=False):
        path.write_bytes(data)
    (tmp_path / "shards" / TEMPORARY_NAME).write_bytes(b"half a shard")
    assert open_run(tmp_path).sample_count() == 6
    assert_same(whole(open_run(tmp_path))[0], before)
    some_run(tmp_path, 1)
    assert compact(tmp_path) == Compaction(before=4, after=1, removed=2)
    assert names(tmp_path) == [shard_name(0, 3)]


def test_a_shard_that_overlaps_is_not_removed(tmp_path: Path) -> None:
    run = some_run(tmp_path, 1, 2, 3)
    compact(tmp_path)
    other = some_run(tmp_path / "other", 2)
    run.shards[0].write_bytes(other.shards[0].read_bytes())  # index 0 again, with other rows
    with fails(f"{FIRST} holds some rows that a later one holds too, and others"):
        compact(tmp_path)
    assert names(tmp_path) == [FIRST, shard_name(0, 2)]


def test_two_at_the_same_time(tmp_path: Path) -> None:
    some_run(tmp_path, 1, 2)
    with holding(tmp_path / "shards" / LOCK_NAME), fails("is being compacted by another process; wait for it"):
        compact(tmp_path)
    assert len(open_run(tmp_path).shards) == 2
    assert compact(tmp_path).after == 1


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_run(tmp_path, 1, 2)
    monkeypatch.setattr(lock, "fcntl", None)  # as on a system without it
    with fails("cannot be locked, so it cannot be compacted safely; compact a copy"):
        compact(tmp_path)
    assert len(open_run(tmp_path).shards) == 2


def test_a_broken_shard_stops_it(tmp_path: Path) -> None:
    run = some_run(tmp_path, 1, 2, 3)
    run.shards[1].write_bytes(b"")
    kept = [path.read_bytes() for path in run.shards]
    with fails(f"{run.shards[1]} is truncated"):
        compact(tmp_path)
    assert [path.read_bytes() for path in run.shards] == kept
    assert names(tmp_path) == [path.name for path in run.shards]


def test_an_empty_run_and_no_run(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    assert compact(tmp_path) == Compaction(0, 0, 0)
    with fails("does not exist"):
        compact(tmp_path / "absent")


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    some_run(tmp_path / "run", 1, 2)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / "shards" / TEMPORARY_NAME).symlink_to(tmp_path / "precious")
    compact(tmp_path / "run")
    (tmp_path / "run" / "shards" / LOCK_NAME).symlink_to(tmp_path / "precious")
    some_run(tmp_path / "run", 1)
    with fails("cannot make the lock file"):
        compact(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


def pieces_of(shard: Path) -> str:
    with open(shard, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    text: str = header["__metadata__"]["pieces"]
    return text


def test_pieces_are_short_to_write(tmp_path: Path) -> None:
    some_run(tmp_path, 3, 2, 4, 1, 1)
    (tmp_path / "shards" / shard_name(0, 2)).unlink()
    compact(tmp_path)
    assert pieces_of(tmp_path / "shards" / shard_name(0, 4)) == "[[0,3,2],[3,1,1]]"


NO_LIST = "has no list of its pieces"
DO_NOT_FIT = "has pieces that do not fit its 3 rows"
BAD_PIECES = {
    "no JSON": ("[", NO_LIST),
    "deep": ("[" * 99999, NO_LIST),
    "an object": ("{}", NO_LIST),
    "numbers": ("[1, 2]", NO_LIST),
    "text": ('[["0", 1, 2]]', NO_LIST),
    "fractions": ("[[0, 1.5, 1.5]]", NO_LIST),
    "truths": ("[[false, true, 2]]", NO_LIST),
    "none": ("[]", NO_LIST),
    "an empty one": ("[[]]", NO_LIST),
    "negative": ("[[-1, 1, 2]]", NO_LIST),
    "huge": (f"[[{2**70}, 3]]", NO_LIST),
    "too many": (json.dumps([[0, *[0] * (MAX_PIECES + 1)]]), NO_LIST),
    "fewer rows": ("[[0, 1, 1]]", DO_NOT_FIT),
    "no rows": ("[[0, 0, 3]]", DO_NOT_FIT),
    "twice": ("[[1, 1], [1, 2]]", DO_NOT_FIT),
    "falling": ("[[1, 1], [0, 2]]", DO_NOT_FIT),
    "beyond the last": ("[[999999, 1, 2]]", DO_NOT_FIT),
    "another name's": ("[[1, 1, 2]]", "was written as shard 2, its name says 1"),
}


@pytest.mark.parametrize("how", BAD_PIECES)
def test_bad_pieces_are_refused(tmp_path: Path, how: str) -> None:
    pieces, text = BAD_PIECES[how]
    some_run(tmp_path, 1, 2)
    compact(tmp_path)
    (shard,) = open_run(tmp_path).shards
    rewrite(shard, {"pieces": pieces})
    for read in (open_run(tmp_path).sample_count, lambda: list(open_run(tmp_path).rows()), lambda: compact(tmp_path)):
        with fails(text) as found:
            read()
        assert shard.name in str(found.value)


def test_versions_without_pieces_refuse_it_by_its_schema(tmp_path: Path) -> None:
    some_run(tmp_path, 1, 2)
    compact(tmp_path)
    (shard,) = open_run(tmp_path).shards
    assert COMPACTED_SCHEMA.encode() in shard.read_bytes() and COMPACTED_SCHEMA != "1"
    rewrite(shard, {"schema": "1"})
    with fails(f"has schema '1', expected '{COMPACTED_SCHEMA}'"):
        open_run(tmp_path).sample_count()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_run(tmp_path / "run", 1, 2, 3)
    kept = (tmp_path / "run" / "shards" / FIRST).read_bytes()
    assert main(["compact", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: 3 shards before, 1 now\n"
    (tmp_path / "run" / "shards" / FIRST).write_bytes(kept)
    assert main(["compact", str(tmp_path / "run")]) == 0
    assert "2 shards (1 shard left by an interrupted compaction) before, 1 now" in capsys.readouterr().out
    assert main(["compact", str(tmp_path)]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
