"""Runs from the article's record files, and record files from runs. What a record is: article_lines.py.

Shape letters: N samples, L blocks.
"""

from __future__ import annotations

import bz2
import gzip
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from simpletuner_layerprobe.errors import ConfigError, RunError
from simpletuner_layerprobe.readings import TOKENS
from simpletuner_layerprobe.run.article_lines import FACT_KEYS, RECORD_KEYS, article_manifest, read_records
from simpletuner_layerprobe.run.folder import RunPath, new_folder, write_new_file
from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.manifest import Module, Stream, Target, create_run
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.run.rows import UNKNOWN
from simpletuner_layerprobe.targets import require_file

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.bz2")
# How a fact stands in a record; the others as whole numbers.
_AS_JSON: dict[str, Callable[[Any], Any]] = {"image": "{:016x}".format, "dropped": bool, "backend": str}


def import_article(
    source: RunPath,
    run_dir: RunPath,
    *,
    tokens: str = "last",
    family: str = "",
    flavour: str = "",
    model_class: str = "",
    streams: Sequence[Stream] = (),
    targets: Sequence[Target] = (),
    modules: Sequence[Module] = (),
) -> RunData:
    """Make the run `run_dir` from a file of records; all of it, or nothing is left behind.

    source: plain, gzip or bz2, told by its first bytes. run_dir: a name that is free, or an empty folder. tokens: the
    reading that the distances are of, "last" or "mean". The rest is what is known of the model, for the manifest;
    without streams both count `transformer_blocks.{i}` from 0, as on SD3.
    Raises RunError, with the line's number, for the first line that is not such a record, and if the model has another
    number of blocks.
    """
    known = {"family": family, "flavour": flavour, "model_class": model_class, "targets": tuple(targets)}
    known |= {"streams": tuple(streams), "modules": tuple(modules)}
    with new_folder(run_dir) as staging:
        writer: RecordWriter | None = None
        for rows in read_records(Path(source), tokens):
            if writer is None:
                manifest = create_run(staging, article_manifest(rows, Path(source), tokens, **known))
                writer = RecordWriter(staging, manifest, rank=0)
            writer.write(rows)
        assert writer is not None
        writer.close()
    return load_run(run_dir)


def export_article(
    run: RunData, file: RunPath | BinaryIO, tokens: str = "last", facts: bool = False, *, force: bool = False
) -> tuple[int, int]:
    """Write the run's samples as records; returns (written, skipped).

    file: one that ends in .gz or .bz2 is compressed; or an open file. tokens: the reading to write. facts: whether
    to write what is known of FACT_KEYS too, the image as the 16 hex digits of its hash.
    Every number is written so that reading it back gives the same float64. A sample with a distance that is not
    finite cannot be a record and is skipped. A run without a text stream gives records without
    `encoder_hidden_states`.
    Raises RunError if the run has not this reading, no image stream, a stream that the format does not know, or no
    sample to write, ConfigError for a name that may not be written (`require_file`); the file is complete or absent.
    """
    path = require_file(file, force=force) if isinstance(file, str | os.PathLike) else None
    run.manifest.stream("image")
    unknown = [name for name in run.streams if name not in RECORD_KEYS]
    if unknown:
        raise RunError(f"{run.path} has a stream {unknown[0]!r}; the record format knows image and text only")
    if tokens not in TOKENS:
        raise ConfigError(f"tokens is {tokens!r}; expected one of {', '.join(TOKENS)}")
    distances = {name: run.distances(name, tokens) for name in RECORD_KEYS if name in run.streams}
    finite_N = np.ones(run.samples, dtype=bool)
    for distance_NL in distances.values():
        finite_N &= np.isfinite(distance_NL).all(axis=1)
    if not run.samples:
        raise RunError(f"{run.path} has no samples; let the probe run record some, or import a file")
    if not finite_N.any():
        raise RunError(f"{run.path}: none of its {run.samples} samples has finite distances; nothing to export")

    def write(raw: BinaryIO) -> None:
        with compressed(raw, path) as out:
            for sample in np.flatnonzero(finite_N).tolist():
                record: dict[str, Any] = {"timestep": float(run.sigma[sample])}
                for name, distance_NL in distances.items():
                    record[RECORD_KEYS[name]] = distance_NL[sample].tolist()
                if facts:
                    record |= _known_facts(run, sample)
                out.write(json.dumps(record).encode() + b"\n")

    if path is None:
        write(cast("BinaryIO", file))
    else:
        write_export(path, write, force=force)
    written = int(finite_N.sum())
    return written, run.samples - written


def write_export(path: Path, write: Callable[[BinaryIO], object], *, force: bool) -> None:
    """`write_new_file`, with a RunError for a name that somebody else took in the meantime."""
    try:
        write_new_file(path, write, replace=force)
    except FileExistsError:
        raise RunError(f"{path} exists by now; export to another name") from None


def compressed(raw: BinaryIO, path: Path | None) -> AbstractContextManager[Any]:
    """A file that writes into `raw`, to be named `path`, and leaves it open; the same records give the same bytes."""
    suffix = path.suffix.lower() if path else ""
    if suffix == ".gz":
        return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0)
    if suffix == ".bz2":
        return bz2.BZ2File(raw, "wb")
    return nullcontext(raw)


def _known_facts(run: RunData, sample: int) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name in FACT_KEYS:
        if name == "loss":
            if math.isfinite(run.loss[sample]):
                known[name] = run.loss[sample].item()
        elif (value := run.facts[name][sample]) != UNKNOWN[name]:
            known[name] = _AS_JSON.get(name, int)(value)
    return known
