"""The shards: the recorded rows, in immutable safetensors files, one writer per rank.

A run folder holds `manifest.json` and `shards/rank00000-000000.safetensors` (rank, then index). A shard is
written to a temporary name, then linked to its final one, and never touched again. Other names in `shards/`
are ignored. A shard that `compact` made holds several of those that were written, its *pieces*: see `compact.py`.
The metadata's `crc32` has eight hex digits for the header (with zeros in their place) and for each tensor
by name; a shard of an older version has none.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    RunPath,
    is_temporary,
    plain_file_size,
    read_manifest,
    write_manifest,
    write_new_file,
)

SHARDS_NAME = "shards"
MAX_RANK = 99_999
MAX_INDEX = 999_999
MAX_SHARD_BYTES = 1024 * 1024 * 1024  # a reader holds one whole shard
MAX_HEADER_BYTES = 1024 * 1024
MAX_BACKENDS = 32_767  # what an int16 can count
MAX_PIECES = 20_000  # of a compacted shard: its header takes about 100 kB then
COMPACTED_SCHEMA = f"{SCHEMA_VERSION}-compacted"  # versions that do not know such shards refuse them by it
BLOCK_ROWS = 2048  # rows that `Run.distances` holds at once
ROWS_AT_ONCE = 16_384  # rows that `Run.rows` holds at once
_START_BYTES = 16 * 1024  # read at once: a shard's header takes about 1 KB

_SHARD_NAME = re.compile(r"rank(\d{5})-(\d{6})\.safetensors")

# Column -> dtype, and safetensors' name for it.
_COLUMNS: dict[str, tuple[type[np.generic], str]] = {
    "sigma": (np.float64, "F64"),
    "loss": (np.float32, "F32"),
    "width": (np.int32, "I32"),
    "height": (np.int32, "I32"),
    "text_tokens": (np.int32, "I32"),
    "caption_dropped": (np.int8, "I8"),
    "backend": (np.int16, "I16"),
}
_DISTANCE_DTYPES = ("F32", "F64")
_METADATA = {"schema", "rank", "manifest", "backends", "pieces", "crc32"}
_CHECKSUMS = re.compile(rb'"crc32":"([0-9a-f]*)"')
_CHECKSUM_DIGITS = 8
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for dtype, name in _COLUMNS.values()}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Pieces = dict[int, set[int]]
"""Rank -> indices under which its writer wrote rows, each of them once."""


@dataclass(frozen=True)
class Rows:
    """N recorded samples, all numpy.

    sigma_N: float64 in [0, 1]. loss_N: float32, NaN if unknown. width_N, height_N: int32 pixels, 0 if
    unknown. text_tokens_N: int32 valid text tokens, -1 if unknown. caption_dropped_N: int8, 1 or 0, -1 if
    unknown. backend_N: int16 index into `backends` (data backend ids), -1 if unknown. distances: (stream,
    reading), such as ("image", "last"), -> (N, L) angular distances, or what a further reading gives (a pair over n
    blocks: N x (L - n + 1)), float32, or float64 where float32 would change a value; NaN and infinity are allowed
    here and counted by whoever averages.
    """

    sigma_N: NDArray[np.float64]
    loss_N: NDArray[np.float32]
    width_N: NDArray[np.int32]
    height_N: NDArray[np.int32]
    text_tokens_N: NDArray[np.int32]
    caption_dropped_N: NDArray[np.int8]
    backend_N: NDArray[np.int16]
    backends: tuple[str, ...]
    distances: dict[tuple[str, str], NDArray[np.float32] | NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.sigma_N)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The (N,) columns by the name that they have in a shard."""
        return {name: getattr(self, f"{name}_N") for name in _COLUMNS}

    def where(self, kept: NDArray[np.bool_] | slice) -> Rows:
        """Some of the rows, in their order, with all the backends."""
        return Rows(
            **{f"{name}_N": column_N[kept] for name, column_N in self.columns().items()},
            backends=self.backends,
            distances={key: distance_NL[kept] for key, distance_NL in self.distances.items()},
        )

    def nonfinite(self) -> int:
        """How many of the samples have a distance that is NaN or infinite."""
        finite_N = np.ones(len(self), dtype=np.bool_)
        for distance_NL in self.distances.values():
            finite_N &= np.isfinite(distance_NL).all(axis=1)
        return int(np.count_nonzero(~finite_N))

    def validate(self, manifest: Manifest) -> None:
        """Check shapes, dtypes and ranges against the manifest; ProbeError for the first that is wrong."""
        columns = self.columns()
        for name, (dtype, _) in _COLUMNS.items():
            _check_array(name, columns[name], (dtype,), (len(self.sigma_N),))
        sizes = stream_sizes(manifest)
        if self.distances.keys() != sizes.keys():
            raise ProbeError(f"the rows have distances for {_keys(self.distances)}; the manifest has {_keys(sizes)}")
        for key, blocks in sizes.items():
            _check_array(tensor_name(*key), self.distances[key], (np.float32, np.float64), (len(self), blocks))
        if not isinstance(self.backends, tuple) or not all(isinstance(name, str) for name in self.backends):
            raise ProbeError(f"the rows' backends are {self.backends!r:.80}; expected a tuple of strings")
        if len(self.backends) > MAX_BACKENDS:
            raise ProbeError(f"the rows name {len(self.backends)} data backends; expected at most {MAX_BACKENDS}")
        _check_range("sigma", self.sigma_N, 0, 1)
        _check_range("width", self.width_N, 0, None)
        _check_range("height", self.height_N, 0, None)
        _check_range("text_tokens", self.text_tokens_N, -1, None)
        _check_range("caption_dropped", self.caption_dropped_N, -1, 1)
        _check_range("backend", self.backend_N, -1, len(self.backends) - 1)


class ShardWriter:
    """Writes the rows of one rank, each block of rows as one new shard. The run must exist (`create_run`).

    alone: nobody else writes shards of this rank meanwhile (see lock.py), so that it is enough to list the folder once.
    Raises ProbeError if the run in the folder has another manifest, or the rank is outside [0, 99999].
    """

    def __init__(self, run_dir: RunPath, manifest: Manifest, rank: int, *, alone: bool = False) -> None:
        if not 0 <= rank <= MAX_RANK:
            raise ProbeError(f"rank {rank} cannot be written; expected 0 to {MAX_RANK}")
        self.manifest = read_manifest(run_dir)
        _check_same(Path(run_dir), manifest, self.manifest)
        self.rank = rank
        self.folder = Path(run_dir) / SHARDS_NAME
        self._identity = self.manifest.identity()
        self._alone = alone
        self._next: int | None = None

    def write(self, rows: Rows) -> Path | None:
        """Write `rows` as a new shard and return its path; no rows write nothing and return None.

        The shard is on the disk, complete, when this returns. Raises ProbeError for rows that do not fit the
        manifest, rows too many for one shard, or a disk that refuses.
        """
        rows.validate(self.manifest)
        if not len(rows):
            return None
        parts = shard_parts(rows, self.rank, self._identity)
        while True:
            index = self._next if self._next is not None else self._free_index()
            if index > MAX_INDEX:
                raise ProbeError(
                    f"{self.folder} has shard {MAX_INDEX} of rank {self.rank}, the last; use another folder"
                )
            path = self.folder / shard_name(self.rank, index)
            try:
                write_new_file(path, lambda file: file.writelines(parts))
            except FileExistsError:
                self._next = None  # somebody took the name in between; a writer replaces no shard
                continue
            self._next = index + 1 if self._alone else None
            return path

    def _free_index(self) -> int:
        """One above the highest: indices are not used twice, whatever was taken away below the highest."""
        return 1 + max((index for _, rank, index in _names(self.folder) if rank == self.rank), default=-1)


@dataclass(frozen=True)
class Run:
    """A run folder as it was when it was opened. `shards` are its shards' paths, by rank, then index.

    Somebody may compact the run while it is read, also more than once: every row is still given out once.
    """

    path: Path
    manifest: Manifest
    shards: tuple[Path, ...]

    def rows(self, seen: Pieces | None = None) -> Iterator[Rows]:
        """The rows, by rank, then as they were written: of one shard at a time, and at most ROWS_AT_ONCE.

        seen: pieces to leave out; those that were given out are added. Raises ProbeError naming a shard that is broken
        or another run's.
        """
        for shard, kept_N in self.open_shards({} if seen is None else seen):
            for start in range(0, shard.header.count, ROWS_AT_ONCE):
                rows = shard.rows(self.manifest, start, ROWS_AT_ONCE)
                yield rows if kept_N is None else rows.where(kept_N[start : start + ROWS_AT_ONCE])

    def distances(self, tokens: str) -> Iterator[tuple[NDArray[np.float64], dict[str, NDArray[Any]]]]:
        """(sigma_N, stream -> (N, columns)) of one reading, at most BLOCK_ROWS samples at a time.

        A run is thousands of small shards, or a few large ones: both are read in blocks, and nothing but these columns
        is read. Raises ProbeError naming a shard that is broken or another run's.
        """
        streams = [name for name, reading in stream_sizes(self.manifest) if reading == tokens]
        waiting: list[list[NDArray[Any]]] = []
        count = 0
        for columns in self._blocks(["sigma", *(tensor_name(stream, tokens) for stream in streams)]):
            if waiting and count + len(columns[0]) > BLOCK_ROWS:
                yield _joined(waiting, streams)
                waiting, count = [], 0
            waiting.append(columns)
            count += len(columns[0])
        if waiting:
            yield _joined(waiting, streams)

    def _blocks(self, names: list[str]) -> Iterator[list[NDArray[Any]]]:
        """These tensors' rows, sigma the first of them, in pieces of one shard of at most BLOCK_ROWS rows."""
        for shard, kept_N in self.open_shards({}):
            for start in range(0, shard.header.count, BLOCK_ROWS):
                columns = [shard.read(name, start, BLOCK_ROWS) for name in names]
                try:
                    _check_range("sigma", columns[0], 0, 1)
                except ProbeError as error:
                    raise _bad_rows(shard.path, error) from None
                if kept_N is not None:
                    columns = [column[kept_N[start : start + BLOCK_ROWS]] for column in columns]
                yield columns

    @cached_property
    def _key(self) -> tuple[str, dict[tuple[str, str], int]]:
        return self.manifest.identity(), stream_sizes(self.manifest)

    def open(self, path: Path) -> AbstractContextManager[Shard]:
        """One of its shards, opened to be read. Raises ProbeError if it is broken or another run's."""
        return _open_shard(path, *self._key)

    def open_shards(self, seen: Pieces) -> Iterator[tuple[Shard, NDArray[np.bool_] | None]]:
        """The shards in order, each open, with the rows (N,) that count, None for all of them; none without any.

        A piece counts where it is met first, if it is not in `seen`, and is added to it. A shard that has gone since
        the run was opened was compacted: its pieces are then in a later one of its rank, maybe a new one, of which
        nothing counts that was written since.
        """
        last = dict(rank_and_index(path) for path in self.shards)
        waiting = deque(self.shards)
        gone: list[tuple[int, ProbeError]] = []
        while waiting:
            path = waiting.popleft()
            rank, index = rank_and_index(path)
            mine = seen.setdefault(rank, set())
            if index in mine:
                continue
            with ExitStack() as stack:
                try:
                    shard = stack.enter_context(self.open(path))
                except ProbeError as error:
                    if os.path.lexists(path):
                        raise
                    later = [other for other, its_rank, i in _list(path.parent) if its_rank == rank and i > index]
                    if not later:
                        raise
                    gone.append((index, error))
                    while waiting and rank_and_index(waiting[0])[0] == rank:
                        waiting.popleft()
                    waiting.extendleft(reversed(later))
                    continue
                index_P, rows_P = shard.pieces()
                for missing, its_error in gone:
                    if missing not in index_P:
                        raise its_error
                gone.clear()
                new_P = index_P <= last[rank]
                if not mine.isdisjoint(index_P.tolist()):
                    new_P &= ~np.isin(index_P, list(mine))
                if new_P.any():
                    yield shard, None if new_P.all() else np.repeat(new_P, rows_P)
                    mine.update(index_P[new_P].tolist())
        if gone:
            raise gone[0][1]

    def sample_count(self, seen: Pieces | None = None) -> int:
        """Number of samples, from the shards' headers alone, but those of `seen`. Raises ProbeError as `rows` does."""
        return sum(self.samples_per_rank(seen).values())

    def samples_per_rank(self, seen: Pieces | None = None) -> dict[int, int]:
        """Rank -> number of its samples, as `sample_count` counts them. Raises ProbeError as `rows` does."""
        counts: dict[int, int] = {}
        for shard, kept_N in self.open_shards({rank: set(indices) for rank, indices in (seen or {}).items()}):
            rank, _ = rank_and_index(shard.path)
            count = shard.header.count if kept_N is None else int(kept_N.sum())
            counts[rank] = counts.get(rank, 0) + count
        return counts

    def distance_dtypes(self) -> dict[tuple[str, str], np.dtype[Any]]:
        """(stream, reading) -> the dtype that holds its distances in every shard, from the shards' headers alone.

        float32 where there is no shard. Raises ProbeError as `rows` does.
        """
        dtypes = dict.fromkeys(stream_sizes(self.manifest), np.dtype(np.float32))
        for shard, _ in self.open_shards({}):
            for key in dtypes:
                dtypes[key] = np.promote_types(dtypes[key], shard.header.tensors[tensor_name(*key)][0])
        return dtypes

    def size_bytes(self) -> int:
        """Bytes on disk of the manifest and of those shards that are still there."""
        shards = (path for path in self.shards if os.path.lexists(path))
        return sum(plain_file_size(path) for path in (self.path / MANIFEST_NAME, *shards))

    def require_samples(self) -> None:
        """Raises ProbeError if the run has no samples."""
        if not self.sample_count():
            raise ProbeError(f"{self.path} has no samples; let the probe run record some, or import a file")


def open_run(run_dir: RunPath) -> Run:
    """The run in `run_dir`; reads the manifest and lists the shards. Raises ProbeError if it is not a run."""
    path = Path(run_dir)
    manifest = read_manifest(path)
    return Run(path, manifest, tuple(shard for shard, _, _ in _list(path / SHARDS_NAME)))


def create_run(run_dir: RunPath, manifest: Manifest) -> Run:
    """Make the run folder, or open it to go on if it holds a run with the same manifest.

    Several ranks may call this at the same time. Raises ProbeError, and changes nothing, if the folder holds
    a run with another manifest (naming the differences) or something else than a run.
    """
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Another rank may be at it: its manifest comes first, before it only its temporary file.
        foreign = sorted(name for name in os.listdir(path) if name != MANIFEST_NAME and not is_temporary(name))
    except FileExistsError:
        raise ProbeError(f"{path} is a file; expected a folder for the run, or a name that is free") from None
    except OSError as error:
        raise ProbeError(f"cannot make the run folder {path}: {error.strerror}") from None
    if not os.path.lexists(path / MANIFEST_NAME):
        if foreign:
            raise ProbeError(
                f"{path} holds other files ({foreign[0]!r:.80}) and no {MANIFEST_NAME}; choose a new folder"
            )
        with suppress(FileExistsError):  # another rank was faster; its manifest is compared like any other
            write_manifest(path, manifest)
    _check_same(path, manifest, read_manifest(path))
    shards = path / SHARDS_NAME
    try:
        shards.mkdir(exist_ok=True)
    except OSError as error:
        raise ProbeError(f"cannot make the folder {shards}: {error.strerror}") from None
    return open_run(path)


def shard_name(rank: int, index: int) -> str:
    return f"rank{rank:05d}-{index:06d}.safetensors"


def tensor_name(stream: str, tokens: str) -> str:
    """The name in a shard of one stream's distances in one reading."""
    return f"distance.{stream}.{tokens}"


def stream_sizes(manifest: Manifest) -> dict[tuple[str, str], int]:
    """(stream, reading) -> number of columns, for everything that rows of this manifest must have."""
    return {
        (stream.name, reading.name): len(reading.columns(stream.blocks))
        for stream in manifest.streams
        for reading in manifest.readings(stream)
    }


@dataclass(frozen=True)
class _Header:
    """What a shard's header says. tensors: name -> (dtype, shape, first byte in the file). checked: has checksums.

    pieces: index and rows of each piece of a compacted shard, (P, 2) int64; None if it is one piece.
    """

    count: int
    backends: tuple[str, ...]
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    checked: bool
    pieces: NDArray[np.int64] | None


@dataclass(frozen=True)
class Shard:
    """An open shard whose header says that it is one of this run's. crc32: tensor -> checksum, {} if it has none."""

    path: Path
    file: BinaryIO
    header: _Header
    crc32: Mapping[str, int]
    _sums: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, name: str, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """Rows [start, start + count) of a tensor, all from `start` on without a count.

        Raises ProbeError if the tensor's last rows have been read, all others before them in order, and its bytes are
        not those that were written.
        """
        dtype, shape, offset = self.header.tensors[name]
        rows = shape[0] - start if count is None else min(count, shape[0] - start)
        values = np.empty((rows, *shape[1:]), dtype)
        if values.nbytes:
            self.file.seek(offset + start * values.nbytes // rows)
            if self.file.readinto(memoryview(values).cast("B")) != values.nbytes:  # type: ignore[attr-defined]
                raise _broken(self.path, "is truncated or not safetensors (it became shorter while it was read)")
        if self.crc32:
            row, checksum = self._sums.get(name, (0, 0))
            if row == start:
                checksum = zlib.crc32(values.data.cast("B") if values.nbytes else b"", checksum)
                self._sums[name] = (start + rows, checksum)
                if start + rows == shape[0] and checksum != self.crc32[name]:
                    raise _broken(self.path, f"is damaged (the checksum of {name} does not fit its bytes)")
        return values

    def rows(self, manifest: Manifest, start: int = 0, count: int | None = None) -> Rows:
        """Rows [start, start + count), checked. Raises ProbeError as `read` does, and for bad values."""
        rows = Rows(
            **{f"{name}_N": self.read(name, start, count) for name in _COLUMNS},
            backends=self.header.backends,
            distances={key: self.read(tensor_name(*key), start, count) for key in stream_sizes(manifest)},
        )
        try:
            rows.validate(manifest)
        except ProbeError as error:
            raise _bad_rows(self.path, error) from None
        return rows

    def pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(index_P, rows_P): under which indices its rows were written, in order, and how many each."""
        if self.header.pieces is None:
            return np.array([rank_and_index(self.path)[1]]), np.array([self.header.count])
        return self.header.pieces[:, 0], self.header.pieces[:, 1]


@contextmanager
def _open_shard(path: Path, identity: str, sizes: dict[tuple[str, str], int]) -> Iterator[Shard]:
    plain_file_size(path)
    try:
        with open(path, "rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size  # of this file: a compaction may put another in its place
            if size_bytes > MAX_SHARD_BYTES:
                raise _broken(path, f"takes {size_bytes} bytes, at most {MAX_SHARD_BYTES} are read")
            start = file.read(_START_BYTES)
            header_bytes = _header_bytes(start)
            if header_bytes > MAX_HEADER_BYTES:
                raise _broken(path, f"is not a shard (a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES})")
            if len(start) < 8 + header_bytes:
                start += file.read(8 + header_bytes - len(start))
            rank, index = rank_and_index(path)
            try:
                data, checksums = _without_checksums(start[8 : 8 + header_bytes])
                header = _header(data, size_bytes, rank, identity, tuple(sizes.items()))
                crc32 = _named_checksums(data, checksums, header)
                if header.pieces is not None and header.pieces[-1, 0] != index:
                    raise ValueError(f"was written as shard {header.pieces[-1, 0]}, its name says {index}")
            except ValueError as error:
                raise _broken(path, str(error)) from None
            yield Shard(path, file, header, crc32)
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror or error}") from None


def shard_parts(
    rows: Rows, rank: int, identity: str, pieces: NDArray[np.int64] | None = None
) -> list[bytes | memoryview]:
    """The file of a shard with these checked rows, in pieces of bytes. pieces: (P, 2) index and rows, if compacted.

    Raises ProbeError if they are too many for one shard.
    """
    tensors = rows.columns()
    tensors |= {tensor_name(*key): distance_NL for key, distance_NL in rows.distances.items()}
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if size_bytes > MAX_SHARD_BYTES - MAX_HEADER_BYTES:
        raise ProbeError(f"{len(rows)} rows take {size_bytes} bytes, too many for one shard; write fewer at a time")
    metadata = {
        "schema": str(SCHEMA_VERSION) if pieces is None else COMPACTED_SCHEMA,
        "rank": str(rank),
        "manifest": identity,
        "backends": json.dumps(rows.backends),
    }
    if pieces is not None:
        metadata["pieces"] = _pieces_text(pieces)
    parts = _file_parts({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata)
    if len(parts[0]) > MAX_HEADER_BYTES:
        raise ProbeError(f"the names of {len(rows.backends)} data backends are too long for a shard's header")
    return parts


def _file_parts(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file of these contiguous tensors, in pieces, the header first. The same input, the same bytes.

    The format wants wide numbers first, so that all lie at multiples of their size. (safetensors' own writer puts the
    metadata into another order every time.)
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    flat: dict[str, memoryview] = {name: tensors[name].data.cast("B") for name in order}
    header: dict[str, Any] = {"__metadata__": {**metadata, "crc32": "0" * _CHECKSUM_DIGITS * (1 + len(order))}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    checksums = "".join(f"{one:08x}" for one in [zlib.crc32(data), *(zlib.crc32(flat[name]) for name in sorted(order))])
    data = _CHECKSUMS.sub(f'"crc32":"{checksums}"'.encode(), data, count=1)
    return [len(data).to_bytes(8, "little") + data, *flat.values()]


def _without_checksums(data: bytes) -> tuple[bytes, bytes]:
    """(the header with zeros in place of its checksums, the checksums); the second is b"" where there are none."""
    found = _CHECKSUMS.search(data)
    if found is None:
        return data, b""
    begin, end = found.span(1)
    return data[:begin] + b"0" * (end - begin) + data[end:], found[1]


def _named_checksums(data: bytes, checksums: bytes, header: _Header) -> dict[str, int]:
    """Tensor -> checksum, {} for a shard without. Raises ValueError if they are not whole or the header's is wrong."""
    if not header.checked:
        return {}
    digits = _CHECKSUM_DIGITS
    if len(checksums) != digits * (1 + len(header.tensors)):
        raise ValueError(f"has {len(checksums)} digits of checksums, not {digits * (1 + len(header.tensors))}")
    values = [int(checksums[i : i + digits], 16) for i in range(0, len(checksums), digits)]
    if zlib.crc32(data) != values[0]:
        raise ValueError("is damaged (the checksum of its header does not fit)")
    return dict(zip(sorted(header.tensors), values[1:], strict=True))


# But for the checksums, the shards of a run have equal headers wherever they have as many rows.
@lru_cache(maxsize=64)
def _header(
    data: bytes, size_bytes: int, rank: int, identity: str, sizes: tuple[tuple[tuple[str, str], int], ...]
) -> _Header:
    """The checked header of a shard file of `size_bytes` bytes. Raises ValueError saying what is wrong with it."""
    metadata, tensors = _parse_header(data, size_bytes)
    backends = _checked_metadata(metadata, rank, identity)
    count = _checked_count(tensors, dict(sizes))
    return _Header(
        backends=backends,
        count=count,
        pieces=_checked_pieces(metadata, count),
        checked="crc32" in metadata,
        tensors={
            name: (_DTYPES[dtype], tuple(shape), 8 + len(data) + begin)
            for name, (dtype, shape, begin) in tensors.items()
        },
    )


def _parse_header(data: bytes, size_bytes: int) -> tuple[dict[str, str], dict[str, tuple[str, list[int], int]]]:
    """(metadata, name -> (dtype, shape, first byte)) of a safetensors header, with the format's own checks.

    Read here and not by safetensors, which takes several times longer for a shard of a few dozen rows. The tensors
    must fill the file without gap or overlap. Raises ValueError.
    """
    try:
        header = json.loads(data)
        metadata = header.pop("__metadata__", {})
        entries = sorted((*map(int, entry["data_offsets"]), name, entry) for name, entry in header.items())
        tensors = {
            name: (str(entry["dtype"]), list(map(int, entry["shape"])), begin) for begin, _, name, entry in entries
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"is truncated or not safetensors ({error})") from None
    if not isinstance(metadata, dict):
        raise ValueError("is truncated or not safetensors (its metadata is no object)")
    position = 0
    for begin, end, name, _ in entries:
        dtype, shape, _ = tensors[name]
        item_bytes = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
        if begin != position or min(shape, default=0) < 0:
            raise ValueError(f"is truncated or not safetensors ({name!r:.80} is at byte {begin}, not {position})")
        if end < begin or (item_bytes is not None and end - begin != math.prod(shape) * item_bytes):
            raise ValueError(f"is truncated or not safetensors ({name!r:.80} takes {end - begin} bytes)")
        position = end
    if 8 + len(data) + position != size_bytes:
        raise ValueError(
            f"is truncated or not safetensors (it has {size_bytes} bytes, its header says {8 + len(data) + position})"
        )
    return metadata, tensors


def _checked_metadata(metadata: dict[str, str], named_rank: int, identity: str) -> tuple[str, ...]:
    """The data backends, once the metadata says that this is a shard of this run and of its name's rank."""
    unknown = sorted(metadata.keys() - _METADATA)
    if unknown:
        raise ValueError(f"has unknown metadata {unknown[0]!r:.80}; it is damaged or of a newer version")
    schema, rank = metadata.get("schema"), metadata.get("rank")
    expected = COMPACTED_SCHEMA if "pieces" in metadata else str(SCHEMA_VERSION)
    if schema != expected:
        raise ValueError(f"has schema {schema!r:.40}, expected {expected!r}")
    if metadata.get("manifest") != identity:
        raise ValueError("belongs to another run, or the manifest was changed")
    if rank != str(named_rank):
        raise ValueError(f"was written by rank {rank!r:.40}, its name says {named_rank}")
    try:
        backends = json.loads(metadata.get("backends", ""))
    except (ValueError, TypeError, RecursionError):
        backends = None
    if not isinstance(backends, list) or not all(isinstance(name, str) for name in backends):
        raise ValueError("has no list of data backends")
    return tuple(backends)


def _pieces_text(pieces: NDArray[np.int64]) -> str:
    """The metadata's `pieces`: a list for each row of indices without a gap, its first index and then the rows."""
    starts = np.flatnonzero(np.diff(pieces[:, 0], prepend=-2) != 1)
    runs = np.split(pieces, starts[1:])
    return json.dumps([[int(run[0, 0]), *run[:, 1].tolist()] for run in runs], separators=(",", ":"))


def _checked_pieces(metadata: dict[str, str], count: int) -> NDArray[np.int64] | None:
    """Index and rows of each piece, (P, 2), None without any; indices rise, each has rows, `count` in all."""
    if "pieces" not in metadata:
        return None
    try:
        runs = json.loads(metadata["pieces"])
        found = [(run[0] + i, rows) for run in runs for i, rows in enumerate(run[1:])]
        whole = all(type(number) is int and 0 <= number <= MAX_SHARD_BYTES for run in runs for number in run)
    except (ValueError, TypeError, LookupError, RecursionError):
        found, whole = [], False
    if not whole or not 1 <= len(found) <= MAX_PIECES:
        raise ValueError("has no list of its pieces")
    pieces = np.array(found, dtype=np.int64)
    rising = bool((np.diff(pieces[:, 0], prepend=-1) > 0).all())
    if not rising or pieces[-1, 0] > MAX_INDEX or pieces[:, 1].min() < 1 or pieces[:, 1].sum() != count:
        raise ValueError(f"has pieces that do not fit its {count} rows")
    return pieces


def _checked_count(tensors: dict[str, tuple[str, list[int], int]], sizes: dict[tuple[str, str], int]) -> int:
    """The number of rows N, once every tensor's name, dtype and shape in the header is as it must be."""
    expected: dict[str, tuple[tuple[str, ...], list[int]]] = {
        name: ((dtype,), []) for name, (_, dtype) in _COLUMNS.items()
    }
    for key, blocks in sizes.items():
        expected[tensor_name(*key)] = (_DISTANCE_DTYPES, [blocks])
    if tensors.keys() != expected.keys():
        odd = min(tensors.keys() ^ expected.keys())
        raise ValueError(f"{'has an unknown' if odd in tensors else 'lacks the'} tensor {odd!r:.80}")
    count = (tensors["sigma"][1] or [0])[0]
    for name, (dtypes, inner) in expected.items():
        dtype, shape, _ = tensors[name]
        if dtype not in dtypes or shape != [count, *inner]:
            wanted = f"{' or '.join(dtypes)} {[count, *inner]}"
            raise ValueError(f"has {name} as {dtype} {shape}, expected {wanted}")
    return count


def _joined(
    blocks: list[list[NDArray[Any]]], streams: list[str]
) -> tuple[NDArray[np.float64], dict[str, NDArray[Any]]]:
    sigma_N, *distances = blocks[0] if len(blocks) == 1 else map(np.concatenate, zip(*blocks, strict=True))
    return sigma_N, dict(zip(streams, distances, strict=True))


def _bad_rows(path: Path, error: ProbeError) -> ProbeError:
    return _broken(path, f"holds bad rows: {error}")


def _broken(path: Path, found: str) -> ProbeError:
    return ProbeError(f"shard {path} {found}; move it out of the folder to read the run without it")


def _header_bytes(start: bytes) -> int:
    """The length of the header that a safetensors file claims in its first 8 bytes."""
    return int.from_bytes(start[:8], "little")


def _list(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, rank, index) of each shard in `folder`, sorted by rank, then index; [] if there is no folder."""
    return [(folder / name, rank, index) for name, rank, index in _names(folder)]


def _names(folder: Path) -> list[tuple[str, int, int]]:
    """As `_list`, with names: a path for each takes several times as long as all else."""
    if folder.is_symlink():
        raise ProbeError(f"{folder} is a link; a run folder holds no links: put the folder itself there")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ProbeError(f"cannot list {folder}: {error.strerror}") from None
    matches = filter(None, map(_SHARD_NAME.fullmatch, sorted(names)))
    return [(match[0], int(match[1]), int(match[2])) for match in matches]


def rank_and_index(path: Path) -> tuple[int, int]:
    match = _SHARD_NAME.fullmatch(path.name)
    assert match, path
    return int(match[1]), int(match[2])


def _check_same(path: Path, here: Manifest, run: Manifest) -> None:
    difference = here.difference(run)
    if difference:
        raise ProbeError(f"{path} holds another run: {'; '.join(difference)}; use its settings or another folder")


def _check_array(name: str, array: object, dtypes: tuple[type[np.generic], ...], shape: tuple[int, ...]) -> None:
    assert isinstance(array, np.ndarray), name
    if array.dtype not in dtypes or array.shape != shape:
        wanted = f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)} {shape}"
        raise ProbeError(f"the rows' {name} is {array.dtype.name} {array.shape}; expected {wanted}")


def _check_range(name: str, values_N: NDArray[Any], low: int, high: int | None) -> None:
    # "Not all inside" rather than "any outside": a NaN is neither below nor above.
    inside_N = values_N >= low if high is None else (values_N >= low) & (values_N <= high)
    if not inside_N.all():
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise ProbeError(f"the rows' {name} holds {values_N[~inside_N][0]}; expected {wanted}")


def _keys(keys: Any) -> str:
    return ", ".join(sorted(f"{stream}/{tokens}" for stream, tokens in keys)) or "nothing"
