"""Checks of a manifest's fields: what a file says of itself may be anything. Each raises RunError naming the field."""

from __future__ import annotations

import json
from typing import Any

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import RunError

MAX_TEXT = 4096  # characters of one name
_SHOWN = 80  # characters of one value in an error line


def bad(field: str, value: object, expected: str) -> RunError:
    """The error for a field with this value."""
    return RunError(f"the manifest's {field} is {show(value)}; expected {expected}")


def show(value: object) -> str:
    """A value, short enough for an error line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_schema(schema: object, known: int) -> None:
    if type(schema) is not int or schema < 1:
        raise bad("schema", schema, str(known))
    if schema < known:
        raise RunError(f"the run has schema {schema}, of a version before 0.2; this one reads {known}: record it anew")
    if schema > known:
        raise RunError(
            f"the run has schema {schema}; layerprobe {__version__} reads {known}: "
            "upgrade simpletuner-layerprobe to read it"
        )


def check_text(value: object, field: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise bad(field, value, f"a printable string of at most {MAX_TEXT} characters")


def check_mapping(value: object, field: str) -> None:
    if not isinstance(value, dict):
        raise bad(field, value, "an object")
    for key in value:
        check_text(key, f"{field} key")


def check_tuple(values: object, kind: type, field: str, least: int, most: int) -> None:
    if (
        not isinstance(values, tuple)
        or not least <= len(values) <= most
        or not all(isinstance(value, kind) for value in values)
    ):
        raise bad(field, values, f"a tuple of {least} to {most} {kind.__name__}")


def check_paths(paths: tuple[str, ...], field: str, least: int, most: int) -> None:
    """Different paths, or patterns of them, in the denoiser."""
    check_tuple(paths, str, field, least, most)
    for path in paths:
        check_text(path, field)
        if not path:
            raise bad(field, path, "paths or patterns in the denoiser")
    check_unique(paths, field)


def check_unique(values: tuple[object, ...], field: str) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise RunError(f"the manifest's {field} names {show(value)} twice; expected each name once")
        seen.add(value)


def plain_json(value: Any, field: str) -> Any:
    """The value as JSON gives it back: a copy in which tuples are lists."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError(f"the manifest's {field} holds a value that JSON cannot hold ({error})") from None
