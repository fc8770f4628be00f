"""The lines of a file of the article's records: one JSON object per sample.

    {"timestep": 0.25, "encoder_hidden_states": [37 floats], "hidden_states": [38 floats]}

`timestep` is sigma in [0, 1]; `hidden_states` are the image stream's angular distances in [0, 1], one per block,
`encoder_hidden_states` the text stream's, left out by a model without one. Further keys that are kept: `image` (a
string or a number), `caption_words`, `width`, `height`, `backend`, `dropped` (true or false) and `loss`; others are
ignored. Files may be plain, gzip or bz2, and of any length: they are read in blocks of lines.

Shape letters: N samples, L blocks.
"""

from __future__ import annotations

import bz2
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import ConfigError, RunError
from simpletuner_layerprobe.readings import TOKENS
from simpletuner_layerprobe.run.manifest import MAX_BLOCKS, SCHEMA, Manifest, Stream, new_run_id, utc_now
from simpletuner_layerprobe.run.rows import FACTS, UNKNOWN, Rows, image_hash

# Stream -> its key in a record, in the order in which the article writes them.
RECORD_KEYS = {"text": "encoder_hidden_states", "image": "hidden_states"}
FACT_KEYS = ("image", "caption_words", "width", "height", "backend", "dropped", "loss")
BLOCK_BYTES = 4 * 1024 * 1024  # of lines that are held at once; also the longest line (the article's takes 1,650 bytes)

_GZIP_MAGIC = b"\x1f\x8b"
_BZIP2_MAGIC = b"BZh"
_OTHER_MAGICS = {b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"PAR1": "parquet"}
_NUMBERS = {int, float}  # what json makes of a number; bool is neither
_HASH = re.compile(r"[0-9a-f]{16}")  # an `image` as `export_article` writes it
_MOST = 2**31 - 1
_MOST_LOSS = float(np.finfo(np.float32).max)


def article_manifest(rows: Rows, source: Path, tokens: str, **known: Any) -> Manifest:
    """The manifest of a file with these rows. known: what is known of the model, fields of Manifest.

    Streams that a record cannot have (sound) are left out. Raises RunError if the others have other numbers of blocks
    than the rows.
    """
    counts = {name: distance_NL.shape[1] for (name, _), distance_NL in rows.distances.items()}
    known["streams"] = tuple(stream for stream in known.get("streams", ()) if stream.name in RECORD_KEYS)
    blocks = {stream.name: len(stream.blocks) for stream in known["streams"]}
    for name in {**counts, **blocks} if blocks else ():
        if counts.get(name, 0) != blocks.get(name, 0):
            raise RunError(
                f"{source}: the records have {counts.get(name, 0)} {name} distances; "
                f"the model has {blocks.get(name, 0)} such blocks"
            )
    if not blocks:
        paths = {name: tuple(f"transformer_blocks.{i}" for i in range(count)) for name, count in counts.items()}
        known["streams"] = tuple(Stream(*item) for item in paths.items())
    values: dict[str, Any] = dict.fromkeys(("family", "flavour", "model_class", "fingerprint"), "")
    values |= {"schema": SCHEMA, "run_id": new_run_id(), "created": utc_now(), "source": "import"}
    values |= {"readings": (tokens,), "versions": {"simpletuner-layerprobe": __version__}}
    values |= {"targets": (), "modules": (), "settings": {}}
    return Manifest(**values | known)


def read_records(source: Path, tokens: str) -> Iterator[Rows]:
    """The rows of the file, one block of lines after the other; all have the streams and blocks of the first record.

    tokens: the reading that the distances are of. Raises RunError with the number of the first line that is no record,
    and for a file without any.
    """
    if tokens not in TOKENS:
        raise ConfigError(f"tokens is {tokens!r}; expected one of {', '.join(TOKENS)}")
    lengths: dict[str, int] = {}
    with _opened(source) as file:
        for first, block in _blocks_of_lines(file, source):
            columns = _parsed_by_arrow(block, lengths) or _parsed_by_line(block, lengths, source, first)
            count = len(columns["timestep"])
            distances: dict[tuple[str, str], NDArray[Any]] = {}
            for name in lengths:
                distance_NL = np.asarray(columns[RECORD_KEYS[name]], np.float64).reshape(count, lengths[name])
                distances[name, tokens] = _narrowed(distance_NL)
            loss_N = np.asarray(columns.pop("loss", [math.nan] * count), np.float64).astype(np.float32)
            facts = {name: columns[name] for name in FACT_KEYS if name in columns}
            yield Rows(np.asarray(columns["timestep"], np.float64), loss_N, facts, distances)
    if not lengths:
        raise RunError(f"{source} has no records; expected one JSON object per line")


def _opened(source: Path) -> BufferedIOBase:
    """The file's decompressed bytes. Closing the result closes everything."""
    try:
        with open(source, "rb") as file:
            magic = file.read(6)
        if magic.startswith(_GZIP_MAGIC):
            return gzip.GzipFile(source, "rb")
        if magic.startswith(_BZIP2_MAGIC):
            return bz2.BZ2File(source, "rb")
        other = next((name for start, name in _OTHER_MAGICS.items() if magic.startswith(start)), None)
        if other is not None:
            raise RunError(f"{source} is a {other} file; expected JSON objects, one per line, plain or in gzip or bz2")
        return open(source, "rb")
    except OSError as error:
        raise RunError(f"cannot read {source}: {error.strerror}") from None


def _blocks_of_lines(file: BufferedIOBase, source: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines), without blocks of blank lines; holds about BLOCK_BYTES.

    A small compressed file may hold any number of blank lines: more than BLOCK_BYTES of blanks, and more than of
    anything else, are an error.
    """
    number, rest, more = 1, b"", True
    blank_bytes = other_bytes = 0
    while more:
        try:
            data = file.read(BLOCK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            number += rest.count(b"\n")
            raise RunError(f"{source}, line {number}: cannot be read, the file is damaged ({error})") from None
        more = bool(data)
        cut = data.rfind(b"\n") + 1 if more else 0
        block, rest = (rest + data[:cut], data[cut:]) if cut or not more else (b"", rest + data)
        if len(rest) > BLOCK_BYTES:
            raise RunError(f"{source}, line {number}: over {BLOCK_BYTES} bytes long; expected one record")
        others = len(block.translate(None, b" \t\r\n"))
        blank_bytes, other_bytes = blank_bytes + len(block) - others, other_bytes + others
        if blank_bytes > max(BLOCK_BYTES, other_bytes):
            raise RunError(f"{source}, line {number}: mostly blank lines from here; expected one record per line")
        if others:
            yield number, block
        number += block.count(b"\n")


def _parsed_by_arrow(block: bytes, lengths: dict[str, int]) -> dict[str, Any] | None:
    """The columns of a block of records with the article's three keys; None for any other, which goes line by line.

    It takes a quarter of the time.
    """
    # One object without others in it on every line: Arrow 26 crashes on a null between objects.
    *lines, rest = block.split(b"\n")
    objects = all(line[:1] == b"{" and line[-1:] == b"}" for line in lines)
    if rest or not objects or not block.count(b"{") == block.count(b"}") == len(lines):
        return None
    kinds = {"timestep": pa.float64()} | dict.fromkeys(RECORD_KEYS.values(), pa.list_(pa.float64()))
    options = arrow_json.ParseOptions(explicit_schema=pa.schema(list(kinds.items())), unexpected_field_behavior="error")
    blocks = arrow_json.ReadOptions(use_threads=False, block_size=2 * BLOCK_BYTES)
    try:
        table = arrow_json.read_json(pa.BufferReader(block), blocks, options).combine_chunks()
    except pa.ArrowInvalid:
        return None
    columns = {"timestep": table["timestep"].to_numpy()}
    sizes: dict[str, int] = {}
    for name, key in RECORD_KEYS.items():
        lists = table[key].chunk(0)
        if name == "text" and lists.null_count == len(lists):
            continue
        size_N = np.diff(lists.offsets.to_numpy())
        sizes[name] = int(size_N[0])
        if lists.null_count or lists.values.null_count or (size_N != size_N[0]).any():
            return None
        columns[key] = lists.flatten().to_numpy()
    right = all(1 <= size <= MAX_BLOCKS for size in sizes.values()) and lengths in ({}, sizes)
    if not right or not all(((values >= 0) & (values <= 1)).all() for values in columns.values()):
        return None
    lengths |= sizes
    return columns


def _parsed_by_line(block: bytes, lengths: dict[str, int], source: Path, first: int) -> dict[str, Any]:
    """The same, line by line. Raises RunError for the first line that is not a record."""
    columns: dict[str, list[Any]] = {key: [] for key in ("timestep", *RECORD_KEYS.values(), *FACT_KEYS)}
    for number, line in enumerate(block.split(b"\n"), first):
        if not line or line.isspace():
            continue
        where = f"{source}, line {number}"
        record = _record(line, where)
        if not lengths:
            lengths |= {name: len(record[key]) for name, key in RECORD_KEYS.items() if record.get(key)}
        for name, key in RECORD_KEYS.items():
            numbers = record.get(key) or []
            if lengths.get(name, 0) != len(numbers):
                count = lengths.get(name, 0)
                raise RunError(f"{where}: {key} has {len(numbers)} numbers; the records before have {count}")
            columns[key].extend(numbers)
        columns["timestep"].append(record["timestep"])
        for key in FACT_KEYS:
            columns[key].append(_fact(key, record.get(key), where))
    return columns


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record in one line, its sigma and distances checked. `where` starts the message of the RunError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RunError(f"{where}: not JSON ({detail}); expected one object per line") from None
    if not isinstance(record, dict):
        raise RunError(f"{where}: {_kind(record)}; expected an object with timestep and hidden states")
    for key in ("timestep", RECORD_KEYS["image"]):
        if key not in record:
            raise RunError(f"{where}: lacks {key!r}; expected timestep, hidden_states and encoder_hidden_states")
    if not _in_unit([record["timestep"]]):
        raise RunError(f"{where}: timestep is {_kind(record['timestep'])}; expected a number in [0, 1]")
    for name, key in RECORD_KEYS.items():
        numbers = record.get(key)
        if name == "text" and numbers is None:
            continue
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_BLOCKS:
            raise RunError(f"{where}: {key} is {_kind(numbers)}; expected 1 to {MAX_BLOCKS} numbers")
        if not _in_unit(numbers):
            index = next(i for i, value in enumerate(numbers) if not _in_unit([value]))
            raise RunError(f"{where}: {key}[{index}] is {_kind(numbers[index])}; expected a number in [0, 1]")
    return record


def _fact(key: str, value: Any, where: str) -> Any:
    """The value of a further key as a run has it; null and a key that is not there are unknown."""
    if value is None:
        return math.nan if key == "loss" else UNKNOWN[key]
    if key == "image" and (
        isinstance(value, str) or type(value) is int or (type(value) is float and math.isfinite(value))
    ):
        return _image(value)
    if key == "backend" and isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # half a surrogate pair as Python would print it
    if key == "dropped" and isinstance(value, bool):
        return int(value)
    if key == "loss" and type(value) in _NUMBERS and abs(value) <= _MOST_LOSS:
        return float(value)
    if key in FACTS and FACTS[key] == np.int32 and type(value) is int and 0 <= value <= _MOST:
        return value
    expected = {"image": "a string or a number", "backend": "a string", "dropped": "true or false"}
    expected["loss"] = "a finite number"
    raise RunError(f"{where}: {key} is {_kind(value)}; expected {expected.get(key, f'a whole number, 0 to {_MOST}')}")


def _image(value: str | float) -> int:
    """The `image` fact: a hash as `export_article` writes it stays the same, everything else is hashed."""
    if isinstance(value, str) and _HASH.fullmatch(value) and int(value, 16):
        return int(value, 16)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return image_hash("", str(value))


def _in_unit(numbers: list[Any]) -> bool:
    return set(map(type, numbers)) <= _NUMBERS and all(0 <= value <= 1 for value in numbers)


def _kind(value: object) -> str:
    """What `value` is, short enough for an error line."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if type(value) is int and abs(value) >= 2**64:
        return "a whole number too large"  # repr of a long one may be refused
    return json.dumps(value)[:40]


def _narrowed(values_NL: NDArray[np.float64]) -> NDArray[np.float32] | NDArray[np.float64]:
    """The same values in float32, if that holds every one of them exactly; else as they are."""
    with np.errstate(under="ignore"):
        narrow_NL = values_NL.astype(np.float32)
    return narrow_NL if np.array_equal(narrow_NL, values_NL) else values_NL
