"""The manifest: what a run was recorded from and with which settings.

`manifest.json` is written when the run folder is made, and never again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ProbeError, RunError
from simpletuner_layerprobe.readings import TOKENS, WHOLE, all_blocks, parse_reading
from simpletuner_layerprobe.run.checks import (
    bad,
    check_mapping,
    check_paths,
    check_schema,
    check_text,
    check_tuple,
    check_unique,
    plain_json,
    show,
)
from simpletuner_layerprobe.run.folder import RunPath, is_temporary, plain_file_size, write_new_file

SCHEMA = 3
MANIFEST_NAME = "manifest.json"
FOLDER_NAME = "layerprobe"
"""What a run's folder is called in the output_dir of its training, unless layerprobe_dir names another."""
SOURCES = ("probe", "import")

MAX_MANIFEST_BYTES = 32 * 1024 * 1024  # SD3.5 Large's whole module table takes about 0.1 MB
MAX_BLOCKS = 4096
MAX_READINGS = 1024
MAX_MODULES = 200_000
MAX_DIMENSIONS = 8

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")  # stream and reading names become column names
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_HEX = re.compile(r"[0-9a-f]{0,256}")

# What must agree for two recordings to be one run; the rest only tells where it came from.
_COMPARED = ("family", "flavour", "model_class", "streams", "targets", "readings", "modules", "settings", "fingerprint")


@dataclass(frozen=True)
class Stream:
    """One stream of hidden states and the paths in the denoiser of the L blocks that update it, in order."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """The modules of one list of blocks, such as "transformer_blocks.*", that a weighted LoKr config covers.

    at_factor, at_double: fnmatch patterns relative to one block; what the first ones match gets the block's factor,
    what the second ones match twice the factor.
    """

    blocks: str
    at_factor: tuple[str, ...]
    at_double: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """One module of the denoiser: name, class name such as "Linear", the weight's shape or ().

    width: the features of a norm that has no weight, 0 if it is not known. A run's manifest does not keep it, so that
    the identity of a run stays what it was.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    width: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Manifest:
    """What a run was recorded from. Building one checks every field and raises RunError naming the bad one.

    schema: the format's version, SCHEMA. run_id: 16 hex digits, random (`new_run_id`). family, flavour: SimpleTuner's
    names, "" if unknown. model_class: the denoiser's class, "" if unknown. streams: at least one. targets: the LoKr
    targets, as they were known or guessed when the run was recorded. readings: the names of all that is recorded
    (readings.py), "last" or "mean" or both among them. modules: the denoiser's module table, empty if unknown.
    versions: package name -> version. settings: JSON values (a tuple becomes a list) that decide the recorded numbers.
    fingerprint: lower-case hex of the base model, "" if unknown. created: ISO time in UTC. source: one of SOURCES.
    """

    schema: int
    run_id: str
    family: str
    flavour: str
    model_class: str
    streams: tuple[Stream, ...]
    targets: tuple[Target, ...]
    readings: tuple[str, ...]
    modules: tuple[Module, ...]
    versions: dict[str, str]
    settings: dict[str, object]
    fingerprint: str
    created: str
    source: str

    def __post_init__(self) -> None:
        check_schema(self.schema, SCHEMA)
        for key in ("run_id", "family", "flavour", "model_class", "fingerprint", "created", "source"):
            check_text(getattr(self, key), key)
        if not _RUN_ID.fullmatch(self.run_id):
            raise bad("run_id", self.run_id, "16 hexadecimal digits")
        if not _HEX.fullmatch(self.fingerprint):
            raise bad("fingerprint", self.fingerprint, "lower-case hexadecimal digits")
        if self.source not in SOURCES:
            raise bad("source", self.source, "one of " + ", ".join(SOURCES))
        self._check_streams()
        self._check_readings()
        self._check_targets()
        self._check_modules()
        check_mapping(self.versions, "versions")
        for package, version in self.versions.items():
            check_text(version, f"versions.{package}")
        check_mapping(self.settings, "settings")
        object.__setattr__(self, "settings", plain_json(self.settings, "settings"))

    def stream(self, name: str) -> Stream:
        """The stream called `name`. Raises RunError, naming those that the run has, if there is none."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        known = ", ".join(stream.name for stream in self.streams)
        raise RunError(f"the run has no stream {name!r}; it has: {known}")

    @property
    def blocks(self) -> tuple[str, ...]:
        """All blocks that any stream has, in the model's order."""
        ordered = sorted(self.streams, key=lambda stream: stream.name != "image")
        return all_blocks([stream.blocks for stream in ordered])

    def columns(self) -> dict[tuple[str, str], tuple[tuple[str, str], ...]]:
        """(stream, reading) -> the (first block, last block) of each of its columns, the image stream first.

        A reading over more blocks in a row than a stream has is none of it. What whole blocks have is under WHOLE, in
        the order of `blocks`.
        """
        ordered = sorted(self.streams, key=lambda stream: (stream.name != "image", stream.name))
        having = [(stream.name, stream.blocks) for stream in ordered] + [(WHOLE, self.blocks)]
        return {
            (name, reading.name): reading.columns(blocks)
            for name, blocks in having
            for reading in map(parse_reading, self.readings)
            if reading.span <= len(blocks) and (reading.stream or name) == name and (name != WHOLE or reading.stream)
        }

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values; streams as {name: blocks}, targets and modules as lists of three."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "streams": {stream.name: list(stream.blocks) for stream in self.streams},
            "targets": [[target.blocks, list(target.at_factor), list(target.at_double)] for target in self.targets],
            "readings": list(self.readings),
            "modules": [[module.name, module.type, list(module.shape)] for module in self.modules],
        }

    @staticmethod
    def from_json(value: object) -> Manifest:
        """The manifest that `to_json` gave. Raises RunError for another schema and for a missing or bad field."""
        if not isinstance(value, dict):
            raise RunError(f"the manifest is a {type(value).__name__}; expected a JSON object")
        check_schema(value.get("schema"), SCHEMA)
        expected = [field.name for field in fields(Manifest)]
        missing = [key for key in expected if key not in value]
        if missing:
            raise RunError(f"the manifest lacks {', '.join(missing)}; it is damaged or not the probe's")
        unknown = [key for key in value if key not in expected]
        if unknown:
            raise RunError(f"the manifest has the unknown field {show(unknown[0])}; it is not the probe's")
        check_mapping(value["streams"], "streams")
        values = dict(value)
        try:
            values["streams"] = tuple(Stream(name, _tupled(blocks)) for name, blocks in value["streams"].items())
            values["targets"] = tuple(Target(*triple) for triple in _tupled(value["targets"]))
            values["readings"] = _tupled(value["readings"])
            values["modules"] = tuple(Module(*triple) for triple in _tupled(value["modules"]))
        except (TypeError, RecursionError):
            raise RunError("the manifest's targets or modules are not lists of three; it is damaged") from None
        return Manifest(**values)

    def difference(self, other: Manifest) -> list[str]:
        """What keeps a recording with this manifest (here) from going on in `other` (the run); else [].

        One plain line per field or setting, such as "settings.sigmas: 'uniform' here, 'training' in the run".
        What only tells where a run came from is not compared.
        """
        here, there = self.to_json(), other.to_json()
        return [line for field in _COMPARED for line in _difference(field, here[field], there[field])]

    def identity(self) -> str:
        """SHA-256 (hex) of what `difference` compares: stream files carry it, so that a foreign one is noticed."""
        values = self.to_json()
        compared = [self.schema, *(values[field] for field in _COMPARED)]
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()

    def _check_streams(self) -> None:
        check_tuple(self.streams, Stream, "streams", 1, MAX_BLOCKS)
        for stream in self.streams:
            if not isinstance(stream.name, str) or not _PLAIN_NAME.fullmatch(stream.name):
                raise bad("streams", stream.name, "letters, digits and underscores, at most 64")
            if stream.name == WHOLE:
                raise bad("streams", stream.name, f"another name than {WHOLE!r}, which stands for whole blocks")
            check_paths(stream.blocks, f"streams.{stream.name}", 1, MAX_BLOCKS)
        check_unique(tuple(stream.name for stream in self.streams), "streams")

    def _check_readings(self) -> None:
        """Different names of readings, at least one of TOKENS among them, none over more blocks than there are."""
        check_tuple(self.readings, str, "readings", 1, MAX_READINGS)
        blocks = max(len(stream.blocks) for stream in self.streams)
        having = {"", WHOLE, *(stream.name for stream in self.streams)}
        for name in self.readings:
            try:
                reading = parse_reading(name)
            except ProbeError:
                raise bad("readings", name, "the name of a reading") from None
            if reading.span > blocks:
                raise bad("readings", name, f"a span of at most the {blocks} blocks of a stream")
            if reading.stream not in having:
                raise bad("readings", name, f"a reading of the streams {', '.join(sorted(having - {'', WHOLE}))}")
        check_unique(self.readings, "readings")
        if not set(TOKENS) & set(self.readings):
            raise bad("readings", self.readings, " or ".join(TOKENS) + " among them")

    def _check_targets(self) -> None:
        check_tuple(self.targets, Target, "targets", 0, MAX_BLOCKS)
        for target in self.targets:
            check_paths((target.blocks,), "targets", 1, 1)
            for patterns in (target.at_factor, target.at_double):
                check_paths(patterns, "targets", 0, MAX_BLOCKS)

    def _check_modules(self) -> None:
        check_tuple(self.modules, Module, "modules", 0, MAX_MODULES)
        for module in self.modules:
            check_text(module.name, "module name")
            check_text(module.type, "module type")
            field = f"shape of module {module.name!r}"
            check_tuple(module.shape, int, field, 0, MAX_DIMENSIONS)
            if any(type(dimension) is not int or not 0 <= dimension < 2**40 for dimension in module.shape):
                raise bad(field, module.shape, "whole numbers from 0 up")
        check_unique(tuple(module.name for module in self.modules), "modules")


def new_run_id() -> str:
    """A run id that no other run has: 16 hex digits."""
    return secrets.token_hex(8)


def utc_now() -> str:
    """Now, as the manifest's `created` wants it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def create_run(run_dir: RunPath, manifest: Manifest) -> Manifest:
    """Make the run folder, or take the one that is there to go on with it; returns the manifest that lies in it.

    Several ranks may call this at the same time: the first one's manifest, with its run_id, is everybody's.
    Raises RunError, and changes nothing, if the folder holds a run with another manifest (naming the differences) or
    something else than a run.
    """
    path = Path(run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Another rank may be at it: its manifest comes first, before it only its temporary file.
        foreign = sorted(name for name in os.listdir(path) if name != MANIFEST_NAME and not is_temporary(name))
    except FileExistsError:
        raise RunError(f"{path} is a file; expected a folder for the run, or a name that is free") from None
    except OSError as error:
        raise RunError(f"cannot make the run folder {path}: {error.strerror}") from None
    if not os.path.lexists(path / MANIFEST_NAME):
        if foreign:
            raise RunError(f"{path} holds other files ({foreign[0]!r:.80}) and no {MANIFEST_NAME}; choose a new folder")
        with suppress(FileExistsError):  # another rank was faster; its manifest is compared like any other
            write_manifest(path, manifest)
    run = read_manifest(path)
    check_same(path, manifest, run)
    return run


def check_same(path: Path, here: Manifest, run: Manifest) -> None:
    """Raises RunError if a recording with the manifest `here` cannot go on in the run in `path`."""
    difference = here.difference(run)
    if difference:
        raise RunError(f"{path} holds another run: {'; '.join(difference)}; use its settings or another folder")


def write_manifest(run_dir: RunPath, manifest: Manifest) -> None:
    """Write `manifest.json` into the existing folder `run_dir`.

    Raises FileExistsError if there is one already (a manifest is never replaced), RunError if it is larger
    than MAX_MANIFEST_BYTES or cannot be written.
    """
    path = Path(run_dir) / MANIFEST_NAME
    # One top-level field per line: short enough to read, and compact where it is long (the module table).
    lines = (f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in manifest.to_json().items())
    data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise RunError(f"the manifest for {path} takes {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read back")
    write_new_file(path, lambda file: file.write(data))


def run_folder(path: RunPath) -> Path:
    """The folder of a run, also by the output_dir that it lies in."""
    folder = Path(path)
    inner = folder / FOLDER_NAME
    return inner if (inner / MANIFEST_NAME).is_file() and not (folder / MANIFEST_NAME).exists() else folder


def read_manifest(run_dir: RunPath) -> Manifest:
    """The manifest of the run in `run_dir`. Raises RunError if there is none that this version can read."""
    folder = Path(run_dir)
    path = folder / MANIFEST_NAME
    if not os.path.isdir(folder):
        state = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise RunError(f"{folder} {state}; expected the folder of a probe run or of an import")
    if not os.path.lexists(path):
        raise RunError(f"{folder} has no {MANIFEST_NAME}; expected a run folder of the layer probe")
    size_bytes = plain_file_size(path)
    if size_bytes > MAX_MANIFEST_BYTES:
        raise RunError(f"{path} takes {size_bytes} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(size_bytes), parse_constant=_refuse_constant)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}); the run cannot be read without it") from None
    try:
        return Manifest.from_json(value)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _difference(field: str, here: object, there: object) -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        lines = []
        for key in sorted(here.keys() | there.keys()):
            inner = f"{field}.{show(key)[1:-1]}"
            if key not in there:
                lines.append(f"{inner}: {show(here[key])} here, absent in the run")
            elif key not in here:
                lines.append(f"{inner}: absent here, {show(there[key])} in the run")
            else:
                lines += _difference(inner, here[key], there[key])
        return lines
    if here == there:
        return []
    if not isinstance(here, list) or not isinstance(there, list):
        return [f"{field}: {show(here)} here, {show(there)} in the run"]
    if len(here) != len(there):
        return [f"{field}: {len(here)} here, {len(there)} in the run"]
    pairs = [(mine, theirs) for mine, theirs in zip(here, there, strict=True) if mine != theirs]
    mine, theirs = map(show, pairs[0])
    return [f"{field}: {len(pairs)} of {len(here)} differ, first {mine} here, {theirs} in the run"]
