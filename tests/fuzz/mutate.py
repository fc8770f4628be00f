"""Inputs that are nearly valid: bytes flipped, cut, joined; JSON with one value, key or level changed."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import random
import struct
from collections.abc import Callable
from typing import Any

INTERESTING = [
    b"\x00",
    b"\xff",
    b"\n",
    b"{",
    b"[",
    b'"',
    b"\\",
    b"1e999",
    b"NaN",
    b"-",
    b"\xed\xa0\x80",
    b"9" * 30,
    b"%s",
]


class Raw(str):
    """JSON text that goes into the output as it is, also where it is no JSON."""


NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "0",
    "-1",
    "nan",
    "../../x",
    "/dev/zero",
    "a\x00b",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "<script>",
    "x" * 5000,
    "(a+)+$",
    "[",
    "*" * 50,
    [],
    {},
    [[]],
    [None] * 3,
    {"": {}},
    Raw("9" * 5000),
    Raw("1e999999"),
    Raw("[" * 3000 + "]" * 3000),
    Raw('{"a":' * 2000 + "1" + "}" * 2000),
    Raw('{"a":1,"a":2}'),
]


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
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[draw.choice([key + "x", "", "\x00", "__proto__", "schema", key.upper()])] = value.pop(key)
        elif kind == 2:
            value[f"{key}{draw.randrange(3)}"] = copy.deepcopy(draw.choice([*NASTY, value[key]]))
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        kind = draw.randrange(8)
        if kind == 0:
            del value[place]
        elif kind == 1:
            value.insert(place, copy.deepcopy(draw.choice([*NASTY, value[place]])))
        elif kind == 2:
            value *= draw.choice((0, 2, 3))
        else:
            value[place] = _changed(value[place], draw)
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


def shard_file(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A shard: its header as JSON with the length mended, so that it is looked at, or the bytes."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.35 or length > len(data):
        return mutated_bytes(data, others, draw)
    try:
        header = json.loads(data[8 : 8 + length])
        if draw.random() < 0.8:
            header["__metadata__"].pop("crc32", None)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return mutated_bytes(data, others, draw)
    body = data[8 + length :]
    text = dumped(header)
    if draw.random() < 0.7:
        text = mutated_json(header, draw)
    else:
        body = mutated_bytes(body, others, draw)[: len(body)].ljust(len(body), b"\xff")
    return len(text).to_bytes(8, "little") + text + body
