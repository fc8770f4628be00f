"""Stream files: what is written is read back, a torn tail costs one batch, anything else is damage."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from failing import fails
from pyarrow import ipc
from synthetic_run import SD35_LARGE, manifest, read_rows, rows

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run import records, stream_file
from simpletuner_layerprobe.run.manifest import Manifest, create_run, new_run_id
from simpletuner_layerprobe.run.records import RecordWriter, stream_files
from simpletuner_layerprobe.run.rows import FACTS, UNKNOWN, Rows, image_hash
from simpletuner_layerprobe.run.stream_file import arrow_schema, batch_metadata, schema_metadata

BLOCKS = {"image": ("b.0", "b.1", "b.2"), "text": ("b.0", "b.1")}
NAME = "rank-0000-start-20260101T000000.000000Z-00000000.arrows"


def some_rows(count: int, seed: int = 0, dtype: type = np.float32) -> Rows:
    """Random rows with every fact known."""
    random = np.random.default_rng(seed)
    facts: dict[str, Any] = {
        name: random.integers(1, 100, count) for name in FACTS if name not in ("image", "dropped", "backend")
    }
    facts["image"] = random.integers(1, 2**64, count, dtype=np.uint64)
    facts["dropped"] = random.integers(0, 2, count)
    facts["backend"] = np.array(["photos", "ü" * 40, ""], object)[random.integers(0, 3, count)]
    distances = {
        (name, reading): random.random((count, len(blocks))).astype(dtype)
        for name, blocks in BLOCKS.items()
        for reading in ("last", "mean")
    }
    return rows(random.random(count), distances, facts)


def equal(left: Rows, right: Rows) -> bool:
    """Bit by bit, dtypes included."""
    assert left.columns().keys() == right.columns().keys()
    for name, column in left.columns().items():
        other = right.columns()[name]
        same = column.tolist() == other.tolist() if column.dtype == object else column.tobytes() == other.tobytes()
        if column.dtype != other.dtype or column.shape != other.shape or not same:
            return False
    return True


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path / "run", create_run(tmp_path / "run", manifest(BLOCKS))


def written(folder: Path, what: Manifest, counts: tuple[int, ...], *, close: bool = True) -> Path:
    """A stream file with batches of so many rows."""
    writer = RecordWriter(folder, what, rank=0)
    for seed, count in enumerate(counts):
        writer.write(some_rows(count, seed))
    if close:
        writer.close()
    assert writer.path is not None
    return writer.path


# Writing and reading


def test_what_is_written_is_read_back_bit_by_bit(run):
    folder, what = run
    parts = [some_rows(count, seed) for seed, count in enumerate((1, 7, 100))]
    parts[1].distances["image", "last"][0, 1] = np.nan
    parts[1].distances["text", "mean"][3, 0] = np.inf
    with RecordWriter(folder, what, rank=3) as writer:
        for number, part in enumerate(parts):
            writer.write(part, {"worst": f"{number}.5"})
    assert equal(read_rows(folder, what), Rows.concat(parts))
    (file,) = stream_files(folder, what)
    assert file.path == writer.path and (file.run_id, file.rank) == (what.run_id, 3)
    assert (file.samples, file.batches, file.torn) == (108, 3, False)
    assert file.notes == ({"worst": "0.5"}, {"worst": "1.5"}, {"worst": "2.5"})
    assert file.path.name == f"rank-0003-start-{file.start}.arrows"
    assert file.end == file.path.stat().st_size - 8  # the end mark


def test_rows_come_by_rank_then_start(run):
    folder, what = run
    parts = {}
    for number, rank in enumerate((1, 0, 1, 0)):
        with RecordWriter(folder, what, rank) as writer:
            parts[rank, number] = some_rows(number + 1, number)
            writer.write(parts[rank, number])
    assert equal(read_rows(folder, what), Rows.concat([parts[key] for key in sorted(parts)]))
    assert [(file.rank, file.samples) for file in stream_files(folder, what)] == [(0, 2), (0, 4), (1, 1), (1, 3)]


def test_a_run_without_samples(run):
    folder, what = run
    with RecordWriter(folder, what, 0) as writer:
        writer.write(some_rows(0))
    assert writer.path is None and os.listdir(folder) == ["manifest.json"]
    empty = read_rows(folder, what)
    assert equal(empty, some_rows(0)) and empty.distances["text", "last"].shape == (0, 2)


def test_a_run_is_read_in_groups_of_batches(run, monkeypatch):
    folder, what = run
    written(folder, what, (3, 4, 5, 6))
    whole = read_rows(folder, what)
    monkeypatch.setattr(stream_file, "GROUP_BYTES", 1)
    assert equal(read_rows(folder, what), whole) and len(whole) == 18


def test_float64_is_kept_in_files_of_its_own(run):
    folder, what = run
    narrow, wide = some_rows(3), some_rows(2, 1, np.float64)
    with RecordWriter(folder, what, 0) as writer:
        for part in (narrow, wide, narrow):
            writer.write(part)
    assert [file.samples for file in stream_files(folder, what)] == [3, 2, 3]
    read = read_rows(folder, what).distances["image", "last"]
    assert read.dtype == np.float64
    np.testing.assert_array_equal(
        read, np.concatenate([part.distances["image", "last"] for part in (narrow, wide, narrow)])
    )


def test_bytes_on_disk_of_sd3_5_large_with_both_readings(tmp_path):
    what = create_run(tmp_path, manifest(SD35_LARGE))
    distances = {key: np.zeros((100, len(blocks)), np.float32) for key, blocks in what.columns().items()}
    with RecordWriter(tmp_path, what, 0) as writer:
        writer.write(rows(np.zeros(100), distances))
        before = writer.path.stat().st_size
        writer.write(rows(np.zeros(100), distances))
    assert (writer.path.stat().st_size - before) / 100 < 680


def test_text_that_utf_8_cannot_hold_is_written_as_python_shows_it(run):
    folder, what = run
    part = replace(some_rows(2), facts={"backend": ["\ud800x", "ok"]})
    with RecordWriter(folder, what, 0) as writer:
        writer.write(part)
    assert read_rows(folder, what).facts["backend"].tolist() == ["\\ud800x", "ok"]


def test_facts_that_are_left_out_are_unknown():
    part = Rows(np.zeros(2), np.zeros(2, np.float32))
    assert part.facts.keys() == FACTS.keys()
    for name, fact_N in part.facts.items():
        assert fact_N.dtype == FACTS[name] and fact_N.tolist() == [UNKNOWN[name]] * 2
    with fails("the rows have the fact 'colour'; expected of image"):
        Rows(np.zeros(1), np.zeros(1, np.float32), {"colour": [1]})


def test_the_hash_of_an_image():
    assert image_hash("photos", "/a/b.png") == image_hash("photos", "/a/b.png")
    hashes = {image_hash(backend, path) for backend in ("", "a", "ab") for path in ("", "a", "b.png", "\udce4")}
    assert len(hashes) == 12 and all(0 < value < 2**64 for value in hashes)
    assert image_hash("ab", "c") != image_hash("a", "bc")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma_N": np.array([0.5, 1.5])}, "sigma holds 1.5; expected 0 to 1"),
        ({"sigma_N": np.array([0.5, np.nan])}, "sigma holds nan"),
        ({"sigma_N": np.zeros(2, np.float32)}, "sigma is float32 (2,); expected float64 (2,)"),
        ({"loss_N": np.zeros(3, np.float32)}, "loss is float32 (3,); expected float32 (2,)"),
        ({"loss_N": [0, 0]}, "loss is list"),
        ({"facts": {"width": [1, -1]}}, "width holds -1; expected at least 0"),
        ({"facts": {"text_tokens": [-2, 1]}}, "text_tokens holds -2; expected at least -1"),
        ({"facts": {"dropped": [0]}}, "dropped is int8 (1,); expected int8 (2,)"),
        ({"facts": {"backend": [b"x", "y"]}}, "backend holds something else than strings"),
        ({"distances": {}}, "the rows have distances for nothing; the manifest has image.last, image.mean, text.last"),
        (
            {"distances": some_rows(2).distances | {("image", "last"): np.zeros((2, 2), np.float32)}},
            "image.last is float32 (2, 2); expected float32 or float64 (2, 3)",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(run, change, text):
    folder, what = run
    with fails(text):
        RecordWriter(folder, what, 0).write(replace(some_rows(2), **change))
    assert os.listdir(folder) == ["manifest.json"]


def test_a_writer_is_refused_for_another_run_or_rank(run):
    folder, what = run
    with fails("holds another run: family: 'flux' here, 'sd3' in the run"):
        RecordWriter(folder, replace(what, family="flux"), 0)
    for rank in (-1, 10_000):
        with fails(f"rank {rank} cannot be written; expected 0 to 9999"):
            RecordWriter(folder, what, rank)


def test_too_many_rows_for_one_batch(run, monkeypatch):
    folder, what = run
    monkeypatch.setattr(records, "MAX_BATCH_BYTES", 1000)
    with fails("too many for one batch"):
        RecordWriter(folder, what, 0).write(some_rows(30))


# A disk that refuses


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_disk_refuses_leaves_nothing_and_the_next_goes_to_a_new_file(run):
    folder, what = run
    writer = RecordWriter(folder, what, 0)
    writer.write(some_rows(5, 0))
    first = writer.path
    size_bytes = first.stat().st_size
    with files_of_at_most(size_bytes + 500), fails(f"cannot write {first}: File too large"):
        writer.write(some_rows(50, 1))
    assert first.stat().st_size == size_bytes
    writer.write(some_rows(50, 1))
    assert writer.path != first
    writer.close()
    assert equal(read_rows(folder, what), Rows.concat([some_rows(5, 0), some_rows(50, 1)]))


def test_an_interrupt_in_the_middle_of_a_batch_is_not_written_over(run, monkeypatch):
    folder, what = run
    writer = RecordWriter(folder, what, 0)
    writer.write(some_rows(5, 0))
    write = os.write

    def half_then_interrupt(file: int, data: memoryview) -> int:
        write(file, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.write(some_rows(50, 1))
    writer.write(some_rows(50, 1))
    assert equal(read_rows(folder, what), Rows.concat([some_rows(5, 0), some_rows(50, 1)]))


def test_no_room_for_the_end_mark_loses_nothing(run):
    folder, what = run
    writer = RecordWriter(folder, what, 0)
    writer.write(some_rows(5))
    with files_of_at_most(writer.path.stat().st_size):
        writer.close()
    (file,) = stream_files(folder, what)
    assert file.samples == 5 and not file.torn


def test_a_folder_that_has_gone(run):
    folder, what = run
    writer = RecordWriter(folder, what, 0)
    (folder / "manifest.json").unlink()
    folder.rmdir()
    with fails("cannot write"):
        writer.write(some_rows(1))
    with fails("cannot list"):
        stream_files(folder, what)


# Torn, damaged, foreign


def test_a_file_cut_at_any_byte_gives_all_whole_batches(run):
    folder, what = run
    path = written(folder, what, (1, 2, 3), close=False)
    data = path.read_bytes()
    ends = batch_ends(path)
    assert len(ends) == 4 and ends[-1] == len(data)
    near = {end + step for end in (0, *ends) for step in range(-9, 10)}
    for size_bytes in sorted({*range(0, len(data), 97), *near} & {*range(len(data) + 1)}):
        path.write_bytes(data[:size_bytes])
        (file,) = stream_files(folder, what)
        batches = max(0, sum(end <= size_bytes for end in ends) - 1)
        assert file.batches == batches and file.samples == sum(range(batches + 1))
        assert file.torn == (size_bytes not in (0, *ends)), size_bytes
    path.write_bytes(data[: ends[2] + 10])
    assert equal(read_rows(folder, what), Rows.concat([some_rows(1, 0), some_rows(2, 1)]))


def batch_ends(path: Path) -> list[int]:
    """Where the schema and each batch end, as Arrow reads them."""
    ends = []
    with pa.OSFile(str(path)) as source:
        reader = ipc.open_stream(source)
        ends.append(source.tell())
        for _ in reader:
            ends.append(source.tell())
    return ends


def test_a_tail_that_did_not_get_to_the_disk_is_torn(run):
    """After a power cut a file may be as long as it should be, with zeros where nothing had been written."""
    folder, what = run
    path = written(folder, what, (1, 40, 40), close=False)
    data = path.read_bytes()
    last = batch_ends(path)[2]
    for kept in (last, last + 2, last + 300, len(data) - 600):
        path.write_bytes(data[:kept].ljust(len(data), b"\0"))
        (file,) = stream_files(folder, what)
        assert (file.torn, file.samples) == (True, 41), kept


@pytest.mark.parametrize("close", [True, False])
def test_a_flipped_bit_anywhere_is_damage(run, close):
    """Or it makes the end mark look like the beginning of a further batch; then no row is lost."""
    folder, what = run
    path = written(folder, what, (3, 4), close=close)
    data = path.read_bytes()
    whole = read_rows(folder, what)
    last = batch_ends(path)[-2]
    unnoticed = 0
    for place in range(0, len(data), 5):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            read = read_rows(folder, what)
        except RunError:
            continue
        if stream_files(folder, what)[0].torn:
            # The last batch of a file without an end mark, with another length: nobody can tell.
            assert place >= len(data) - 8 if close else last <= place < last + 1000
            continue
        unnoticed += 1
        assert equal(read, whole), place  # padding, or what Arrow does not look at
    assert unnoticed < len(data) / 5 / 4


def test_a_longer_length_in_the_middle_is_damage_not_a_torn_tail(run):
    folder, what = run
    path = written(folder, what, (3, 4, 5), close=False)
    data = bytearray(path.read_bytes())
    place = batch_ends(path)[0] + 4
    data[place : place + 4] = struct.pack("<I", 2**24)
    path.write_bytes(data)
    with fails(f"stream file {path} is damaged in batch 1 (the file ends in it)"):
        stream_files(folder, what)


def test_what_follows_behind_the_end_is_damage(run):
    folder, what = run
    path = written(folder, what, (3,))
    path.write_bytes(path.read_bytes() + b"more of it")
    with fails("is damaged in batch 2"):
        stream_files(folder, what)


def test_a_file_of_another_run_is_refused(run, tmp_path):
    folder, what = run
    other = create_run(tmp_path / "other", replace(what, run_id=new_run_id(), settings={"sigmas": "training"}))
    foreign = written(tmp_path / "other", other, (3,))
    os.rename(foreign, folder / foreign.name)
    with fails(f"{foreign.name} belongs to another run; move it out of the folder"):
        stream_files(folder, what)


def test_a_manifest_edited_by_hand_is_not_blamed_on_a_stream_file(run):
    folder, what = run
    path = written(folder, what, (3,))
    with fails(f"manifest.json and the records do not fit: it was changed after {path.name} of the same run"):
        stream_files(folder, replace(what, flavour="another"))


def test_a_file_of_the_same_kind_of_run_is_read_and_a_copy_counts_once(run, tmp_path):
    folder, what = run
    path = written(folder, what, (3, 4), close=False)
    other = create_run(tmp_path / "other", manifest(BLOCKS))
    assert other.run_id != what.run_id
    same = written(tmp_path / "other", other, (5,))
    os.rename(same, folder / same.name)
    copy = folder / NAME
    copy.write_bytes(path.read_bytes()[: batch_ends(path)[1]])
    files = stream_files(folder, what)
    assert sorted((file.run_id, file.samples) for file in files) == sorted([(what.run_id, 7), (other.run_id, 5)])
    assert len(read_rows(folder, what)) == 12


def hand_made(folder: Path, what: Manifest, batch: pa.RecordBatch, **options: Any) -> None:
    """A stream file with all checksums right, whatever is in it."""
    metadata = schema_metadata(what, 0, "20260101T000000.000000Z-00000000")
    with pa.OSFile(str(folder / NAME), "wb") as sink:
        writer = ipc.new_stream(sink, batch.schema.with_metadata(metadata), options=ipc.IpcWriteOptions(**options))
        writer.write_batch(batch, custom_metadata=batch_metadata(batch, {}))
        writer.close()


def test_batches_that_no_writer_makes_are_refused(run):
    folder, what = run
    batch = records._batch(some_rows(4), arrow_schema(what))
    hand_made(folder, what, batch)
    assert stream_files(folder, what)[0].samples == 4
    hand_made(folder, what, batch, compression="zstd")
    with fails("is damaged in batch 1 (it is compressed)"):
        stream_files(folder, what)
    hand_made(folder, what, batch.drop_columns(["loss"]))
    with fails("is damaged in its schema (it has other columns than the manifest says)"):
        stream_files(folder, what)
    for name, value, text in (
        ("sigma", pa.array([0.5, 2, 0, 0]), "holds bad rows: sigma holds 2.0; expected 0 to 1"),
        ("sigma", pa.array([0.5, None, 0, 0]), "holds bad rows: sigma has nulls"),
        ("width", pa.array([1, -1, 0, 0], pa.int32()), "holds bad rows: width holds -1"),
        ("backend", pa.array(["a", None, "", ""]), "holds bad rows: backend has nulls"),
        ("image.last", pa.array([None] * 4, pa.list_(pa.float32(), 3)), "holds bad rows: image.last has nulls"),
    ):
        number = batch.schema.get_field_index(name)
        arrays = [*batch.columns[:number], value.cast(batch.schema.field(number).type), *batch.columns[number + 1 :]]
        hand_made(folder, what, pa.RecordBatch.from_arrays(arrays, schema=batch.schema))
        with fails(text):
            read_rows(folder, what)


def test_lengths_that_claim_too_much_take_no_memory(run):
    folder, what = run
    path = written(folder, what, (3,), close=False)
    data = path.read_bytes()
    begin = batch_ends(path)[0]
    body = data.index(struct.pack("<q", len(data) - begin - 8 - struct.unpack_from("<I", data, begin + 4)[0]), begin)
    for length in (2**62, 2**31, -1):
        path.write_bytes(data[:body] + struct.pack("<q", length) + data[body + 8 :])
        with fails(f"it claims {length} bytes, at most"):
            stream_files(folder, what)
    with open(path, "wb") as file:
        file.truncate(2**40)  # all zeros, and sparse
    with fails("is damaged in its schema"):
        stream_files(folder, what)


def test_a_file_that_its_writer_takes_away_meanwhile_is_no_error(run, monkeypatch):
    folder, what = run
    written(folder, what, (2,))
    gone = folder / NAME
    gone.touch()
    listed = os.listdir(folder)
    gone.unlink()
    monkeypatch.setattr(os, "listdir", lambda _: listed)
    assert len(read_rows(folder, what)) == 2
