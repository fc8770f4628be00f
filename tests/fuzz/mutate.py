"""Inputs that are nearly valid: bytes flipped, cut, joined; JSON with one value, key or level changed."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import math
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from simpletuner_layerprobe.run.stream_file import batch_metadata

INTERESTING = [b"\x00", b"\xff", b"\n", b"{", b"[", b'"', b"\\", b"-", b"%s", b"\xed\xa0\x80"]
INTERESTING += [b"1e999", b"NaN", b"9" * 30]


class Raw(str):
    """JSON text that goes into the output as it is, also where it is no JSON."""


NUMBERS = [0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf]
TEXTS = ["", "0", "-1", "nan", "<script>", "x" * 5000, "(a+)+$", "[", "*" * 50, "../../x", "/dev/zero"]
CHARACTERS = ["a\x00b", "\x1b[31m", "\ud800", "\u202e"]
CONTAINERS: list[Any] = [[], {}, [[]], [None] * 3, {"": {}}]
TOO_MUCH = [Raw("9" * 5000), Raw("1e999999"), Raw("[" * 3000 + "]" * 3000), Raw('{"a":' * 2000 + "1" + "}" * 2000)]
NASTY = [None, True, False, *NUMBERS, *TEXTS, *CHARACTERS, *CONTAINERS, *TOO_MUCH, Raw('{"a":1,"a":2}')]


def mutated_bytes(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four changes of the bytes themselves; now and then random bytes."""
    if draw.random() < 0.05:
        return draw.randbytes(draw.choice((0, 1, 8, 100, 3000)))
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(found) + 1)
        kind = draw.randrange(8)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and place < len(found):
            found[place] = draw.randrange(256)
        elif kind == 2:
            del found[place:]
        elif kind == 3:
            del found[place : place + draw.choice((1, 2, 8, 200))]
        elif kind == 4:
            found[place:place] = draw.choice(INTERESTING)
        elif kind == 5:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            found[place : place + draw.choice((0, 8, 100))] = other[start : start + draw.choice((8, 100, 1000))]
        elif kind == 6:
            end = place + draw.choice((1, 8, 100))
            found[place:place] = found[place:end] * draw.choice((1, 2, 50))
        else:
            found[place : place + 8] = struct.pack(
                "<Q", draw.choice((0, 1, 255, 2**20, 2**31, 2**32, 2**62, 2**64 - 1))
            )
    return bytes(found)


def mutated_json(value: Any, draw: random.Random) -> bytes:
    """A JSON value as text, after one to three changes of its structure."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _changed(value, draw)
    return dumped(value)


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        other = copy.deepcopy(draw.choice([*NASTY, value[key]]))
        kind = draw.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[draw.choice([key + "x", "", "\x00", "__proto__", "schema", key.upper()])] = value.pop(key)
        elif kind == 1:
            value.insert(key, other)
        elif kind == 2 and isinstance(value, dict):
            value[f"{key}{draw.randrange(3)}"] = other
        elif kind == 2:
            value *= draw.choice((0, 2, 3))
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, str) and not isinstance(value, Raw) and value and draw.random() < 0.3:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(["", "*", ".", "\x00", "\u202e", "[", "(", "\\"]) + value[place + 1 :]
    if isinstance(value, int | float) and draw.random() < 0.3:
        return draw.choice([value + 1, -value, value * 1000, value / 3, float(value) if abs(value) < 2**60 else 0])
    return copy.deepcopy(draw.choice(NASTY))


def dumped(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.encode()
    if isinstance(value, dict):
        return b"{" + b",".join(dumped(str(key)) + b":" + dumped(inner) for key, inner in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(dumped, value)) + b"]"
    return json.dumps(value).encode()


Mutator = Callable[[bytes, list[bytes], random.Random], bytes]


def json_file(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutated_bytes(data, others, draw)
    try:
        return mutated_json(json.loads(data), draw)
    except (ValueError, RecursionError):
        return mutated_bytes(data, others, draw)


def json_lines(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Records: one line changed, or the bytes; then plain, as gzip or as bz2, which may be damaged too."""
    if draw.random() < 0.6:
        lines = data.splitlines() or [b""]
        place = draw.randrange(len(lines))
        lines[place] = json_file(lines[place], others, draw)
        data = b"\n".join(lines)
    else:
        data = mutated_bytes(data, others, draw)
    packing = draw.randrange(6)
    if packing < 3:
        return data
    packed = gzip.compress(data, 1, mtime=0) if packing < 5 else bz2.compress(data, 1)
    return mutated_bytes(packed, [packed], draw) if draw.random() < 0.6 else packed


def stream_file(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A stream file: its bytes, or its messages in another order, or made by Arrow from changed columns.

    The checksums are mended most of the time, so that what is behind them is reached.
    """
    kind = draw.randrange(5)
    if kind == 0:
        return mutated_bytes(data, others, draw)
    if kind == 1:
        return mended(mutated_bytes(data, others, draw))
    if kind == 2 and len(data) >= 8:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 4))):  # lengths, offsets and counts of a head
            place = 4 * draw.randrange(len(changed) // 4)
            changed[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 3, 8, 2**20, 2**31, 2**32 - 1)))
        return mended(bytes(changed))
    try:
        return _other_messages(data, draw) if kind == 3 else _other_columns(data, draw)
    except (pa.ArrowException, OSError, ValueError, TypeError):
        return mutated_bytes(data, others, draw)


def _messages(data: bytes) -> list[bytes]:
    source = pa.BufferReader(data)
    reader = ipc.open_stream(source)
    ends = [0, source.tell()]
    for _ in reader:
        ends.append(source.tell())
    return [data[begin:end] for begin, end in pairwise([*ends, len(data)])]


def _other_messages(data: bytes, draw: random.Random) -> bytes:
    messages = _messages(data)
    for _ in range(draw.choice((1, 2))):
        place = draw.randrange(len(messages))
        what = draw.randrange(4)
        if what == 0:
            del messages[place]
        elif what == 1:
            messages.insert(draw.randrange(len(messages) + 1), messages[place])
        elif what == 2:
            messages[place] = messages[place][: draw.randrange(len(messages[place]) + 1)]
        else:
            messages.append(bytes(draw.choice((1, 8, 600))))
        if not messages:
            break
    return b"".join(messages)


def _other_columns(data: bytes, draw: random.Random) -> bytes:
    """Valid Arrow with valid checksums: another type, nulls, other values, fewer columns, compressed, no rows."""
    reader = ipc.open_stream(pa.BufferReader(data))
    batches = list(reader)
    number = draw.randrange(len(reader.schema))
    field = reader.schema.field(number)
    kinds = [pa.int8(), pa.float64(), pa.utf8(), pa.uint64(), pa.list_(pa.float32(), 2), pa.large_utf8(), pa.binary()]
    kind = draw.choice([field.type, field.type, *kinds])
    values = draw.choice(
        [None, 0, -1, 1, 2**31 - 1, math.nan, math.inf, "", "x" * 999, [0.5, 2], [math.nan] * 3, b"\xff"]
    )
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=draw.choice([None, None, None, "lz4", "zstd"]))
    writer = None
    for batch in batches:
        columns = list(batch.columns)
        columns[number] = pa.array([values] * len(batch)).cast(kind) if draw.random() < 0.8 else columns[number]
        fields = [reader.schema.field(i) for i in range(len(columns))]
        fields[number] = pa.field(field.name, columns[number].type, draw.random() < 0.2)
        if draw.random() < 0.1:
            del columns[number], fields[number]
        schema = pa.schema(fields, reader.schema.metadata)
        changed = pa.RecordBatch.from_arrays(columns, schema=schema)[: draw.choice((0, 1, 99))]
        writer = writer or ipc.new_stream(sink, schema, options=options)
        writer.write_batch(changed, custom_metadata=batch_metadata(changed, {}))
    return bytes(sink.getvalue())


def mended(data: bytes) -> bytes:
    """The same bytes with the checksums that the batches have now, as far as Arrow can read them."""
    changed = bytearray(data)
    source = pa.BufferReader(data)
    try:
        reader = ipc.open_stream(source)
        while True:
            begin = source.tell()
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            notes = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
            old = notes.pop("crc32", "").encode()
            new = batch_metadata(batch, notes)["crc32"].encode()
            place = data.find(old, begin)
            if old and place >= 0 and len(old) == len(new):
                changed[place : place + len(new)] = new
    except (StopIteration, pa.ArrowException, OSError, ValueError, TypeError, MemoryError):
        return bytes(changed)
