"""One stream file: the rows that one rank recorded in one start, as an Arrow IPC stream. docs/run-folder.md shows it.

The file grows by one record batch per flush. A batch's custom metadata has `crc32`: eight hex digits for its number of
rows and its notes, then eight for each column. A file whose process was killed ends where it ended: after a whole batch
or in the middle of one (*torn*), which costs that batch alone. Anything else that is not as it was written is damage.

Files come from anywhere: what Arrow makes of a batch is validated before it is looked at.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.folder import plain_file_size
from simpletuner_layerprobe.run.manifest import MANIFEST_NAME, Manifest
from simpletuner_layerprobe.run.rows import FACTS, column_name, out_of_range

MAX_RANK = 9999
MAX_BATCH_BYTES = 1024 * 1024 * 1024  # a reader holds one whole batch
GROUP_BYTES = 256 * 1024 * 1024  # of batches that a reader holds before it copies their columns

_NAME = re.compile(r"rank-(\d{4})-start-(\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8})\.arrows")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # what a writer puts behind its last batch when it closes the file
_CRC = "crc32"
_CRC_KEY = struct.pack("<I", len(_CRC)) + _CRC.encode() + b"\0"  # as it stands in a batch's custom metadata
_DIGITS = 8
_UNWRITTEN = bytes(512)  # what a power cut leaves of a sector that did not get to the disk
_DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, MemoryError, NotImplementedError, struct.error)
_RECORD_BATCH = 3  # the kind of a message, in the format's own numbering


@dataclass(frozen=True)
class StreamFile:
    """What a stream file holds.

    run_id, rank, start: who recorded it: the run's id, the rank, when the writer opened it. A file that is torn in
    its first bytes has the run_id "". samples, batches: in whole batches. end: bytes up to the last whole batch. torn:
    whether the file ends in the middle of a batch: its process was killed, or is writing it now. notes: what the
    writer noted, of each batch.
    """

    path: Path
    run_id: str
    rank: int
    start: str
    samples: int = 0
    batches: int = 0
    end: int = 0
    torn: bool = False
    notes: tuple[Mapping[str, str], ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """What no two different stream files share."""
        return self.run_id, self.rank, self.start


def new_start() -> str:
    """A start that no other file has: the time, so that files sort by it, and eight random digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"


def file_name(rank: int, start: str) -> str:
    """The name of the file that `rank` began at `start`."""
    return f"rank-{rank:04d}-start-{start}.arrows"


def is_stream_file(name: str) -> bool:
    """Whether a file of this name in a run folder is a stream file; others are ignored."""
    return _NAME.fullmatch(name) is not None


def arrow_schema(manifest: Manifest, doubles: frozenset[str] = frozenset()) -> pa.Schema:
    """The columns of a stream file; `doubles` names the columns of distances that are float64."""
    fields = [pa.field("sigma", pa.float64(), False), pa.field("loss", pa.float32(), False)]
    for name, dtype in FACTS.items():
        fields.append(pa.field(name, pa.utf8() if name == "backend" else pa.from_numpy_dtype(dtype), False))
    for key, blocks in manifest.columns().items():
        name = column_name(*key)
        item = pa.field("item", pa.float64() if name in doubles else pa.float32(), False)
        fields.append(pa.field(name, pa.list_(item, len(blocks)), False))
    return pa.schema(fields)


def schema_metadata(manifest: Manifest, rank: int, start: str) -> dict[str, str]:
    """What a file says of itself, in the metadata of its schema, with a checksum."""
    metadata = {"run_id": manifest.run_id, "rank": str(rank), "start": start, "version": __version__}
    metadata["manifest"] = manifest.identity()
    return metadata | {_CRC: _checksum(metadata)}


def batch_metadata(batch: pa.RecordBatch, notes: Mapping[str, str]) -> dict[str, str]:
    """The custom metadata of a batch with these notes: the notes and the checksums."""
    head = _checksum([batch.num_rows, sorted(notes.items())])
    return {_CRC: head + "".join(map(_column_checksum, batch.columns)), **notes}


def read_stream_file(
    path: Path, manifest: Manifest, names: Sequence[str], end: int | None = None
) -> tuple[StreamFile, dict[str, list[NDArray[Any]]]]:
    """(what the file holds, name -> pieces (n,) or (n, C)) of its whole batches, for the columns `names`, at least one.

    end: read only so many bytes, those of an earlier look at the same file. Raises RunError, naming the file, if it is
    not there, no plain file, damaged, or of another run.
    """
    plain_file_size(path)
    try:
        with pa.OSFile(os.fsencode(path)) as file:
            size_bytes = file.size() if end is None else min(end, file.size())
            return _Reading(path, manifest, names).read(file, size_bytes, first_look=end is None)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from None


class _Reading:
    """One look at one file."""

    def __init__(self, path: Path, manifest: Manifest, names: Sequence[str]) -> None:
        match = _NAME.fullmatch(path.name)
        self._manifest = manifest
        self._file = StreamFile(path, "", int(match[1]) if match else 0, match[2] if match else "")
        self._columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        self._fields: list[int] = []  # the numbers of these columns in the schema
        self._stream: Any = None  # Arrow's reader, once the schema has been read
        self._batches: list[pa.RecordBatch] = []  # not copied yet
        self._notes: list[Mapping[str, str]] = []

    def read(
        self, file: pa.NativeFile, size_bytes: int, first_look: bool
    ) -> tuple[StreamFile, dict[str, list[NDArray[Any]]]]:
        begin = held_bytes = 0
        torn = False
        while begin < size_bytes:
            try:
                end = begin + _message_bytes(file, begin, size_bytes)
                if end == begin:
                    break
                if first_look and end == size_bytes and self._stream is not None:
                    self._check_whole(file, begin)
                file.seek(begin)
                self._take(file)
            except _DAMAGE as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Arrow's
                    raise
                torn = _is_torn(file, begin, size_bytes, whole=not isinstance(error, EOFError))
                if not torn:
                    raise self._damage(error) from None
                break
            held_bytes += end - begin
            if held_bytes > GROUP_BYTES:
                self._copy_columns()
                held_bytes = 0
            begin = end
        self._copy_columns()
        self._file = replace(self._file, batches=len(self._notes), end=begin, torn=torn, notes=tuple(self._notes))
        return self._file, self._columns

    def _take(self, file: pa.NativeFile) -> None:
        """Read the next message: the schema, then a batch each time."""
        if self._stream is None:
            schema = ipc.read_schema(file)
            self._check_schema(schema)
            self._fields = sorted(schema.get_field_index(name) for name in self._columns)
            file.seek(0)
            options = ipc.IpcReadOptions(included_fields=self._fields, use_threads=False)
            self._stream = ipc.open_stream(file, options=options)
            return
        batch, notes = _checked_batch(self._stream, self._fields)
        self._batches.append(batch)
        self._notes.append(notes)

    def _check_whole(self, file: pa.NativeFile, begin: int) -> None:
        """Look at all columns of the last batch, at `begin`: a power cut may have left it as long as it should be."""
        file.seek(0)
        stream = ipc.open_stream(file)
        file.seek(begin)
        _checked_batch(stream, range(len(stream.schema)))

    def _check_schema(self, schema: pa.Schema) -> None:
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.pop(_CRC, "") != _checksum(metadata):
            raise ValueError("the checksum of its head does not fit")
        if metadata.get("manifest") != self._manifest.identity():
            if metadata["run_id"] != self._manifest.run_id:
                raise self._error("belongs to another run")
            raise RunError(
                f"{self._file.path.with_name(MANIFEST_NAME)} and the records do not fit: it was changed after "
                f"{self._file.path.name} of the same run was recorded; put the manifest back as it was"
            )
        lists = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
        doubles = frozenset(field.name for field in lists if field.type.value_type == pa.float64())
        if not schema.equals(arrow_schema(self._manifest, doubles)):
            raise ValueError("it has other columns than the manifest says")
        self._file = replace(self._file, run_id=metadata["run_id"], rank=int(metadata["rank"]), start=metadata["start"])

    def _copy_columns(self) -> None:
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches).combine_chunks()
        self._batches = []
        self._file = replace(self._file, samples=self._file.samples + len(table))
        for name, pieces in self._columns.items():
            try:
                pieces.append(_to_numpy(table.column(name).chunk(0)))
                problem = out_of_range(name, pieces[-1])
            except pa.ArrowInvalid:  # what cannot become numpy as it is
                problem = f"{name} has nulls"
            if problem:
                raise self._error(f"holds bad rows: {problem}")

    def _damage(self, error: Exception) -> RunError:
        place = "its schema" if self._stream is None else f"batch {len(self._notes) + 1}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return self._error(f"is damaged in {place} ({reason:.200})")

    def _error(self, text: str) -> RunError:
        return RunError(f"stream file {self._file.path} {text}; move it out of the folder to read the run without it")


def _checked_batch(stream: Any, fields: Sequence[int]) -> tuple[pa.RecordBatch, dict[str, str]]:
    """The next batch of Arrow's reader, of these fields of the schema, and its notes. Raises ValueError if damaged."""
    batch, metadata = stream.read_next_batch_with_custom_metadata()
    notes = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
    checksums = notes.pop(_CRC, "")
    batch.validate(full=True)
    if checksums[:_DIGITS] != _checksum([batch.num_rows, sorted(notes.items())]):
        raise ValueError("the checksum of its head does not fit")
    for name, column, field in zip(batch.schema.names, batch.columns, fields, strict=True):
        place = _DIGITS * (1 + field)
        if checksums[place : place + _DIGITS] != _column_checksum(column):
            raise ValueError(f"the checksum of {name} does not fit its bytes")
    return batch, notes


def _message_bytes(file: pa.NativeFile, begin: int, size_bytes: int) -> int:
    """The length of the message at `begin`; 0 for the end of the stream, with nothing behind it.

    Raises EOFError if the file ends before the message does, and ValueError or struct.error if this is no message that
    a writer of this package makes. Arrow itself would allocate first whatever a head claims, or a compressed body.
    """
    prefix = file.read_at(len(_END), begin)
    left = size_bytes - begin - len(_END)
    if left < 0:
        raise EOFError("the file ends in it")
    if prefix == _END and not left:
        return 0
    head_bytes = _number("<I", prefix, 4)
    if prefix[:4] != _END[:4] or not head_bytes:
        raise ValueError("no batch begins where it should")
    if head_bytes > left:
        raise EOFError("the file ends in it")
    head = file.read_at(head_bytes, begin + len(_END))
    message = _number("<I", head, 0)
    kind, content, body = (_field(head, message, number) for number in (1, 2, 3))
    if kind and _number("<B", head, kind) == _RECORD_BATCH and content:
        batch = content + _number("<I", head, content)
        if _field(head, batch, 3):
            raise ValueError("it is compressed")
    body_bytes = _number("<q", head, body) if body else 0
    if not 0 <= body_bytes <= MAX_BATCH_BYTES or body_bytes % 8:
        raise ValueError(f"it claims {body_bytes} bytes, at most {MAX_BATCH_BYTES} in eights are read")
    if body_bytes > left - head_bytes:
        raise EOFError("the file ends in it")
    return len(_END) + head_bytes + body_bytes


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of the flatbuffer table at `table` is; 0 if it is left out."""
    vtable = table - _number("<i", data, table)
    place = 4 + 2 * number
    offset = _number("<H", data, vtable + place) if place < _number("<H", data, vtable) else 0
    return table + offset if offset else 0


def _number(kind: str, data: bytes, place: int) -> int:
    return int(struct.unpack_from(kind, data, place)[0])


def _is_torn(file: pa.NativeFile, begin: int, size_bytes: int, *, whole: bool) -> bool:
    """Whether the rest of the file is the beginning of a batch that a process did not finish, and nothing else.

    whole: whether it is as long as it says. Then only sectors that did not get to the disk are an excuse.
    """
    if size_bytes - begin > MAX_BATCH_BYTES:
        return False
    tail = file.read_at(size_bytes - begin, begin)
    if not tail.strip(b"\0"):
        return True
    if tail.endswith(_END) or tail.count(_CRC_KEY) > 1:  # closed, or further batches behind it
        return False
    return not whole or tail.endswith(_UNWRITTEN)


def _to_numpy(column: pa.Array) -> NDArray[Any]:
    """(N,) or (N, C), numbers read-only. Raises ArrowInvalid for nulls.

    Not by Arrow's own `to_numpy`, which imports pandas: a third of a second.
    """
    if column.null_count:
        raise pa.ArrowInvalid("nulls")
    if pa.types.is_fixed_size_list(column.type):
        return _to_numpy(column.flatten()).reshape(-1, column.type.list_size)
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), object)
    return np.from_dlpack(column)


def _checksum(value: object) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _column_checksum(column: pa.Array) -> str:
    checksum = 0
    for buffer in column.buffers():
        if buffer is not None:
            checksum = zlib.crc32(buffer, checksum)
    return f"{checksum:08x}"
