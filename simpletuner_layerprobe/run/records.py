"""The records of a run: append-only stream files (stream_file.py), one per rank and start, written and read here.

A writer opens a file of its own and never goes on in another's, so that no file is written after its process has ended,
and two processes cannot be in each other's way.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.folder import RunPath, sync_folder
from simpletuner_layerprobe.run.manifest import Manifest, check_same, read_manifest
from simpletuner_layerprobe.run.rows import FACTS, Rows, column_name
from simpletuner_layerprobe.run.stream_file import (
    MAX_BATCH_BYTES,
    MAX_RANK,
    StreamFile,
    arrow_schema,
    batch_metadata,
    file_name,
    is_stream_file,
    new_start,
    read_stream_file,
    schema_metadata,
)

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)


class RecordWriter:
    """Writes the rows of one rank in the run that `create_run` made, each block of rows as one record batch.

    Opens its file at the first write, and a new one after a write that failed. Raises RunError if the run in the folder
    has another manifest, or the rank is outside [0, 9999].
    """

    def __init__(self, run_dir: RunPath, manifest: Manifest, rank: int) -> None:
        if not 0 <= rank <= MAX_RANK:
            raise RunError(f"rank {rank} cannot be written; expected 0 to {MAX_RANK}")
        self.folder = Path(run_dir)
        self.manifest = read_manifest(run_dir)
        check_same(self.folder, manifest, self.manifest)
        self.rank = rank
        self.path: Path | None = None
        self._file: int | None = None
        self._sink = io.BytesIO()  # what Arrow makes of a batch, before it goes to the file at once
        self._stream: Any = None
        self._doubles: frozenset[str] = frozenset()
        self._committed_bytes = 0
        self._unsure = False  # whether the file may hold a whole batch that write() has not confirmed

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, rows: Rows, notes: Mapping[str, str] | None = None) -> None:
        """Append `rows` as one batch with these notes; no rows write nothing.

        The rows are on the disk when this returns. Raises RunError for rows that do not fit the manifest, rows too many
        for one batch, or a disk that refuses; nothing of these rows counts then, and they may be written again.
        """
        rows.validate(self.manifest)
        if not len(rows):
            return
        names = {key: column_name(*key) for key in self.manifest.columns()}
        doubles = frozenset(name for key, name in names.items() if rows.distances[key].dtype == np.float64)
        if self._file is not None and doubles != self._doubles:
            self.close()
        batch = _batch(rows, arrow_schema(self.manifest, doubles))
        if batch.nbytes > MAX_BATCH_BYTES // 2:
            raise RunError(f"{len(rows)} rows take {batch.nbytes} bytes, too many for one batch; write fewer at a time")
        try:
            if self._unsure:
                self._give_up()
            if self._file is None:
                self._open(batch.schema, doubles)
            self._stream.write_batch(batch, custom_metadata=batch_metadata(batch, notes or {}))
            self._commit()
        except BaseException as error:  # an interrupt too must not leave a torn batch before the next
            path = self.path
            with suppress(OSError):
                self._give_up()
            if isinstance(error, OSError):
                raise RunError(f"cannot write {path}: {error.strerror or error}") from None
            raise

    def close(self) -> None:
        """Write the stream's end mark and close the file. Nothing is lost if the process ends without it."""
        if self._file is None:
            return
        self._stream.close()
        with suppress(OSError):  # no room for the mark: the rows are safe, and the file may do without
            if not self._unsure:
                self._commit()
        with suppress(OSError):
            if self._unsure:
                self._give_up()
        self._forget()

    def _open(self, schema: pa.Schema, doubles: frozenset[str]) -> None:
        start = new_start()
        self.path = self.folder / file_name(self.rank, start)
        self._committed_bytes = 0
        self._file = os.open(self.path, _NEW_FILE, 0o666)
        sync_folder(self.folder)
        metadata = schema_metadata(self.manifest, self.rank, start)
        self._sink = io.BytesIO()
        self._stream = ipc.new_stream(self._sink, schema.with_metadata(metadata))
        self._doubles = doubles

    def _commit(self) -> None:
        """Everything that Arrow has put into the sink goes to the file, and to the disk."""
        assert self._file is not None
        data = memoryview(self._sink.getvalue())
        done = 0
        while done < len(data):
            done += os.write(self._file, data[done:])
        self._unsure = True
        os.fsync(self._file)
        self._unsure = False
        self._committed_bytes += len(data)
        self._sink.seek(0)
        self._sink.truncate()

    def _give_up(self) -> None:
        """Take back what the write that failed has left in the file; the next write opens a new one.

        A batch that is whole, but may not be on the disk, would count twice once its rows are written again: while the
        disk refuses to take it back this raises OSError, and the next write tries it first.
        """
        if self._file is None or self.path is None:
            return
        try:
            os.ftruncate(self._file, self._committed_bytes)
            if not self._committed_bytes:
                self.path.unlink(missing_ok=True)
        except OSError:
            if self._unsure:
                raise
        self._forget()

    def _forget(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
        self._file, self._unsure = None, False


def stream_files(run_dir: RunPath, manifest: Manifest) -> tuple[StreamFile, ...]:
    """The run's stream files by rank, then start; of several copies of one (same run id, rank, start) the longest.

    Every batch's head and sigmas are checked. Raises RunError naming a file that is damaged or another run's.
    """
    return read_columns(run_dir, manifest, ("sigma",))[0]


def read_columns(
    run_dir: RunPath, manifest: Manifest, names: Sequence[str], files: Iterable[StreamFile] | None = None
) -> tuple[tuple[StreamFile, ...], dict[str, NDArray[Any]]]:
    """(stream files, column name -> (N,) or (N, C)) of the rows in whole batches, sigma and facts in their range.

    files: read only what these held when they were listed; without it, what there is now.
    """
    looks: list[tuple[Path, int | None]] = [(path, None) for path in _paths(Path(run_dir))] if files is None else []
    looks += [(file.path, file.end) for file in files or ()]
    by_key: dict[tuple[str, int, str], tuple[StreamFile, dict[str, list[NDArray[Any]]]]] = {}
    for path, end in looks:
        try:
            stream_file, pieces = read_stream_file(path, manifest, names, end)
        except RunError:
            if files is None and not os.path.lexists(path):  # its writer took it away: nothing was in it
                continue
            raise
        known = by_key.get(stream_file.key)
        if known is None or known[0].samples < stream_file.samples:
            by_key[stream_file.key] = stream_file, pieces
    ordered = [by_key[key] for key in sorted(by_key, key=lambda key: (key[1], key[2], key[0]))]
    return tuple(stream_file for stream_file, _ in ordered), _joined([pieces for _, pieces in ordered], manifest, names)


def _paths(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if is_stream_file(name)]
    except OSError as error:
        raise RunError(f"cannot list {folder}: {error.strerror}") from None


def _joined(
    files: Sequence[Mapping[str, list[NDArray[Any]]]], manifest: Manifest, names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    shapes = {column_name(*key): (0, len(blocks)) for key, blocks in manifest.columns().items()}
    dtypes = FACTS | {"sigma": np.dtype(np.float64)}
    columns = {}
    for name in names:
        pieces = [piece for pieces in files for piece in pieces[name]]
        pieces = pieces or [np.zeros(shapes.get(name, 0), dtypes.get(name, np.float32))]
        columns[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return columns


def _batch(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    columns = rows.columns()
    arrays = []
    for field in schema:
        values = np.ascontiguousarray(columns[field.name])
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(values.reshape(-1), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        elif pa.types.is_string(field.type):
            # Half a surrogate pair, which UTF-8 cannot hold, becomes what Python would print for it.
            texts = [text.encode(errors="backslashreplace").decode() for text in values.tolist()]
            arrays.append(pa.array(texts, field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
