"""JSON files that others wrote, read within limits; files of our own, written completely or not at all."""

from __future__ import annotations

import codecs
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ConfigError

MAX_JSON_BYTES = 32 * 1024 * 1024
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # of UTF-32 too
MAX_DEPTH = 50  # of lists and objects in each other


def json_bytes(value: Mapping[str, Any] | list[str]) -> bytes:
    """A value as the bytes of its JSON file; the same value gives the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The JSON object in the file `path`; `what` names it in errors. Raises ConfigError if it is none.

    In UTF-8 without a byte order mark, as SimpleTuner and diffusers read theirs.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ConfigError(f"{path} takes over {MAX_JSON_BYTES} bytes; expected {what}")
        if data.startswith(_BYTE_ORDER_MARKS):
            raise ValueError("it starts with a byte order mark, at which SimpleTuner stops: save it as UTF-8 without")
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text
        _check_depth(value, MAX_DEPTH)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; expected {what}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected {what}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}; expected {what}, a JSON object")
    return value


def require_free(paths: Iterable[str | os.PathLike[str]], *, force: bool = False) -> None:
    """Raise ConfigError if one of these files exists, unless `force`."""
    for path in paths:
        if os.path.lexists(path) and not force:
            raise ConfigError(f"{path} exists already; it is not overwritten without --force")


def write_files(contents: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Write all of these files of one folder or none of them; each is complete or absent at any time.

    Raises ConfigError if one exists and `force` is off, or if the system refuses.
    """
    require_free(contents, force=force)
    taken = [path for path in contents if os.path.lexists(path)]
    folder = next(iter(contents)).parent
    made_folder = not folder.exists()
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp") for path in contents}
    replaced: list[Path] = []
    before: dict[Path, bytes] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = {path: path.read_bytes() for path in taken}
        for path, data in contents.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
            replaced.append(path)
    except OSError as error:
        for path in replaced:
            if path in before:
                path.write_bytes(before[path])
            else:
                path.unlink()
        _remove(temporary.values())
        if made_folder and folder.is_dir():
            folder.rmdir()
        raise ConfigError(f"cannot write {error.filename2 or error.filename}: {error.strerror}") from None
    except BaseException:
        _remove(temporary.values())
        raise


def _check_depth(value: object, left: int) -> None:
    """Raise ValueError if lists and objects are in each other deeper than `left`."""
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"over {MAX_DEPTH} lists and objects in each other")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            path.unlink()
