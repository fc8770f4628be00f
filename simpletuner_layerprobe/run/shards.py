"""The shards: the recorded rows, in immutable safetensors files, one writer per rank.

A run folder holds `manifest.json` and `shards/rank00000-000000.safetensors` (rank, then index). A shard is
written to a temporary name, then linked to its final one, and never touched again. Other names in `shards/`
are ignored.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from simpletuner_layerprobe import ProbeError
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
BLOCK_ROWS = 2048  # rows that `Run.distances` holds at once
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
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for dtype, name in _COLUMNS.values()}


@dataclass(frozen=True)
class Rows:
    """N recorded samples, all numpy.

    sigma_N: float64 in [0, 1]. loss_N: float32, NaN if unknown. width_N, height_N: int32 pixels, 0 if
    unknown. text_tokens_N: int32 valid text tokens, -1 if unknown. caption_dropped_N: int8, 1 or 0, -1 if
    unknown. backend_N: int16 index into `backends` (data backend ids), -1 if unknown. distances: (stream,
    reading), such as ("image", "last"), -> (N, L) angular distances, float32, or float64 where float32 would
    change a value; NaN and infinity are allowed here and counted by whoever averages.
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

    Raises ProbeError if the run in the folder has another manifest, or the rank is outside [0, 99999].
    """

    def __init__(self, run_dir: RunPath, manifest: Manifest, rank: int) -> None:
        if not 0 <= rank <= MAX_RANK:
            raise ProbeError(f"rank {rank} cannot be written; expected 0 to {MAX_RANK}")
        self.manifest = read_manifest(run_dir)
        _check_same(Path(run_dir), manifest, self.manifest)
        self.rank = rank
        self.folder = Path(run_dir) / SHARDS_NAME
        self._metadata = {
            "schema": str(SCHEMA_VERSION),
            "rank": str(rank),
            "manifest": self.manifest.identity(),
        }

    def write(self, rows: Rows) -> Path | None:
        """Write `rows` as a new shard and return its path; no rows write nothing and return None.

        The shard is on the disk, complete, when this returns. Raises ProbeError for rows that do not fit the
        manifest, rows too many for one shard, or a disk that refuses.
        """
        rows.validate(self.manifest)
        if not len(rows):
            return None
        tensors = rows.columns()
        tensors |= {tensor_name(*key): distance_NL for key, distance_NL in rows.distances.items()}
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if size_bytes > MAX_SHARD_BYTES - MAX_HEADER_BYTES:
            raise ProbeError(f"{len(rows)} rows take {size_bytes} bytes, too many for one shard; write fewer at a time")
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        data = save(tensors, {**self._metadata, "backends": json.dumps(rows.backends)})
        if _header_bytes(data) > MAX_HEADER_BYTES:
            raise ProbeError(f"the names of {len(rows.backends)} data backends are too long for a shard's header")
        while True:
            index = 1 + max(
                (shard_index for _, rank, shard_index in _list(self.folder) if rank == self.rank), default=-1
            )
            if index > MAX_INDEX:
                raise ProbeError(
                    f"{self.folder} has shard {MAX_INDEX} of rank {self.rank}, the last; use another folder"
                )
            path = self.folder / shard_name(self.rank, index)
            try:
                write_new_file(path, lambda file: file.write(data))
            except FileExistsError:
                continue  # somebody took the name in between; no shard is ever replaced
            return path


@dataclass(frozen=True)
class Run:
    """A run folder as it was when it was opened. `shards` are its shards' paths, by rank, then index."""

    path: Path
    manifest: Manifest
    shards: tuple[Path, ...]

    def rows(self) -> Iterator[Rows]:
        """The rows, one shard at a time. Raises ProbeError naming a shard that is broken or another run's."""
        identity = self.manifest.identity()
        sizes = stream_sizes(self.manifest)
        for path in self.shards:
            yield _read_shard(path, self.manifest, identity, sizes)

    def distances(self, tokens: str) -> Iterator[tuple[NDArray[np.float64], dict[str, NDArray[Any]]]]:
        """(sigma_N, stream -> (N, L) distances) of one reading, at most BLOCK_ROWS samples at a time.

        A run is thousands of small shards, or a few large ones: both are read in blocks, and nothing but these columns
        is read. Raises ProbeError naming a shard that is broken or another run's.
        """
        streams = [stream.name for stream in self.manifest.streams]
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
        identity = self.manifest.identity()
        sizes = stream_sizes(self.manifest)
        for path in self.shards:
            with _open_shard(path, identity, sizes) as shard:
                for start in range(0, shard.header.count, BLOCK_ROWS):
                    columns = [shard.read(name, start, BLOCK_ROWS) for name in names]
                    try:
                        _check_range("sigma", columns[0], 0, 1)
                    except ProbeError as error:
                        raise _bad_rows(path, error) from None
                    yield columns

    def sample_count(self) -> int:
        """Number of samples, from the shards' headers alone. Raises ProbeError as `rows` does."""
        return sum(self.samples_per_rank().values())

    def samples_per_rank(self) -> dict[int, int]:
        """Rank -> number of its samples, from the shards' headers alone. Raises ProbeError as `rows` does."""
        identity = self.manifest.identity()
        sizes = stream_sizes(self.manifest)
        counts: dict[int, int] = {}
        for path in self.shards:
            rank, _ = _rank_and_index(path)
            with _open_shard(path, identity, sizes) as shard:
                counts[rank] = counts.get(rank, 0) + shard.header.count
        return counts

    def size_bytes(self) -> int:
        """Bytes on disk of the manifest and the shards."""
        return sum(plain_file_size(path) for path in (self.path / MANIFEST_NAME, *self.shards))

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
    """(stream, reading) -> number of blocks L, for everything that rows of this manifest must have."""
    return {(stream.name, tokens): len(stream.blocks) for stream in manifest.streams for tokens in manifest.tokens}


@dataclass(frozen=True)
class _Header:
    """What a shard's header says. tensors: name -> (dtype, shape, first byte in the file)."""

    count: int
    backends: tuple[str, ...]
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]


@dataclass(frozen=True)
class _Shard:
    """An open shard whose header says that it is one of this run's."""

    path: Path
    file: BinaryIO
    header: _Header

    def read(self, name: str, start: int = 0, count: int | None = None) -> NDArray[Any]:
        """Rows [start, start + count) of a tensor, all from `start` on without a count."""
        dtype, shape, offset = self.header.tensors[name]
        rows = shape[0] - start if count is None else min(count, shape[0] - start)
        values = np.empty((rows, *shape[1:]), dtype)
        if values.nbytes:
            self.file.seek(offset + start * values.nbytes // rows)
            if self.file.readinto(memoryview(values).cast("B")) != values.nbytes:  # type: ignore[attr-defined]
                raise _broken(self.path, "is truncated or not safetensors (it became shorter while it was read)")
        return values


@contextmanager
def _open_shard(path: Path, identity: str, sizes: dict[tuple[str, str], int]) -> Iterator[_Shard]:
    size_bytes = plain_file_size(path)
    if size_bytes > MAX_SHARD_BYTES:
        raise _broken(path, f"takes {size_bytes} bytes, at most {MAX_SHARD_BYTES} are read")
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(_START_BYTES)
            header_bytes = _header_bytes(start)
            if header_bytes > MAX_HEADER_BYTES:
                raise _broken(path, f"is not a shard (a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES})")
            if len(start) < 8 + header_bytes:
                start += file.read(8 + header_bytes - len(start))
            rank, _ = _rank_and_index(path)
            try:
                header = _header(start[8 : 8 + header_bytes], size_bytes, rank, identity, tuple(sizes.items()))
            except ValueError as error:
                raise _broken(path, str(error)) from None
            yield _Shard(path, file, header)
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror or error}") from None


# The shards of a run have equal headers wherever they have as many rows.
@lru_cache(maxsize=64)
def _header(
    data: bytes, size_bytes: int, rank: int, identity: str, sizes: tuple[tuple[tuple[str, str], int], ...]
) -> _Header:
    """The checked header of a shard file of `size_bytes` bytes. Raises ValueError saying what is wrong with it."""
    metadata, tensors = _parse_header(data, size_bytes)
    return _Header(
        backends=_checked_metadata(metadata, rank, identity),
        count=_checked_count(tensors, dict(sizes)),
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    schema, rank = metadata.get("schema"), metadata.get("rank")
    if schema != str(SCHEMA_VERSION):
        raise ValueError(f"has schema {schema!r:.40}, expected {str(SCHEMA_VERSION)!r}")
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


def _read_shard(path: Path, manifest: Manifest, identity: str, sizes: dict[tuple[str, str], int]) -> Rows:
    with _open_shard(path, identity, sizes) as shard:
        columns = {f"{name}_N": shard.read(name) for name in _COLUMNS}
        distances = {key: shard.read(tensor_name(*key)) for key in sizes}
    rows = Rows(**columns, backends=shard.header.backends, distances=distances)
    try:
        rows.validate(manifest)
    except ProbeError as error:
        raise _bad_rows(path, error) from None
    return rows


def _bad_rows(path: Path, error: ProbeError) -> ProbeError:
    return _broken(path, f"holds bad rows: {error}")


def _broken(path: Path, found: str) -> ProbeError:
    return ProbeError(f"shard {path} {found}; move it out of the folder to read the run without it")


def _header_bytes(start: bytes) -> int:
    """The length of the header that a safetensors file claims in its first 8 bytes."""
    return int.from_bytes(start[:8], "little")


def _list(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, rank, index) of each shard in `folder`, sorted by rank, then index; [] if there is no folder."""
    if folder.is_symlink():
        raise ProbeError(f"{folder} is a link; a run folder holds no links: put the folder itself there")
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ProbeError(f"cannot list {folder}: {error.strerror}") from None
    paths = [folder / name for name in sorted(names) if _SHARD_NAME.fullmatch(name)]
    return [(path, *_rank_and_index(path)) for path in paths]


def _rank_and_index(path: Path) -> tuple[int, int]:
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
