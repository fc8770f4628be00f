from __future__ import annotations

import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import fails
from synthetic_run import SD35_LARGE, write_run
from test_run_compact import whole
from test_run_shards import FIRST, MANIFEST, assert_same, some_rows

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.compact import compact
from simpletuner_layerprobe.run.manifest import read_manifest
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.run.records import MAX_RANK, Rows, Run, ShardWriter, create_run, open_run
from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas


def recorded(folder: Path, counts: dict[int, list[int]], seed: int, manifest: Any = MANIFEST) -> Run:
    """A run with shards of so many rows per rank, of its own random numbers."""
    create_run(folder, manifest)
    for rank, sizes in counts.items():
        for i, count in enumerate(sizes):
            ShardWriter(folder, manifest, rank).write(some_rows(count, 1000 * seed + 100 * rank + i))
    return open_run(folder)


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_two_runs_become_one(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3, 2], 2: [4]}, 1)
    b = recorded(tmp_path / "b", {0: [1, 5], 1: [2]}, 2, replace(MANIFEST, created="later", versions={"torch": "9"}))
    (tmp_path / "a" / "config.json").write_text('{"model_family": "sd3"}')
    (tmp_path / "b" / "config.json").write_text('{"model_family": "of b"}')
    before = contents(a.path, b.path)
    first, second = merge([a.path, b.path], tmp_path / "new" / "out")
    assert (first.samples, first.ranks, first.skipped) == (9, {0: 0, 2: 2}, 0)
    assert (second.samples, second.ranks, second.skipped) == (8, {0: 3, 1: 4}, 0)
    assert first.same_sigmas is None and second.same_sigmas is None
    out = open_run(tmp_path / "new" / "out")
    assert out.samples_per_rank() == {0: 5, 2: 4, 3: 6, 4: 2}
    expected = {0: whole(a)[0], 2: whole(a)[2], 3: whole(b)[0], 4: whole(b)[1]}
    for rank, rows in whole(out).items():
        assert_same(rows, expected[rank])
    assert out.manifest == a.manifest
    assert (out.path / "config.json").read_text() == '{"model_family": "sd3"}'
    assert contents(a.path, b.path) == before
    assert sorted(os.listdir(tmp_path / "new")) == ["out"]
    # It is a run like any other: it can be recorded on.
    path = ShardWriter(out.path, MANIFEST, 0).write(some_rows(1))
    assert path is not None and path.name == "rank00000-000002.safetensors"
    assert open_run(out.path).sample_count() == 18


def test_what_is_there_twice_counts_once(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3, 2, 4]}, 1)
    shutil.copytree(a.path, tmp_path / "b")  # taken to another machine,
    recorded(tmp_path / "b", {0: [5]}, 2)  # where it went on
    recorded(tmp_path / "a", {0: [6]}, 3)
    compact(tmp_path / "b")  # other files, the same rows
    a_source, b_source = merge([a.path, tmp_path / "b"], tmp_path / "out")
    assert (a_source.samples, a_source.skipped) == (15, 0)
    assert (b_source.samples, b_source.skipped) == (5, 9)
    assert open_run(tmp_path / "out").samples_per_rank() == {0: 15, 1: 5}
    # Merging it again with what it was made of adds nothing, nor does a compaction in between.
    compact(tmp_path / "out")
    found = merge([tmp_path / "out", tmp_path / "b", a.path, a.path], tmp_path / "again")
    assert [source.samples for source in found] == [20, 0, 0, 0]
    assert [source.skipped for source in found] == [0, 14, 15, 15]
    assert open_run(tmp_path / "again").sample_count() == 20


def test_a_shard_copied_within_a_run_counts_once(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3, 2]}, 1)
    shutil.copy(a.shards[0], a.path / "shards" / "rank00000-000009.safetensors")
    b = recorded(tmp_path / "b", {0: [4]}, 2)
    a_source, _ = merge([a.path, b.path], tmp_path / "out")
    assert (a_source.samples, a_source.skipped) == (5, 3)
    assert open_run(tmp_path / "out").sample_count() == 9


def test_rows_are_told_apart_by_every_column(tmp_path: Path) -> None:
    """Rows that differ in one number, or in the name of a backend alone, are not the same rows."""
    rows = some_rows(2, 1, backend_N=np.array([0, 1], np.int16))
    others = [replace(rows, **{f"{name}_N": column_N[::-1].copy()}) for name, column_N in rows.columns().items()]
    others += [replace(rows, backends=("other", "zeichnungen ü"))]
    for key in rows.distances:
        changed = rows.distances[key].copy()
        changed[1, 0] = np.nextafter(changed[1, 0], np.float32(2))
        others.append(replace(rows, distances={**rows.distances, key: changed}))
    wide: dict[Any, Any] = {key: value.astype(np.float64) for key, value in rows.distances.items()}
    others.append(replace(rows, distances=wide))
    # The same rows, though counted by another list of backends.
    same = replace(rows, backends=("x", "zeichnungen ü", "photos"), backend_N=np.array([2, 1], np.int16))

    def run_of(name: str, *parts: Rows) -> Path:
        create_run(tmp_path / name, MANIFEST)
        for part in parts:
            ShardWriter(tmp_path / name, MANIFEST, 0).write(part)
        return tmp_path / name

    different = [
        other for other in others if not np.array_equal(other.caption_dropped_N, other.caption_dropped_N[::-1])
    ]
    assert len(others) == 7 + 1 + 4 + 1 and different
    sources = merge([run_of("a", rows), run_of("b", *others), run_of("c", same)], tmp_path / "out")
    equal = sum(1 for name, column_N in rows.columns().items() if column_N[0] == column_N[1])
    assert [source.skipped for source in sources] == [0, 2 * equal, 2]


def test_runs_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [1]}, 1)
    b = recorded(tmp_path / "b", {0: [1]}, 2, replace(MANIFEST, fingerprint="ab", settings={"sigmas": "training"}))
    c = recorded(tmp_path / "c", {0: [1]}, 3)
    with fails(
        f"{b.path} is not of the same kind as {a.path} ('here'): fingerprint: '' here, 'ab' in the run; settings"
    ):
        merge([a.path, c.path, b.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_or_nothing(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3, 2]}, 1)
    b = recorded(tmp_path / "b", {0: [3, 2]}, 2)
    data = bytearray(b.shards[1].read_bytes())
    data[-1] ^= 1
    b.shards[1].write_bytes(data)
    with fails(f"{b.shards[1]} is damaged"):
        merge([a.path, b.path], tmp_path / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_where_it_may_not_go(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3]}, 1)
    b = recorded(tmp_path / "b", {0: [3]}, 2)
    before = contents(tmp_path)
    with fails("exists already and is not an empty folder; merge into a new one"):
        merge([a.path, b.path], b.path)
    with fails(f"is inside the run {a.path}; merge into a folder outside of it"):
        merge([a.path, b.path], a.path / "both")
    (tmp_path / "link").symlink_to(a.path)
    with fails("exists already"):
        merge([a.path, b.path], tmp_path / "link")
    with fails("there is 1 run to merge"):
        merge([a.path], tmp_path / "out")
    with fails("does not exist"):
        merge([a.path, tmp_path / "absent"], tmp_path / "out")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    merge([a.path, b.path], tmp_path / "empty")
    assert open_run(tmp_path / "empty").sample_count() == 6


def test_links_in_a_run_are_not_followed(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {0: [3]}, 1)
    b = recorded(tmp_path / "b", {0: [3]}, 2)
    (tmp_path / "secret").write_text("{}")
    (a.path / "config.json").symlink_to(tmp_path / "secret")
    with fails("config.json is not a plain file"):
        merge([a.path, b.path], tmp_path / "out")
    (a.path / "config.json").unlink()
    b.shards[0].rename(tmp_path / "elsewhere")
    b.shards[0].symlink_to(tmp_path / "elsewhere")
    with fails(f"{FIRST} is not a plain file"):
        merge([a.path, b.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_huge_config_is_refused(tmp_path: Path) -> None:
    a, b = (recorded(tmp_path / name, {0: [3]}, seed) for seed, name in enumerate("ab"))
    (a.path / "config.json").touch()
    os.truncate(a.path / "config.json", 2**26)
    with fails("takes 67108864 bytes; SimpleTuner's options take a few kilobytes"):
        merge([a.path, b.path], tmp_path / "out")


def test_runs_without_samples(tmp_path: Path) -> None:
    a, b = (recorded(tmp_path / name, {}, 0) for name in "ab")
    with fails("has no samples"):
        merge([a.path, b.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_names(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", {MAX_RANK: [1]}, 1)
    b = recorded(tmp_path / "b", {0: [1]}, 2)
    with fails("more than 100000 ranks"):
        merge([a.path, b.path], tmp_path / "out")
    merge([b.path, a.path], tmp_path / "out")
    assert open_run(tmp_path / "out").samples_per_rank() == {0: 1, 1: 1}


@pytest.mark.parametrize("mode", ["uniform", "stratified", "training"])
def test_the_same_seed_on_two_machines_is_noticed(tmp_path: Path, mode: str) -> None:
    """The samples differ, if only in rounding, but their sigmas are the same: say so. Not for a fixed schedule."""
    sigmas = {
        "uniform": lambda seed: uniform_sigmas(600, seed=seed, rank=0, first=0),
        "stratified": lambda seed: stratified_sigmas(np.arange(600), seed=seed),
        "training": lambda _: np.tile([0.25, 0.5, 0.75], 200),
    }[mode]
    runs = []
    for number, (seed, cuts) in enumerate([(1, [200, 450]), (2, [300]), (1, [170, 380, 500])]):
        create_run(tmp_path / f"{number}", MANIFEST)
        for part, sigma_N in enumerate(np.split(np.asarray(sigmas(seed), dtype=np.float64), cuts)):
            rows = some_rows(len(sigma_N), 10 * number + part, sigma_N=sigma_N)
            ShardWriter(tmp_path / f"{number}", MANIFEST, 0).write(rows)
        runs.append(tmp_path / f"{number}")
    sources = merge(runs, tmp_path / "out")
    assert [source.samples for source in sources] == [600, 600, 600]
    same = None if mode == "training" else runs[0]
    assert [source.same_sigmas for source in sources] == [None, None, same]


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    peaks = []
    for samples in (6000, 24_000):
        write_run(tmp_path / f"a{samples}", SD35_LARGE, samples, shards=samples // 300, seed=1)
        write_run(tmp_path / f"b{samples}", SD35_LARGE, 300, shards=2, seed=2)
        tracemalloc.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("simpletuner_layerprobe.run.packed.PACKED_BYTES", 1_000_000)
            merge([tmp_path / f"a{samples}", tmp_path / f"b{samples}"], tmp_path / f"out{samples}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[0] < 8_000_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = recorded(tmp_path / "a", {0: [3, 2]}, 1)
    b = recorded(tmp_path / "b", {0: [4]}, 2)
    shutil.copy(a.shards[0], b.path / "shards" / "rank00001-000000.safetensors")
    broken = contents(b.path)
    assert main(["merge", str(a.path), str(b.path), str(tmp_path / "out")]) == 1
    assert "was written by rank '0', its name says 1" in capsys.readouterr().err
    (b.path / "shards" / "rank00001-000000.safetensors").rename(b.path / "shards" / "rank00000-000001.safetensors")
    assert len(broken) == len(contents(b.path))
    assert main(["merge", str(a.path), str(b.path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{a.path}: 5 samples",
        f"{b.path}: 4 samples; its rank 0 is 1",
        f"9 samples merged into {tmp_path / 'out'}",
    ]
    assert said.err == (
        f"layerprobe: warning: {b.path}: 3 samples are in the runs before it or in it twice: counted once\n"
    )
    assert read_manifest(tmp_path / "out") == MANIFEST
