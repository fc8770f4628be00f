"""JSON files that others wrote, read within limits; files of our own, written completely or not at all."""

from __future__ import annotations

import codecs
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.targets import require_file

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
"""What SimpleTuner calls the adapter in a checkpoint and at the end."""
BESIDE_ADAPTER = ("crepa_projector.", "urepa_projector.")
"""How the names of tensors begin that it keeps in the same file, and that are no part of the adapter."""
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


def write_files(contents: Mapping[Path, bytes], *, force: bool = False, place: Path | None = None) -> None:
    """Write all of these files of one folder or none of them; each is complete or absent at any time.

    force, place: as `require_file` takes them. Raises ConfigError if one may not be written, or if the system refuses.
    """
    for path in contents:
        require_file(path, force=force, place=place)
    taken = [path for path in contents if os.path.lexists(path)]
    folder = next(iter(contents)).parent
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    temporary = {path: path.with_name(f".layerprobe-{secrets.token_hex(8)}.tmp") for path in contents}
    path = next(iter(contents))
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
    except BaseException as error:
        for done in replaced:
            if done in before:
                done.write_bytes(before[done])
            else:
                done.unlink()
        for left in temporary.values():
            left.unlink(missing_ok=True)
        for made in missing:  # the deepest first
            with suppress(OSError):  # never made, or somebody else uses it by now
                made.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
        raise


def _check_depth(value: object, left: int) -> None:
    """Raise ValueError if lists and objects are in each other deeper than `left`."""
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"over {MAX_DEPTH} lists and objects in each other")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)
