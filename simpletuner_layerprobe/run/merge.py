"""Merging: runs that were recorded on different machines become one.

Stream files are copied as they are, up to their last whole batch. Each says who recorded it (run id, rank and start):
what is in several of the runs, because a folder was copied or merged before, counts once. Nothing is numbered anew: a
reader takes stream files of every run whose manifest says the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.folder import RunPath, new_folder, plain_file_size, write_new_file
from simpletuner_layerprobe.run.manifest import MAX_MANIFEST_BYTES, create_run, new_run_id, read_manifest, run_folder
from simpletuner_layerprobe.run.records import stream_files
from simpletuner_layerprobe.run.stream_file import StreamFile, file_name, new_start
from simpletuner_layerprobe.targets import require_new_folder

KEPT_NAMES = ("config.json", "training.json")
_PIECE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Source:
    """What was taken from one run. samples: those that it gave. skipped: its samples that another run gave."""

    path: Path
    samples: int
    skipped: int


def merge(run_dirs: Sequence[RunPath], out_dir: RunPath) -> list[Source]:
    """Make the run `out_dir` of all samples of these runs, each once; all of it, or nothing is left behind.

    out_dir: a name that is free, or an empty folder, and not inside a run; the runs stay as they are. Its manifest,
    config.json and training.json are the first run's, with a run id of its own. Of a file that is in several runs the
    longest is taken. Returns a Source per run. Raises RunError if the runs differ in what decides the recorded numbers
    (naming the differences), have no samples, or are damaged.
    """
    require_new_folder(out_dir)
    paths = [run_folder(path) for path in run_dirs]
    if len(paths) < 2:
        raise RunError(f"there is {len(paths)} run to merge into {out_dir}; expected at least two")
    manifests = [read_manifest(path) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        difference = manifests[0].difference(manifest)
        if difference:
            raise RunError(
                f"{path} is not of the same kind as {paths[0]} ('here'): {'; '.join(difference)}; "
                f"merge runs of one model and one config"
            )
    files = [stream_files(path, manifest) for path, manifest in zip(paths, manifests, strict=True)]
    taken: dict[tuple[str, int, str], StreamFile] = {}
    for stream_file in (stream_file for each in files for stream_file in each if stream_file.samples):
        if taken.setdefault(stream_file.key, stream_file).samples < stream_file.samples:
            taken[stream_file.key] = stream_file
    if not taken:
        raise RunError(f"none of the runs to merge into {out_dir} has samples; let the probe run record some")
    with new_folder(out_dir) as staging:
        manifest = create_run(staging, replace(manifests[0], run_id=new_run_id()))
        for stream_file in taken.values():
            name = stream_file.path.name
            while os.path.lexists(staging / name):  # two machines drew the same name
                name = file_name(stream_file.rank, new_start())
            _copy(stream_file.path, stream_file.end, staging / name)
        _copy_options(paths, staging)
        stream_files(staging, manifest)
    return [_source(path, each, taken) for path, each in zip(paths, files, strict=True)]


def _source(path: Path, files: Sequence[StreamFile], taken: dict[tuple[str, int, str], StreamFile]) -> Source:
    samples = sum(stream_file.samples for stream_file in files if taken.get(stream_file.key) is stream_file)
    return Source(path, samples, sum(stream_file.samples for stream_file in files) - samples)


def _copy(source: Path, size_bytes: int, target: Path) -> None:
    """The first `size_bytes` of a file, in pieces."""

    def write(out: BinaryIO) -> None:
        left = size_bytes
        with open(source, "rb") as file:
            while left and (piece := file.read(min(left, _PIECE_BYTES))):
                out.write(piece)
                left -= len(piece)

    write_new_file(target, write)


def _copy_options(paths: Sequence[Path], staging: Path) -> None:
    """Of the first run that has any: the user's SimpleTuner options, for the follow-up's config, and what they train.

    Raises RunError for what is no plain file, or too large.
    """
    having = [path for path in paths if os.path.lexists(path / KEPT_NAMES[0])]
    for path in (path / name for path in having[:1] for name in KEPT_NAMES):
        if os.path.lexists(path):
            size_bytes = plain_file_size(path)
            if size_bytes > MAX_MANIFEST_BYTES:
                raise RunError(f"{path} takes {size_bytes} bytes; SimpleTuner's options take a few kilobytes")
            _copy(path, size_bytes, staging / path.name)
