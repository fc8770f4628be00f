from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import fails, no_file_can_be_opened
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run import records as shards
from simpletuner_layerprobe.run.manifest import Manifest, Stream, read_manifest, temporary_name
from simpletuner_layerprobe.run.records import (
    MAX_HEADER_BYTES,
    MAX_SHARD_BYTES,
    Rows,
    Run,
    ShardWriter,
    create_run,
    open_run,
)

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
FIRST = "rank00000-000000.safetensors"


def some_rows(count: int, seed: int = 0, **changes: Any) -> Rows:
    random = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "sigma_N": random.random(count),
        "loss_N": random.random(count).astype(np.float32),
        "width_N": random.integers(0, 2048, count).astype(np.int32),
        "height_N": random.integers(0, 2048, count).astype(np.int32),
        "text_tokens_N": random.integers(-1, 333, count).astype(np.int32),
        "caption_dropped_N": random.integers(-1, 2, count).astype(np.int8),
        "backend_N": random.integers(-1, 2, count).astype(np.int16),
        "backends": ("photos", "zeichnungen ü"),
        "distances": {key: random.random((count, length)).astype(np.float32) for key, length in LENGTHS.items()},
    }
    return Rows(**{**values, **changes})


def some_run(folder: Path, *counts: int, rank: int = 0) -> Run:
    create_run(folder, MANIFEST)
    writer = ShardWriter(folder, MANIFEST, rank)
    for seed, count in enumerate(counts):
        writer.write(some_rows(count, seed))
    return open_run(folder)


def assert_same(left: Rows, right: Rows) -> None:
    """Equal bit by bit, dtypes included."""
    assert left.backends == right.backends
    assert left.distances.keys() == right.distances.keys()
    pairs = [(left.columns()[name], right.columns()[name]) for name in left.columns()]
    pairs += [(left.distances[key], right.distances[key]) for key in left.distances]
    for one, other in pairs:
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@st.composite
def rows_of_any_values(draw: st.DrawFn) -> Rows:
    count = draw(st.integers(1, 5))
    backends = tuple(draw(st.lists(st.text(max_size=5), max_size=3)))

    def column(dtype: Any, **limits: Any) -> Any:
        return draw(arrays.arrays(dtype, count, elements=limits or None))

    return Rows(
        sigma_N=column(np.float64, min_value=0, max_value=1),
        loss_N=column(np.float32),
        width_N=column(np.int32, min_value=0),
        height_N=column(np.int32, min_value=0),
        text_tokens_N=column(np.int32, min_value=-1),
        caption_dropped_N=column(np.int8, min_value=-1, max_value=1),
        backend_N=column(np.int16, min_value=-1, max_value=len(backends) - 1),
        backends=backends,
        distances={
            key: draw(arrays.arrays(draw(st.sampled_from([np.float32, np.float64])), (count, length)))
            for key, length in LENGTHS.items()
        },
    )


@given(st.lists(rows_of_any_values(), max_size=3))
@settings(deadline=None, max_examples=30)
def test_what_is_written_is_read_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, blocks: list[Rows]) -> None:
    folder = tmp_path_factory.mktemp("run")
    create_run(folder, MANIFEST)
    writer = ShardWriter(folder, MANIFEST, 3)
    for rows in blocks:
        writer.write(rows)
    run = open_run(folder)
    for left, right in zip(blocks, run.rows(), strict=True):
        assert_same(left, right)
    assert run.sample_count() == sum(map(len, blocks))


def test_names_ranks_counts_and_sizes(tmp_path: Path) -> None:
    some_run(tmp_path, 2, 3)
    run = some_run(tmp_path, 4, rank=1)
    names = ["rank00000-000000", "rank00000-000001", "rank00001-000000"]
    assert [path.name for path in run.shards] == [f"{name}.safetensors" for name in names]
    assert run.samples_per_rank() == {0: 5, 1: 4}
    assert run.sample_count() == 9
    run.require_samples()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert run.size_bytes() == sum(len(path.read_bytes()) for path in files)
    assert [len(rows) for rows in run.rows()] == [2, 3, 4]


def test_a_run_goes_on_without_touching_its_shards(tmp_path: Path) -> None:
    some_run(tmp_path, 2)
    shard = tmp_path / "shards" / FIRST
    before = (shard.read_bytes(), shard.stat().st_mtime_ns, shard.stat().st_ino)
    later = replace(MANIFEST, created="2027-01-01T00:00:00+00:00", versions={"torch": "3"})
    run = create_run(tmp_path, later)
    assert run.manifest == MANIFEST
    path = ShardWriter(tmp_path, later, 0).write(some_rows(1))
    assert path == tmp_path / "shards" / "rank00000-000001.safetensors"
    assert (shard.read_bytes(), shard.stat().st_mtime_ns, shard.stat().st_ino) == before
    assert open_run(tmp_path).sample_count() == 3


def test_an_index_follows_the_highest_one_also_after_a_gap(tmp_path: Path) -> None:
    run = some_run(tmp_path, 1, 1, 1)
    run.shards[1].unlink()
    path = ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(1))
    assert path is not None
    assert path.name == "rank00000-000003.safetensors"


def test_no_rows_write_nothing(tmp_path: Path) -> None:
    run = some_run(tmp_path, 0)
    assert ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(0)) is None
    assert run.shards == ()
    with fails(f"{tmp_path} has no samples"):
        run.require_samples()
    with fails("has no samples"):
        open_run(tmp_path).require_samples()


def test_columns_that_are_not_contiguous_are_written_as_they_read(tmp_path: Path) -> None:
    rows = some_rows(6)
    changes: dict[str, Any] = {f"{name}_N": column[::-2] for name, column in rows.columns().items()}
    changes["distances"] = {key: np.asfortranarray(value)[::-2] for key, value in rows.distances.items()}
    every_other = replace(rows, **changes)
    create_run(tmp_path, MANIFEST)
    ShardWriter(tmp_path, MANIFEST, 0).write(every_other)
    (read,) = open_run(tmp_path).rows()
    assert_same(read, every_other)


def test_other_files_in_the_shard_folder_are_ignored(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2)
    for name in (temporary_name(), "notes.txt", "rank0-0.safetensors", FIRST + ".bak", "x" + FIRST):
        (tmp_path / "shards" / name).write_bytes(b"half a shard")
    assert open_run(tmp_path).shards == run.shards
    assert open_run(tmp_path).sample_count() == 2


def test_two_writers_of_one_rank_lose_nothing(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)

    def write(seed: int) -> None:
        writer = ShardWriter(tmp_path, MANIFEST, 0)
        for _ in range(15):
            writer.write(some_rows(seed))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [1, 2]))
    run = open_run(tmp_path)
    assert len(run.shards) == 30
    assert run.sample_count() == 15 * 1 + 15 * 2
    assert len(os.listdir(tmp_path / "shards")) == 30


def test_a_writer_that_is_alone_lists_the_folder_once(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    alone, other = (ShardWriter(tmp_path, MANIFEST, 0, alone=one) for one in (True, False))
    taken = tmp_path / "shards" / "rank00000-000005.safetensors"
    names = [path.name for path in (alone.write(some_rows(1)),) if path]
    taken.touch()
    names += [path.name for path in (alone.write(some_rows(1)), other.write(some_rows(1))) if path]
    assert names == [FIRST, "rank00000-000001.safetensors", "rank00000-000006.safetensors"]
    (tmp_path / "shards" / "rank00000-000002.safetensors").touch()
    path = alone.write(some_rows(1))  # not so alone: it looks again, and replaces nothing
    assert path is not None and path.name == "rank00000-000007.safetensors"
    path = alone.write(some_rows(1))
    assert path is not None and path.name == "rank00000-000008.safetensors"


def test_many_ranks_make_one_run(tmp_path: Path) -> None:
    for attempt in range(10):
        folder = tmp_path / "new" / str(attempt)

        def start(rank: int, folder: Path = folder) -> None:
            create_run(folder, replace(MANIFEST, created=f"by rank {rank}"))
            ShardWriter(folder, MANIFEST, rank).write(some_rows(1))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(start, range(8)))
        assert open_run(folder).samples_per_rank() == dict.fromkeys(range(8), 1)
        assert sorted(os.listdir(folder)) == ["manifest.json", "shards"]


def test_rows_come_one_shard_at_a_time(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2, 3)
    run.shards[1].write_bytes(b"")
    rows = run.rows()
    assert len(next(rows)) == 2
    with fails(run.shards[1].name):
        next(rows)


def test_counting_reads_no_data(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2)
    rewrite(run.shards[0], sigma=np.array([2.0, np.nan]))
    assert run.sample_count() == 2
    with fails("sigma holds 2.0; expected 0 to 1"):
        list(run.rows())


# Folders that are refused


def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    some_run(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    other = replace(MANIFEST, settings={"sigmas": "training"}, family="flux")
    expected = "family: 'flux' here, 'sd3' in the run; settings.sigmas: 'training' here, 'uniform' in the run"
    with fails(expected):
        create_run(tmp_path, other)
    with fails(expected):
        ShardWriter(tmp_path, other, 0)
    assert sorted(tmp_path.rglob("*")) == before
    assert read_manifest(tmp_path) == MANIFEST


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with fails("holds other files ('photo.png') and no manifest.json"):
        create_run(tmp_path, MANIFEST)
    assert os.listdir(tmp_path) == ["photo.png"]
    with fails("is a file"):
        create_run(tmp_path / "photo.png", MANIFEST)
    with fails("cannot make the run folder"):
        create_run(tmp_path / "photo.png" / "run", MANIFEST)


def test_a_folder_left_by_a_crash_is_taken(tmp_path: Path) -> None:
    (tmp_path / temporary_name()).write_bytes(b"{")
    assert create_run(tmp_path, MANIFEST).manifest == MANIFEST


def test_a_shards_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    (tmp_path / "shards").rmdir()
    (tmp_path / "shards").touch()
    with fails("cannot make the folder"):
        create_run(tmp_path, MANIFEST)
    with fails("cannot list"):
        open_run(tmp_path)


def test_a_linked_shard_folder_is_not_followed(tmp_path: Path) -> None:
    some_run(tmp_path / "a", 1)
    create_run(tmp_path / "b", MANIFEST)
    (tmp_path / "b" / "shards").rmdir()
    (tmp_path / "b" / "shards").symlink_to(tmp_path / "a" / "shards")
    with fails("holds no links"):
        open_run(tmp_path / "b")
    with fails("holds no links"):
        ShardWriter(tmp_path / "b", MANIFEST, 0).write(some_rows(1))


def test_a_run_without_shard_folder_has_no_samples(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    (tmp_path / "shards").rmdir()
    assert open_run(tmp_path).sample_count() == 0
    with fails("cannot write"):
        ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(1))
    with fails("does not exist"):
        open_run(tmp_path / "absent")


# Rows that are refused


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sigma_N": np.array([0.5, np.nan])}, "sigma holds nan; expected 0 to 1"),
        ({"sigma_N": np.array([0.5, np.inf])}, "sigma holds inf"),
        ({"sigma_N": np.array([-1e-9, 0.5])}, "sigma holds -1e-09"),
        ({"sigma_N": np.array([0.5, 1.0000001])}, "sigma holds 1.0000001"),
        ({"sigma_N": np.zeros(2, np.float32)}, "sigma is float32 (2,); expected float64 (2,)"),
        ({"sigma_N": np.zeros((2, 1))}, "sigma is float64 (2, 1)"),
        ({"loss_N": np.zeros(2)}, "loss is float64 (2,); expected float32 (2,)"),
        ({"loss_N": np.zeros(3, np.float32)}, "loss is float32 (3,); expected float32 (2,)"),
        ({"width_N": np.array([-1, 0], np.int32)}, "width holds -1; expected at least 0"),
        ({"height_N": np.array([-1, 0], np.int32)}, "height holds -1"),
        ({"height_N": np.zeros(2, np.int64)}, "height is int64"),
        ({"text_tokens_N": np.array([-2, 0], np.int32)}, "text_tokens holds -2; expected at least -1"),
        ({"caption_dropped_N": np.array([2, 0], np.int8)}, "caption_dropped holds 2; expected -1 to 1"),
        ({"caption_dropped_N": np.zeros(2, bool)}, "caption_dropped is bool"),
        ({"backend_N": np.array([2, 0], np.int16)}, "backend holds 2; expected -1 to 1"),
        ({"backend_N": np.array([-2, 0], np.int16)}, "backend holds -2"),
        ({"backends": ["photos", "x"]}, "expected a tuple of strings"),
        ({"backends": ("photos", 1)}, "expected a tuple of strings"),
        ({"backends": ("x",) * 40_000}, "40000 data backends; expected at most 32767"),
        ({"distances": {}}, "distances for nothing; the manifest has image/last, image/mean, text/last"),
    ],
)
def test_each_bad_column_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    create_run(tmp_path, MANIFEST)
    with fails(text):
        ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(2, **changes))
    assert os.listdir(tmp_path / "shards") == []


@pytest.mark.parametrize(
    ("value_NL", "text"),
    [
        (
            np.zeros((2, 4), np.float32),
            "distance.text.mean is float32 (2, 4); expected float32 or float64 (2, 2)",
        ),
        (np.zeros((1, 2), np.float32), "distance.text.mean is float32 (1, 2)"),
        (np.zeros((2, 2), np.float16), "distance.text.mean is float16"),
    ],
)
def test_distances_of_another_shape_are_refused(value_NL: Any, text: str) -> None:
    rows = some_rows(2)
    rows.distances["text", "mean"] = value_NL
    with fails(text):
        rows.validate(MANIFEST)


def test_a_stream_that_the_manifest_lacks_is_refused() -> None:
    rows = some_rows(2)
    rows.distances["audio", "last"] = rows.distances["text", "last"]
    with fails("distances for audio/last, image/last"):
        rows.validate(MANIFEST)


def test_distances_may_be_no_numbers() -> None:
    rows = some_rows(2)
    rows.distances["image", "last"][:] = np.nan
    rows.distances["text", "last"][:] = np.inf
    rows.validate(MANIFEST)


@pytest.mark.parametrize("rank", [-1, 100_000])
def test_a_rank_that_no_name_can_hold_is_refused(tmp_path: Path, rank: int) -> None:
    create_run(tmp_path, MANIFEST)
    with fails(f"rank {rank} cannot be written"):
        ShardWriter(tmp_path, MANIFEST, rank)


def test_too_much_for_one_shard_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    wide = replace(MANIFEST, streams=(Stream("image", tuple(map(str, range(4096)))),), tokens=("last",))
    create_run(tmp_path, wide)
    count = MAX_SHARD_BYTES // (4096 * 4)
    huge_NL = np.broadcast_to(np.float32(0), (count, 4096))  # a gigabyte by its shape, four bytes in memory
    with fails("too many for one shard"):
        ShardWriter(tmp_path, wide, 0).write(some_rows(count, distances={("image", "last"): huge_NL}))
    assert os.listdir(tmp_path / "shards") == []


def test_backend_names_too_long_for_a_header_are_refused(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    with fails("too long for a shard's header"):
        ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(1, backends=("a", "x" * MAX_HEADER_BYTES)))
    assert os.listdir(tmp_path / "shards") == []


def test_the_last_index_is_the_last(tmp_path: Path) -> None:
    create_run(tmp_path, MANIFEST)
    (tmp_path / "shards" / "rank00000-999999.safetensors").touch()
    with fails("shard 999999 of rank 0, the last"):
        ShardWriter(tmp_path, MANIFEST, 0).write(some_rows(1))


# Shards that are refused


IMAGE_LAST = "distance.image.last"


def rewrite(shard: Path, metadata: Any = None, **tensors: Any) -> None:
    """Put other tensors (None: leave it out) or metadata into a shard that stays well-formed safetensors.

    It has no checksums then, as those of the first versions.
    """
    with open(shard, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    changed = {**load_file(shard), **tensors}
    save_file(
        {name: tensor for name, tensor in changed.items() if tensor is not None},
        shard,
        {**{key: value for key, value in header["__metadata__"].items() if key != "crc32"}, **(metadata or {})},
    )


def claim(shard: Path, shape: list[int], end: int) -> None:
    """A safetensors header that claims one tensor, with nothing behind it."""
    header = json.dumps({"sigma": {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header)


def as_integers(shard: Path) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data[:8] + data[8:].replace(b'"F64"', b'"I64"'))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda shard: shard.write_bytes(b""), "truncated or not safetensors"),
    "truncated": (lambda shard: os.truncate(shard, 400), "truncated or not safetensors"),
    "one byte short": (lambda shard: os.truncate(shard, shard.stat().st_size - 1), "truncated"),
    "one byte long": (lambda shard: os.truncate(shard, shard.stat().st_size + 1), "truncated"),
    "text": (lambda shard: shard.write_bytes(b"hello, world"), "is not a shard"),
    "huge header": (
        lambda shard: shard.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        "is not a shard (a header of 4611686018427387904 bytes",
    ),
    "huge tensor": (lambda shard: claim(shard, [1 << 40], 1 << 43), "truncated or not safetensors"),
    "overflowing tensor": (lambda shard: claim(shard, [1 << 62], 0), "truncated or not safetensors"),
    "unknown metadata": (lambda shard: rewrite(shard, {"crc33": "0"}), "unknown metadata 'crc33'"),
    "short checksums": (lambda shard: rewrite(shard, {"crc32": "0"}), "has 1 digits of checksums, not 96"),
    "no checksums in them": (lambda shard: rewrite(shard, {"crc32": "?" * 96}), "has 0 digits of checksums, not 96"),
    "no metadata": (lambda shard: claim(shard, [0], 0), "has schema None, expected '1'"),
    "huge file": (lambda shard: os.truncate(shard, MAX_SHARD_BYTES + 1), "at most 1073741824 are read"),
    "newer schema": (lambda shard: rewrite(shard, {"schema": "2"}), "has schema '2', expected '1'"),
    "another run's": (lambda shard: rewrite(shard, {"manifest": "00"}), "belongs to another run"),
    "another rank's": (lambda shard: rewrite(shard, {"rank": "7"}), "written by rank '7', its name says 0"),
    "backends no JSON": (lambda shard: rewrite(shard, {"backends": "["}), "no list of data backends"),
    "backends too deep": (
        lambda shard: rewrite(shard, {"backends": "[" * 99999}),
        "no list of data backends",
    ),
    "backends no list": (lambda shard: rewrite(shard, {"backends": '"ab"'}), "no list of data backends"),
    "backends no names": (lambda shard: rewrite(shard, {"backends": "[1]"}), "no list of data backends"),
    "tensor missing": (lambda shard: rewrite(shard, loss=None), "lacks the tensor 'loss'"),
    "sigma missing": (lambda shard: rewrite(shard, sigma=None), "lacks the tensor 'sigma'"),
    "tensor unknown": (lambda shard: rewrite(shard, odd=np.zeros(1)), "has an unknown tensor 'odd'"),
    "dtype": (as_integers, "has sigma as I64 [2], expected F64 [2]"),
    "no dimension": (lambda shard: rewrite(shard, sigma=np.array(0.5)), "has sigma as F64 []"),
    "length": (lambda shard: rewrite(shard, loss=np.zeros(3, np.float32)), "has loss as F32 [3]"),
    "blocks": (
        lambda shard: rewrite(shard, None, **{IMAGE_LAST: np.zeros((2, 4), np.float32)}),
        "has distance.image.last as F32 [2, 4], expected F32 or F64 [2, 3]",
    ),
    "half precision": (
        lambda shard: rewrite(shard, None, **{IMAGE_LAST: np.zeros((2, 3), np.float16)}),
        "has distance.image.last as F16 [2, 3]",
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_shard_is_refused_by_name(tmp_path: Path, how: str) -> None:
    spoil, text = BREAKS[how]
    run = some_run(tmp_path, 2)
    spoil(run.shards[0])
    for read in (lambda: list(run.rows()), run.sample_count):
        with fails(text) as found:
            read()
        assert FIRST in str(found.value)
        assert "move it out" in str(found.value)


def test_a_flipped_bit_in_any_byte_is_noticed(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2)
    list(run.rows())
    data = run.shards[0].read_bytes()
    with open(run.shards[0], "r+b", buffering=0) as file:
        for place, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(ProbeError, match=FIRST):
                list(run.rows())
            os.pwrite(file.fileno(), bytes([byte]), place)
    list(run.rows())


def test_a_flipped_bit_is_noticed_also_when_only_its_column_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 3)
    run = some_run(tmp_path, 10)
    assert sum(len(sigma_N) for sigma_N, _ in run.distances("last")) == 10
    data = bytearray(run.shards[0].read_bytes())
    width = struct.pack("<I", struct.unpack("<I", load_file(run.shards[0])["width"][:1].tobytes())[0])
    data[data.index(width, 8)] ^= 1
    run.shards[0].write_bytes(data)
    list(run.distances("last"))  # reads no width
    with fails("is damaged (the checksum of width does not fit its bytes)"):
        list(run.rows())
    value = load_file(run.shards[0])[IMAGE_LAST][9, 2:].tobytes()
    data[data.index(value, 8)] ^= 1
    run.shards[0].write_bytes(data)
    assert len(list(run.distances("mean"))) == 4
    with fails(f"is damaged (the checksum of {IMAGE_LAST} does not fit its bytes)"):
        list(run.distances("last"))


def test_shards_of_the_first_versions_have_no_checksums(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2, 3)
    before = list(run.rows())
    rewrite(run.shards[0])
    for left, right in zip(before, run.rows(), strict=True):
        assert_same(left, right)


def test_equal_rows_make_equal_files_that_safetensors_reads(tmp_path: Path) -> None:
    (first,), (second,) = (some_run(tmp_path / name, 4).shards for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    (rows,) = open_run(tmp_path / "a").rows()
    read = load_file(first)
    expected = rows.columns() | {shards.tensor_name(*key): value for key, value in rows.distances.items()}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].tobytes()) == (tensor.dtype, tensor.tobytes())
    with safe_open(first, "numpy") as file:
        digits = file.metadata()["crc32"]
    in_order = [expected[name] for name in sorted(expected)]
    assert digits[8:] == "".join(f"{zlib.crc32(one.tobytes()):08x}" for one in in_order)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("sigma", np.array([0.0, 1.5]), "holds bad rows: the rows' sigma holds 1.5"),
        ("backend", np.array([0, 9], np.int16), "holds bad rows: the rows' backend holds 9"),
        ("width", np.array([-5, 9], np.int32), "holds bad rows: the rows' width holds -5"),
    ],
)
def test_bad_values_in_a_shard_are_refused(tmp_path: Path, name: str, values: Any, text: str) -> None:
    run = some_run(tmp_path, 2)
    rewrite(run.shards[0], **{name: values})
    with fails(text):
        list(run.rows())


def test_a_shard_that_the_system_does_not_open(tmp_path: Path) -> None:
    run = some_run(tmp_path, 2)
    with fails(f"{FIRST} cannot be read: Too many open files"), no_file_can_be_opened():
        run.sample_count()


def test_a_shard_of_another_run_is_refused(tmp_path: Path) -> None:
    run = some_run(tmp_path / "a", 1)
    other = replace(MANIFEST, settings={"sigmas": "training"})
    create_run(tmp_path / "b", other)
    shard = ShardWriter(tmp_path / "b", other, 1).write(some_rows(1))
    assert shard is not None
    shard.rename(tmp_path / "a" / "shards" / shard.name)
    with fails("rank00001-000000.safetensors belongs to another run"):
        open_run(tmp_path / "a").sample_count()
    assert run.sample_count() == 1


def test_a_shard_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    run = some_run(tmp_path / "run", 1)
    shard = run.shards[0]
    shard.rename(tmp_path / "elsewhere")
    with fails("not a plain file"):  # it went away after the run was opened
        list(run.rows())
    shard.symlink_to(tmp_path / "elsewhere")
    with fails("not a plain file"):
        list(run.rows())
    shard.unlink()
    shard.mkdir()
    with fails("not a plain file"):
        run.sample_count()
    with fails("not a plain file"):
        run.size_bytes()
