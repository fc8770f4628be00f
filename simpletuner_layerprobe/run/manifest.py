"""The manifest: what a run was recorded from and with which settings.

`manifest.json` is written once, when the run folder is made, and never again. The module also has the one
way in which this package puts files into a run folder: complete or absent, never replacing anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import TOKENS, Reading, parse_reading

SCHEMA_VERSION = 1
EXTRA_SCHEMA = 2  # of a run with further readings: versions that do not know them refuse it
MANIFEST_NAME = "manifest.json"
READINGS = TOKENS  # of the angular distances over one block
SOURCES = ("probe", "import")

MAX_MANIFEST_BYTES = 32 * 1024 * 1024  # SD3.5 Large's whole module table takes about 0.1 MB
MAX_BLOCKS = 4096
MAX_EXTRA = 1024
MAX_MODULES = 200_000
MAX_DIMENSIONS = 8
MAX_TEXT = 4096  # characters of one name

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # stream and reading names become tensor names
_HEX = re.compile(r"[0-9a-f]{0,256}")
_TEMPORARY = re.compile(r"\.layerprobe-[0-9a-f]+\.tmp")
_SHOWN = 80  # characters of one value in an error line

# What must agree for two recordings to be one run; the rest only tells where it came from.
_COMPARED = ("family", "flavour", "model_class", "streams", "tokens", "modules", "settings", "fingerprint")
_TOLD = ("versions", "created", "source")

RunPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Stream:
    """One stream of hidden states and the paths in the denoiser of the L blocks that update it, in order."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """One module of the denoiser: name, class name such as "Linear", the weight's shape or ()."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a run was recorded from. Building one checks every field and raises ProbeError naming the bad one.

    schema: the format's version. family, flavour: SimpleTuner's names, "" if unknown. model_class: the
    denoiser's class, "" if unknown. streams: at least one. tokens: the readings recorded, "last", "mean" or
    both. modules: the denoiser's module table, empty if unknown. versions: package name -> version. settings:
    JSON values (a tuple becomes a list) that decide the recorded numbers. fingerprint: lower-case hex of the
    base model, "" if unknown. created: ISO time in UTC, told, not compared. source: "probe" or "import".
    extra: the names of further readings (run/readings.py), in schema 2 alone.
    """

    schema: int
    family: str
    flavour: str
    model_class: str
    streams: tuple[Stream, ...]
    tokens: tuple[str, ...]
    modules: tuple[Module, ...]
    versions: dict[str, str]
    settings: dict[str, object]
    fingerprint: str
    created: str
    source: str
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_schema(self.schema)
        for field in ("family", "flavour", "model_class", "fingerprint", "created", "source"):
            _check_text(getattr(self, field), field)
        _check_streams(self.streams)
        _check_names(self.tokens, "tokens")
        for name in self.tokens:
            if name not in READINGS:
                raise _bad("tokens", _show(name), "of " + ", ".join(READINGS))
        _check_extra(self.extra, self.schema, max(len(stream.blocks) for stream in self.streams))
        _check_modules(self.modules)
        _check_mapping(self.versions, "versions")
        for package, version in self.versions.items():
            _check_text(version, f"versions.{package}")
        _check_mapping(self.settings, "settings")
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise _bad("settings", f"a value that JSON cannot hold ({error})", "plain JSON values") from None
        object.__setattr__(self, "settings", settings)
        if not _HEX.fullmatch(self.fingerprint):
            raise _bad("fingerprint", _show(self.fingerprint), "lower-case hexadecimal digits")
        if self.source not in SOURCES:
            raise _bad("source", _show(self.source), "one of " + ", ".join(SOURCES))

    def stream(self, name: str) -> Stream:
        """The stream called `name`. Raises ProbeError, naming those that the run has, if there is none."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        known = ", ".join(stream.name for stream in self.streams)
        raise ProbeError(f"the run has no stream {name!r}; it has: {known}")

    def readings(self, stream: Stream) -> tuple[Reading, ...]:
        """Every reading that rows have of this stream: a pair's span is at most the number of its blocks."""
        found = (parse_reading(name) for name in (*self.tokens, *self.extra))
        return tuple(reading for reading in found if reading.span <= len(stream.blocks))

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; streams as {name: blocks}, modules as [name, type, shape] triples."""
        values: dict[str, Any] = {
            "schema": self.schema,
            "family": self.family,
            "flavour": self.flavour,
            "model_class": self.model_class,
            "streams": {stream.name: list(stream.blocks) for stream in self.streams},
            "tokens": list(self.tokens),
            "modules": [[module.name, module.type, list(module.shape)] for module in self.modules],
            "versions": dict(self.versions),
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "created": self.created,
            "source": self.source,
        }
        if self.extra:
            values["extra"] = list(self.extra)
        return values

    @staticmethod
    def from_json(value: object) -> Manifest:
        """The manifest that `to_json` gave.

        Raises ProbeError for another schema and for a missing, unknown or bad field.
        """
        if not isinstance(value, dict):
            raise ProbeError(f"the manifest is a {type(value).__name__}; expected a JSON object")
        _check_schema(value.get("schema"))
        expected = ("schema", *_COMPARED, *_TOLD, *_further(value["schema"]))
        missing = [key for key in expected if key not in value]
        if missing:
            raise ProbeError(f"the manifest lacks {', '.join(missing)}; it is damaged or not the probe's")
        unknown = [key for key in value if key not in expected]
        if unknown:
            raise ProbeError(f"the manifest has the unknown field {_show(unknown[0])}; it is not the probe's")
        streams = value["streams"]
        _check_mapping(streams, "streams")
        _check_names(tuple(streams), "streams")
        modules = _listed(value["modules"], "modules", MAX_MODULES)
        fields = dict(value)
        fields["streams"] = tuple(
            Stream(name, _listed(blocks, f"streams.{name}", MAX_BLOCKS)) for name, blocks in streams.items()
        )
        fields["tokens"] = _listed(value["tokens"], "tokens", MAX_BLOCKS)
        fields["extra"] = _listed(value.get("extra", []), "extra", MAX_EXTRA)
        fields["modules"] = tuple(_module(triple) for triple in modules)
        return Manifest(**fields)

    def difference(self, other: Manifest) -> list[str]:
        """What keeps a recording with this manifest (here) from going on in `other` (the run); else [].

        One plain line per field or setting, such as "settings.sigmas: 'uniform' here, 'training' in the run".
        versions, created and source are not compared.
        """
        lines = []
        for field in ("family", "flavour", "model_class", "tokens", "fingerprint"):
            lines += _difference(field, getattr(self, field), getattr(other, field))
        lines += _difference("extra (layerprobe_residual, layerprobe_block_pairs)", self.extra, other.extra)
        here, there = ({stream.name: stream.blocks for stream in one.streams} for one in (self, other))
        if tuple(here) != tuple(there):
            lines += _difference("streams", tuple(here), tuple(there))
        else:
            for name in here:
                lines += _sequence_difference(f"streams.{name}", "blocks", here[name], there[name])
        lines += _sequence_difference("modules", "modules", self.modules, other.modules)
        lines += _difference("settings", self.settings, other.settings)
        return lines

    def identity(self) -> str:
        """SHA-256 (hex) of what `difference` compares: shards carry it, so that a foreign one is noticed."""
        values = self.to_json()
        compared = [self.schema, *(values[field] for field in (*_COMPARED, *_further(self.schema)))]
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def utc_now() -> str:
    """Now, as the manifest's `created` wants it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_manifest(run_dir: RunPath, manifest: Manifest) -> None:
    """Write `manifest.json` into the existing folder `run_dir`.

    Raises FileExistsError if there is one already (a manifest is never replaced), ProbeError if it is larger
    than MAX_MANIFEST_BYTES or cannot be written.
    """
    path = Path(run_dir) / MANIFEST_NAME
    # One top-level field per line: short enough to read, and compact where it is long (the module table).
    fields = (
        f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in manifest.to_json().items()
    )
    data = ("{\n" + ",\n".join(fields) + "\n}\n").encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise ProbeError(f"the manifest for {path} takes {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read back")
    write_new_file(path, lambda file: file.write(data))


def read_manifest(run_dir: RunPath) -> Manifest:
    """The manifest of the run in `run_dir`. Raises ProbeError if there is none that this version can read."""
    folder = Path(run_dir)
    path = folder / MANIFEST_NAME
    if not os.path.isdir(folder):
        found = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise ProbeError(f"{folder} {found}; expected the folder of a probe run or of an import")
    if not os.path.lexists(path):
        raise ProbeError(f"{folder} has no {MANIFEST_NAME}; expected a run folder of the layer probe")
    size_bytes = plain_file_size(path)
    if size_bytes > MAX_MANIFEST_BYTES:
        raise ProbeError(f"{path} takes {size_bytes} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(size_bytes), parse_constant=_refuse_constant)
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not JSON ({error}); the run cannot be read without it") from None
    try:
        return Manifest.from_json(value)
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from None


def plain_file_size(path: Path) -> int:
    """Size in bytes of the regular file at `path`. Raises ProbeError for a link, a pipe, a folder, nothing.

    A run folder is self-contained: what lies in it as a link could point anywhere.
    """
    try:
        found = os.lstat(path)
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise ProbeError(f"{path} is not a plain file; a run folder holds no links: put the file itself there")
    return found.st_size


def write_new_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create the file `path` from what `write` puts into a temporary file beside it: complete, or not at all.

    Raises FileExistsError if `path` exists (it is left as it is) and ProbeError if the system refuses; the
    temporary file is gone in either case.
    """
    temporary = path.with_name(temporary_name())
    try:
        if os.path.lexists(path):  # said before the work is done; _publish has the last word
            raise FileExistsError(f"{path} exists")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise ProbeError(f"cannot write {path}: {error.strerror or error}") from None


def temporary_name() -> str:
    """A new name for something that is not complete yet."""
    return f".layerprobe-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `name` is one that `temporary_name` gives (left over if the machine went down)."""
    return _TEMPORARY.fullmatch(name) is not None


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its final name; FileExistsError if that is taken (rename alone would replace it)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (exFAT, some network mounts). A rank has one writer, so look-then-rename will do.
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        os.rename(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the folder's new entry last through a power cut; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _bad(field: str, found: str, expected: str) -> ProbeError:
    return ProbeError(f"the manifest's {field} is {found}; expected {expected}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _check_schema(schema: object) -> None:
    if type(schema) is not int:
        raise _bad("schema", _show(schema), f"an integer such as {SCHEMA_VERSION}")
    if schema > EXTRA_SCHEMA:
        raise ProbeError(
            f"the run has schema {schema}; layerprobe {__version__} reads schema {SCHEMA_VERSION} and {EXTRA_SCHEMA}: "
            "upgrade simpletuner-layerprobe to read it"
        )
    if schema < SCHEMA_VERSION:
        raise ProbeError(
            f"the run has schema {schema}, which never was; layerprobe {__version__} reads {SCHEMA_VERSION} "
            f"and {EXTRA_SCHEMA}"
        )


def _check_text(value: object, field: str) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise _bad(field, _show(value), f"a printable string of at most {MAX_TEXT} characters")


def _check_mapping(value: object, field: str) -> None:
    if not isinstance(value, dict):
        raise _bad(field, _show(value), "an object")
    for key in value:
        _check_text(key, f"{field} key")


def _check_unique(values: tuple[object, ...], field: str) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise _bad(field, f"naming {_show(value)} twice", "each name once")
        seen.add(value)


def _check_names(names: object, field: str) -> None:
    """A non-empty tuple of different plain names: they become parts of tensor names."""
    if not isinstance(names, tuple) or not names:
        raise _bad(field, _show(names), "at least one name")
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise _bad(field, _show(name), "letters, digits and underscores, at most 64")
    _check_unique(names, field)


def _check_streams(streams: object) -> None:
    if not isinstance(streams, tuple) or not all(isinstance(stream, Stream) for stream in streams):
        raise _bad("streams", _show(streams), "a tuple of Stream")
    _check_names(tuple(stream.name for stream in streams), "streams")
    for stream in streams:
        field = f"streams.{stream.name}"
        if not isinstance(stream.blocks, tuple) or not 1 <= len(stream.blocks) <= MAX_BLOCKS:
            raise _bad(field, _show(stream.blocks), f"1 to {MAX_BLOCKS} block paths")
        for block in stream.blocks:
            _check_text(block, field)
            if not block:
                raise _bad(field, "naming a block ''", "block paths in the denoiser")
        _check_unique(stream.blocks, field)


def _further(schema: int) -> tuple[str, ...]:
    return ("extra",) if schema == EXTRA_SCHEMA else ()


def _check_extra(extra: object, schema: int, blocks: int) -> None:
    """Different names of further readings, each over at most `blocks` blocks: some if the schema has them, or none."""
    if not isinstance(extra, tuple) or len(extra) > MAX_EXTRA or bool(extra) != (schema == EXTRA_SCHEMA):
        wanted = "at least one further reading" if schema == EXTRA_SCHEMA else "no further readings"
        raise _bad("extra", _show(extra), f"{wanted} in schema {schema}")
    for name in extra:
        try:
            reading = parse_reading(name) if isinstance(name, str) else None
        except ProbeError:
            reading = None
        if reading is None or name in READINGS:
            raise _bad("extra", _show(name), "the name of a further reading")
        if reading.span > blocks:
            raise _bad("extra", _show(name), f"a span of at most the {blocks} blocks of a stream")
    _check_unique(extra, "extra")


def _check_modules(modules: object) -> None:
    if not isinstance(modules, tuple) or len(modules) > MAX_MODULES:
        raise _bad("modules", _show(modules), f"at most {MAX_MODULES} modules")
    for module in modules:
        if not isinstance(module, Module):
            raise _bad("modules", _show(module), "a tuple of Module")
        _check_text(module.name, "module name")
        _check_text(module.type, "module type")
        shape = module.shape
        if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
            raise _bad(f"shape of module {module.name!r}", _show(shape), f"at most {MAX_DIMENSIONS} dimensions")
        if any(type(dimension) is not int or not 0 <= dimension < 2**40 for dimension in shape):
            raise _bad(f"shape of module {module.name!r}", _show(shape), "whole numbers from 0 up")
    _check_unique(tuple(module.name for module in modules), "modules")


def _listed(value: object, field: str, most: int) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise _bad(field, _show(value), f"a list of at most {most}")
    return tuple(value)


def _module(triple: object) -> Module:
    if not isinstance(triple, list) or len(triple) != 3:
        raise _bad("modules", _show(triple), "[name, type, shape]")
    name, type_name, shape = triple
    return Module(name, type_name, _listed(shape, f"shape of module {_show(name)}", MAX_DIMENSIONS))


def _difference(field: str, here: object, there: object) -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        lines = []
        for key in sorted(here.keys() | there.keys()):
            inner = f"{field}.{_show(key)[1:-1]}"
            if key not in there:
                lines.append(f"{inner}: {_show(here[key])} here, absent in the run")
            elif key not in here:
                lines.append(f"{inner}: absent here, {_show(there[key])} in the run")
            else:
                lines += _difference(inner, here[key], there[key])
        return lines
    return [] if here == there else [f"{field}: {_show(here)} here, {_show(there)} in the run"]


def _sequence_difference(field: str, noun: str, here: tuple[object, ...], there: tuple[object, ...]) -> list[str]:
    if len(here) != len(there):
        return [f"{field}: {len(here)} {noun} here, {len(there)} in the run"]
    pairs = [(one, other) for one, other in zip(here, there, strict=True) if one != other]
    if not pairs:
        return []
    one, other = pairs[0]
    return [f"{field}: {len(pairs)} of {len(here)} differ, first {_show(one)} here, {_show(other)} in the run"]
