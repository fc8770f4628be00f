"""Runs of several machines become one, each sample once."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from failing import fails
from synthetic_run import manifest, read_rows, rows_at
from test_run_records import BLOCKS, equal, some_rows

from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.run.manifest import create_run, new_run_id, read_manifest
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.run.rows import Rows

MANIFEST = manifest(BLOCKS)


def recorded(folder: Path, seed: int, *counts: tuple[int, int], **changes: Any) -> Path:
    """A run with a stream file for each (rank, rows), which differ by seed, rank and number."""
    what = create_run(folder, replace(MANIFEST, run_id=new_run_id(), **changes))
    for number, (rank, count) in enumerate(counts):
        with RecordWriter(folder, what, rank) as writer:
            writer.write(some_rows(count, 1000 * seed + 100 * rank + number))
    return folder


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path) -> Rows:
    return read_rows(folder, read_manifest(folder))


def sorted_rows(*folders: Path) -> Rows:
    """The rows of several runs, in an order that only their numbers decide."""
    rows = Rows.concat([rows_of(folder) for folder in folders])
    return rows_at(rows, np.argsort(rows.sigma_N))


def test_two_runs_become_one(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", 1, (0, 3), (2, 4), (0, 2))
    b = recorded(tmp_path / "b", 2, (0, 6), (1, 2), created="later", versions={"torch": "9"})
    (a / "config.json").write_text('{"model_family": "sd3"}')
    (b / "config.json").write_text('{"model_family": "of b"}')
    (a / "training.json").write_text('{"model_type": "lora"}')
    before = contents(a, b)
    first, second = merge([a, b], tmp_path / "new" / "out")
    assert (first.path, first.samples, first.skipped) == (a, 9, 0)
    assert (second.path, second.samples, second.skipped) == (b, 8, 0)
    out = load_run(tmp_path / "new" / "out")
    assert sorted((file.rank, file.samples) for file in out.files) == [(0, 2), (0, 3), (0, 6), (1, 2), (2, 4)]
    assert equal(sorted_rows(out.path), sorted_rows(a, b))
    assert out.manifest == replace(read_manifest(a), run_id=out.manifest.run_id)
    assert len({out.manifest.run_id, *(read_manifest(run).run_id for run in (a, b))}) == 3
    assert (out.path / "config.json").read_text() == '{"model_family": "sd3"}'
    assert (out.path / "training.json").read_text() == '{"model_type": "lora"}'
    assert contents(a, b) == before
    assert os.listdir(tmp_path / "new") == ["out"]
    # It is a run like any other: it can be recorded on.
    with RecordWriter(out.path, MANIFEST, 0) as writer:
        writer.write(some_rows(1))
    assert load_run(out.path).samples == 18


def test_what_is_there_twice_counts_once(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", 1, (0, 9))
    b = tmp_path / "b"
    shutil.copytree(a, b)  # taken to another machine, where it went on
    for folder, seed, count in ((b, 2, 5), (a, 3, 6)):
        with RecordWriter(folder, MANIFEST, 0) as writer:
            writer.write(some_rows(count, seed))
    first, second = merge([a, b], tmp_path / "out")
    assert (first.samples, first.skipped) == (15, 0)
    assert (second.samples, second.skipped) == (5, 9)
    assert load_run(tmp_path / "out").samples == 20
    # Merging it again with what it was made of adds nothing.
    sources = merge([tmp_path / "out", b, a, a], tmp_path / "again")
    assert [source.samples for source in sources] == [20, 0, 0, 0]
    assert [source.skipped for source in sources] == [0, 14, 15, 15]
    assert load_run(tmp_path / "again").samples == 20


def test_of_a_file_that_was_copied_while_it_grew_the_longest_is_taken(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", 1)
    writer = RecordWriter(a, MANIFEST, 0)
    writer.write(some_rows(3, 1))
    shutil.copytree(a, tmp_path / "early")
    writer.write(some_rows(4, 2))
    with open(writer.path, "ab") as file:
        file.write(b"\xff\xff\xff\xff\x20")  # and a torn tail, which stays behind
    early, late = merge([tmp_path / "early", a], tmp_path / "out")
    assert (early.samples, early.skipped, late.samples, late.skipped) == (0, 3, 7, 0)
    out = load_run(tmp_path / "out")
    assert out.samples == 7 and not out.files[0].torn


def test_files_of_one_name_are_both_taken(tmp_path: Path) -> None:
    a, b = recorded(tmp_path / "a", 1, (0, 3)), recorded(tmp_path / "b", 2, (0, 4))
    name = load_run(a).files[0].path.name
    os.rename(load_run(b).files[0].path, b / name)
    merge([a, b], tmp_path / "out")
    assert equal(sorted_rows(tmp_path / "out"), sorted_rows(a, b))


def test_runs_that_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    a = recorded(tmp_path / "a", 1, (0, 1))
    b = recorded(tmp_path / "b", 2, (0, 1), family="flux", settings={"sigmas": "training"})
    with fails("b is not of the same kind as") as error:
        merge([a, b], tmp_path / "out")
    assert "family: 'sd3' here, 'flux' in the run; settings.sigmas: absent here, 'training' in the run" in str(
        error.value
    )
    with fails("there is 1 run to merge into"):
        merge([a], tmp_path / "out")
    with fails("absent does not exist"):
        merge([a, tmp_path / "absent"], tmp_path / "out")
    with fails("lies in the run folder"):
        merge([a, a], a / "deep" / "out")
    with fails("exists already and is not an empty folder; choose a new one"):
        merge([a, a], b)
    empty = recorded(tmp_path / "empty", 3)
    with fails("none of the runs to merge into"):
        merge([empty, empty], tmp_path / "out")
    (a / "config.json").symlink_to("/dev/zero")
    with fails("config.json is not a plain file"):
        merge([a, a], tmp_path / "out")
    (a / "config.json").unlink()
    with open(a / "config.json", "wb") as file:
        file.truncate(10**12)
    with fails("SimpleTuner's options take a few kilobytes"):
        merge([a, a], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "empty"]


def test_all_or_nothing(tmp_path: Path) -> None:
    a, b = recorded(tmp_path / "a", 1, (0, 3)), recorded(tmp_path / "b", 2, (0, 4))
    data = (path := load_run(b).files[0].path).read_bytes()
    path.write_bytes(data[:900] + b"x" + data[901:])
    with fails("is damaged"):
        merge([a, b], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
