"""Merging: runs that were recorded on different machines become one.

Rows are told apart by their content: what a writer wrote at once, a *piece* (see compact.py), is counted once even if
it is in several runs, or several times in one: because a folder was copied, or merged before. The ranks of the first
run keep their numbers, those of the others get the next free ones, so that every row of the result still has its own
rank and index. A run with stratified sigmas is stratified by itself, not together with the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.folder import free_target, new_folder
from simpletuner_layerprobe.run.manifest import MAX_MANIFEST_BYTES, RunPath, plain_file_size, write_new_file
from simpletuner_layerprobe.run.packed import Part, joined, packed_file, packs, parts
from simpletuner_layerprobe.run.records import (
    MAX_RANK,
    SHARDS_NAME,
    Rows,
    Run,
    create_run,
    open_run,
    rank_and_index,
    shard_name,
)

CONFIG_NAME = "config.json"
MIN_PAIRS = 8
"""So many equal pairs of neighbouring sigmas are no chance: two runs drew them from the same seed."""


@dataclass
class Source:
    """What was taken from one run. ranks: its rank -> the rank in the result. samples: those that it gave.

    skipped: its samples that the result had already. same_sigmas: an earlier run that drew the same sigmas for samples
    that are not the same, None if there is none.
    """

    path: Path
    ranks: dict[int, int]
    samples: int = 0
    skipped: int = 0
    same_sigmas: Path | None = None
    pairs: list[NDArray[np.uint64]] = field(default_factory=list, repr=False)


def merge(run_dirs: Sequence[RunPath], out_dir: RunPath) -> list[Source]:
    """Make the run `out_dir` of all samples of these runs, each once; all of it, or nothing is left behind.

    out_dir: a name that is free, or an empty folder, and not inside one of the runs, which stay as they are. Its
    manifest and config.json are the first run's. Returns a Source per run. Raises ProbeError if the runs differ in what
    decides the recorded numbers (naming the differences), have no samples, or are damaged.
    """
    target = free_target(out_dir, "merge into")
    runs = [open_run(path) for path in run_dirs]
    if len(runs) < 2:
        raise ProbeError(f"there is {len(runs)} run to merge into {out_dir}; expected at least two")
    first = runs[0]
    for run in runs:
        if run.path.resolve() in target.parents:
            raise ProbeError(f"{out_dir} is inside the run {run.path}; merge into a folder outside of it")
        difference = first.manifest.difference(run.manifest)
        if difference:
            raise ProbeError(
                f"{run.path} is not of the same kind as {first.path} ('here'): {'; '.join(difference)}; "
                f"merge runs of one model and one config"
            )
    sources = _sources(runs)
    identity = first.manifest.identity()
    seen: set[bytes] = set()
    with new_folder(target) as staging:
        create_run(staging, first.manifest)
        for run, source in zip(runs, sources, strict=True):
            for pack in packs(_new_parts(run, source, seen)):
                rows, pieces = joined(pack)
                path = staging / SHARDS_NAME / shard_name(pack[0].rank, int(pieces[-1, 0]))
                _write(path, packed_file(rows, pieces, pack[0].rank, identity))
        open_run(staging).require_samples()
        _copy_config(runs, staging)
    _compare_sigmas(sources)
    return sources


def _sources(runs: Sequence[Run]) -> list[Source]:
    sources: list[Source] = []
    free = 0
    for run in runs:
        ranks = sorted({rank_and_index(path)[0] for path in run.shards})
        numbers = ranks if not sources else range(free, free + len(ranks))
        sources.append(Source(run.path, dict(zip(ranks, numbers, strict=True))))
        free = max([free, *(number + 1 for number in numbers)])
    if free > MAX_RANK + 1:
        raise ProbeError(f"the runs have more than {MAX_RANK + 1} ranks together; merge fewer of them")
    return sources


def _new_parts(run: Run, source: Source, seen: set[bytes]) -> Iterator[Part]:
    """The pieces of a run that are not in `seen`, under their new rank; they are added to it."""
    for part in parts(run):
        kept_P = np.zeros(len(part.pieces), dtype=bool)
        start = 0
        for i, (_, count) in enumerate(part.pieces.tolist()):
            digest = _digest(part.rows.where(slice(start, start + count)))
            kept_P[i] = digest not in seen
            seen.add(digest)
            start += count
        if kept_P.any():
            new = replace(part.where(kept_P), rank=source.ranks[part.rank])
            source.samples += len(new.rows)
            source.pairs.append(_sigma_pairs(new.rows.sigma_N))
            yield new
        source.skipped += int(part.pieces[~kept_P, 1].sum())


def _digest(rows: Rows) -> bytes:
    """What is the same for the same rows alone, wherever they are: 16 bytes of BLAKE2b."""
    used, use_N = np.unique(rows.backend_N, return_inverse=True)
    names = [rows.backends[index] if index >= 0 else "" for index in used.tolist()]
    order = sorted(range(len(names)), key=lambda i: (used[i] >= 0, names[i]))
    digest = hashlib.blake2b(json.dumps([names[i] for i in order]).encode(), digest_size=16)
    columns = rows.columns() | {"backend": np.argsort(order)[use_N]}
    for array in (*columns.values(), *rows.distances.values()):
        digest.update(array.dtype.str.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _sigma_pairs(sigma_N: NDArray[np.float64]) -> NDArray[np.uint64]:
    """A mark for each pair of neighbours, of about a sixteenth of them, whatever rows are before or after."""
    bits_N = sigma_N.view(np.uint64)
    mixed_N = bits_N * np.uint64(0x9E3779B97F4A7C15)
    return (mixed_N[:-1] ^ (bits_N[1:] >> np.uint64(1)))[mixed_N[:-1] >> np.uint64(60) == 0]


def _compare_sigmas(sources: Sequence[Source]) -> None:
    """Note for each run an earlier one with at least half of the same pairs of sigmas."""
    found: list[NDArray[np.uint64]] = []
    for source in sources:
        mine = np.unique(np.concatenate([np.zeros(0, np.uint64), *source.pairs]))
        source.pairs = []
        for earlier, pairs in zip(sources, found, strict=False):
            if np.isin(mine, pairs, assume_unique=True).sum() >= max(MIN_PAIRS, len(mine) / 2):
                source.same_sigmas = earlier.path
                break
        found.append(mine)


def _copy_config(runs: Sequence[Run], staging: Path) -> None:
    """The first config.json that there is: the user's SimpleTuner options, for the follow-up's config."""
    for run in runs:
        path = run.path / CONFIG_NAME
        if path.exists() or path.is_symlink():
            size_bytes = plain_file_size(path)
            if size_bytes > MAX_MANIFEST_BYTES:
                raise ProbeError(f"{path} takes {size_bytes} bytes; SimpleTuner's options take a few kilobytes")
            _write(staging / CONFIG_NAME, [path.read_bytes()])
            return


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    write_new_file(path, lambda file: file.writelines(parts))
