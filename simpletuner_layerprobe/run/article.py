"""The article's record format, in and out: one JSON object per sample and line.

    {"timestep": 0.25, "encoder_hidden_states": [37 floats], "hidden_states": [38 floats]}

`timestep` is sigma in [0, 1]; `hidden_states` are the image stream's angular distances, one per block,
`encoder_hidden_states` the text stream's. Files may be plain, gzip or bz2.
"""

from __future__ import annotations

import bz2
import gzip
import json
import math
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.folder import free_target, new_folder
from simpletuner_layerprobe.run.manifest import (
    MAX_BLOCKS,
    READINGS,
    SCHEMA_VERSION,
    Manifest,
    Module,
    RunPath,
    Stream,
    utc_now,
    write_new_file,
)
from simpletuner_layerprobe.run.records import Rows, Run, ShardWriter, create_run, open_run

# Stream -> its key in a record, in the order in which the article writes them.
RECORD_KEYS = {"text": "encoder_hidden_states", "image": "hidden_states"}
ROWS_PER_SHARD = 50_000
MAX_LINE_BYTES = 4 * 1024 * 1024  # one of the article's records takes 1,650 bytes

_GZIP_MAGIC = b"\x1f\x8b"
_BZIP2_MAGIC = b"BZh"
_NUMBERS = {int, float}  # what json makes of a number; bool is neither


def import_jsonl(
    source: RunPath,
    run_dir: RunPath,
    *,
    tokens: str = "last",
    modules: Sequence[Module] = (),
    family: str = "",
    flavour: str = "",
    model_class: str = "",
    block_paths: Mapping[str, Sequence[str]] | None = None,
) -> Run:
    """Make the run `run_dir` from a file of records; all of it, or nothing is left behind.

    source: plain, gzip or bz2, told by its first bytes. run_dir: a name that is free, or an empty folder.
    tokens: the reading that the distances are of, "last" or "mean". modules, family, flavour, model_class:
    what is known of the model, for the manifest. block_paths: "image" and "text" -> the block paths, as many
    as the records have distances; without it both streams count `transformer_blocks.{i}` from 0, as on SD3.
    Keys that a record has besides the three are ignored, and so are blank lines.
    Raises ProbeError, with the line's number, for the first line that is not such a record.
    """
    if tokens not in READINGS:
        raise ProbeError(f"tokens is {tokens!r}; expected one of {', '.join(READINGS)}")
    source_path = Path(source)
    target = free_target(run_dir, "import into")
    with _open_records(source_path) as file, new_folder(target) as staging:
        writer: ShardWriter | None = None
        for sigma_N, distances in _blocks_of_records(file, source_path):
            if writer is None:
                manifest = Manifest(
                    schema=SCHEMA_VERSION,
                    family=family,
                    flavour=flavour,
                    model_class=model_class,
                    streams=_streams(distances, block_paths, source_path),
                    tokens=(tokens,),
                    modules=tuple(modules),
                    versions={"simpletuner-layerprobe": __version__},
                    settings={},
                    fingerprint="",
                    created=utc_now(),
                    source="import",
                )
                create_run(staging, manifest)
                writer = ShardWriter(staging, manifest, rank=0)
            writer.write(_rows(sigma_N, {(name, tokens): values_NL for name, values_NL in distances.items()}))
        if writer is None:
            raise ProbeError(f"{source_path} has no records; expected one JSON object per line")
    return open_run(run_dir)


def export_jsonl(run: Run, file: RunPath, tokens: str = "last") -> tuple[int, int]:
    """Write the run's samples as records; returns (written, skipped).

    file: a name that is free; one that ends in .gz or .bz2 is compressed. tokens: the reading to write.
    Every number is written so that reading it back gives the same float64. A sample with a distance that is
    not finite cannot be a record and is skipped. A run without a text stream gives records without
    `encoder_hidden_states`.
    Raises ProbeError if the run has not this reading, no image stream, a stream that the format does not
    know, or no sample to write, or if `file` exists; the file is complete or absent.
    """
    path = Path(file)
    if tokens not in run.manifest.tokens:
        raise ProbeError(f"{run.path} has no reading {tokens!r}; it has: {', '.join(run.manifest.tokens)}")
    run.manifest.stream("image")
    names = [stream.name for stream in run.manifest.streams]
    for name in names:
        if name not in RECORD_KEYS:
            raise ProbeError(f"{run.path} has a stream {name!r}; the record format knows image and text only")
    run.require_samples()
    ordered = [(name, key) for name, key in RECORD_KEYS.items() if name in names]
    written = 0
    skipped = 0

    def write(raw: BinaryIO) -> None:
        nonlocal written, skipped
        with compressed(raw, path.suffix) as out:
            for rows in run.rows():
                finite_N = np.ones(len(rows), dtype=bool)
                for name in names:
                    finite_N &= np.isfinite(rows.distances[name, tokens]).all(axis=1)
                skipped += int((~finite_N).sum())
                for sample in np.flatnonzero(finite_N):
                    record: dict[str, Any] = {"timestep": float(rows.sigma_N[sample])}
                    for name, key in ordered:
                        record[key] = rows.distances[name, tokens][sample].tolist()
                    out.write(json.dumps(record).encode() + b"\n")
                    written += 1
        if not written:
            raise ProbeError(f"{run.path}: none of its {skipped} samples has finite distances; nothing to export")

    try:
        write_new_file(path, write)
    except FileExistsError:
        raise ProbeError(f"{path} exists already; export to another name") from None
    return written, skipped


def _blocks_of_records(
    file: BufferedIOBase, source: Path
) -> Iterator[tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]]:
    """Up to ROWS_PER_SHARD records at a time: sigma (N,) and per stream the distances (N, L), float64."""
    sigmas = array("d")
    values: dict[str, array[float]] = {"image": array("d"), "text": array("d")}
    lengths: dict[str, int] = {}
    for number, line in _lines(file, source):
        where = f"{source}, line {number}"
        record = _record(line, where)
        for name, key in RECORD_KEYS.items():
            length = len(record[key])
            if lengths.setdefault(name, length) != length:
                raise ProbeError(f"{where}: {key} has {length} numbers; the records before have {lengths[name]}")
            values[name].extend(record[key])
        sigmas.append(record["timestep"])
        if len(sigmas) == ROWS_PER_SHARD:
            yield _as_arrays(sigmas, values)
            sigmas = array("d")
            values = {name: array("d") for name in values}
    if sigmas:
        yield _as_arrays(sigmas, values)


def _as_arrays(
    sigmas: array[float], values: dict[str, array[float]]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    count = len(sigmas)
    distances = {name: np.frombuffer(numbers).reshape(count, -1) for name, numbers in values.items()}
    return np.frombuffer(sigmas), distances


def _lines(file: BufferedIOBase, source: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) for each line that is not blank; never holds more than one line."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ProbeError(f"{source}, line {number}: cannot be read, the file is damaged ({error})") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise ProbeError(f"{source}, line {number}: over {MAX_LINE_BYTES} bytes long; expected one record")
        if not line.isspace():
            yield number, line


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record in one line, with its three keys checked. `where` starts the message of the ProbeError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        detail = f"{error.msg}, column {error.colno}"
        raise ProbeError(f"{where}: not JSON ({detail}); expected one object per line") from None
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{where}: not JSON ({error}); expected one object per line") from None
    if not isinstance(record, dict):
        raise ProbeError(f"{where}: {_kind(record)}; expected an object with timestep and hidden states")
    keys = ("timestep", *RECORD_KEYS.values())
    for key in keys:
        if key not in record:
            raise ProbeError(f"{where}: lacks {key!r}; expected {', '.join(keys)}")
    sigma = record["timestep"]
    if type(sigma) not in _NUMBERS or not 0 <= sigma <= 1:
        raise ProbeError(f"{where}: timestep is {_kind(sigma)}; expected a number in [0, 1]")
    for key in RECORD_KEYS.values():
        numbers = record[key]
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_BLOCKS:
            raise ProbeError(f"{where}: {key} is {_kind(numbers)}; expected 1 to {MAX_BLOCKS} numbers")
        if not _all_finite(numbers):
            index = next(i for i, value in enumerate(numbers) if not _all_finite([value]))
            raise ProbeError(f"{where}: {key}[{index}] is {_kind(numbers[index])}; expected a finite number")
    return record


def _all_finite(numbers: list[Any]) -> bool:
    try:
        return set(map(type, numbers)) <= _NUMBERS and all(map(math.isfinite, numbers))
    except OverflowError:  # a whole number beyond float64
        return False


def _kind(value: object) -> str:
    """What `value` is, short enough for an error line."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if type(value) is int and abs(value) >= 2**64:
        return "a whole number too large"  # repr of a long one may be refused
    return json.dumps(value)[:40]


def _streams(
    distances: Mapping[str, NDArray[np.float64]],
    block_paths: Mapping[str, Sequence[str]] | None,
    source: Path,
) -> tuple[Stream, ...]:
    streams = []
    for name, values_NL in distances.items():
        count = values_NL.shape[1]
        if block_paths is None:
            paths = tuple(f"transformer_blocks.{index}" for index in range(count))
        else:
            paths = tuple(block_paths.get(name, ()))
        if len(paths) != count:
            raise ProbeError(
                f"{source}: the records have {count} {name} distances; the model has {len(paths)} such blocks"
            )
        streams.append(Stream(name, paths))
    return tuple(streams)


def _rows(sigma_N: NDArray[np.float64], distances: Mapping[tuple[str, str], NDArray[np.float64]]) -> Rows:
    """Rows of which only sigma and the distances are known."""
    count = len(sigma_N)
    return Rows(
        sigma_N=sigma_N,
        loss_N=np.full(count, np.nan, dtype=np.float32),
        width_N=np.zeros(count, dtype=np.int32),
        height_N=np.zeros(count, dtype=np.int32),
        text_tokens_N=np.full(count, -1, dtype=np.int32),
        caption_dropped_N=np.full(count, -1, dtype=np.int8),
        backend_N=np.full(count, -1, dtype=np.int16),
        backends=(),
        distances={key: _narrowed(values_NL) for key, values_NL in distances.items()},
    )


def _narrowed(values_NL: NDArray[np.float64]) -> NDArray[np.float32] | NDArray[np.float64]:
    """The same values in float32, if that holds every one of them exactly; else as they are."""
    with np.errstate(over="ignore", under="ignore"):
        narrow_NL = values_NL.astype(np.float32)
    return narrow_NL if np.array_equal(narrow_NL, values_NL) else values_NL


def _open_records(source: Path) -> BufferedIOBase:
    """The file's decompressed bytes. Closing the result closes everything."""
    try:
        with open(source, "rb") as file:
            magic = file.read(3)
        if magic.startswith(_GZIP_MAGIC):
            return gzip.GzipFile(source, "rb")
        if magic == _BZIP2_MAGIC:
            return bz2.BZ2File(source, "rb")
        return open(source, "rb")
    except OSError as error:
        raise ProbeError(f"cannot read {source}: {error.strerror}") from None


def compressed(raw: BinaryIO, suffix: str) -> AbstractContextManager[Any]:
    """A file that writes into `raw` and leaves it open at its end; the same records give the same bytes."""
    if suffix == ".gz":
        return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)
    if suffix == ".bz2":
        return bz2.BZ2File(raw, "wb")
    return nullcontext(raw)
