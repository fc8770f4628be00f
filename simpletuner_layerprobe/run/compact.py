"""Compacting: many small shards of a run become few large ones, at any moment, also while the run is recorded.

A compacted shard holds the rows of several shards of one rank in their order, and says in its metadata under which
indices and with how many rows each was written: its *pieces*. It takes the name of the last of them. So

- readers tell from the pieces what they have read already, and each row counts once, also while the shards that it came
  from are still there, also if they vanish under a reader (`Run.open_shards`);
- the highest index of a rank never goes down: a writer, which takes the next one, never uses an index twice;
- rows keep their order.

The order of the steps: the new shard is written under a temporary name, synced and read back; it takes the place of its
last piece in one rename, synced; then the other pieces are removed, the last one first. A crash before the rename
changes nothing, one after it leaves shards that the next compaction removes. The metadata's schema differs from that of
other shards from the rename on: a version that does not know about pieces refuses the run and never counts twice.

One compaction of a run at a time: it holds a lock, and refuses to work in a folder that cannot be locked. Only complete
shards are touched; whoever records goes on beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.lock import locked
from simpletuner_layerprobe.run.manifest import RunPath, plain_file_size, sync_folder
from simpletuner_layerprobe.run.packed import PACKED_BYTES, Part, joined, packed_file, packs, parts
from simpletuner_layerprobe.run.records import SHARDS_NAME, Run, open_run, rank_and_index

LOCK_NAME = "compact.lock"
TEMPORARY_NAME = ".layerprobe-c0.tmp"  # the lock's holder alone uses it, also the one that a crash left


@dataclass(frozen=True)
class Compaction:
    """What was done. before, after: shards. removed: shards that an earlier, interrupted compaction had left."""

    before: int
    after: int
    removed: int


def compact(run_dir: RunPath) -> Compaction:
    """Rewrite the run's small shards into larger ones, at most PACKED_BYTES each. No row is lost or counted twice.

    Raises ProbeError, with everything in place, if a shard is broken, if another process is compacting this run, or if
    its folder cannot be locked.
    """
    run = open_run(run_dir)
    folder = run.path / SHARDS_NAME
    if not run.shards:
        return Compaction(0, 0, 0)
    with locked(folder / LOCK_NAME, f"{run_dir} is being compacted by another process; wait for it") as held:
        if not held:
            raise ProbeError(
                f"files in {folder} cannot be locked, so it cannot be compacted safely; compact a copy on a local disk"
            )
        run = open_run(run_dir)
        before = len(run.shards)
        removed = _remove_leftovers(run)
        run = open_run(run_dir)
        identity = run.manifest.identity()
        for neighbours in _neighbours(run):
            for pack in packs(neighbours):
                if len(pack) > 1:
                    _replace(pack, identity)
        return Compaction(before, len(open_run(run_dir).shards), removed)


def _remove_leftovers(run: Run) -> int:
    """Remove the shards all of whose pieces are in a later compacted shard of their rank. Returns how many."""
    removed = 0
    last: tuple[int, dict[int, int]] = (-1, {})  # the rank, and the pieces of the shards after this one
    for path in reversed(run.shards):
        rank, _ = rank_and_index(path)
        if rank != last[0]:
            last = rank, {}
        with run.open(path) as shard:
            index_P, rows_P = shard.pieces()
        pieces = dict(zip(index_P.tolist(), rows_P.tolist(), strict=True))
        twice = pieces.keys() & last[1].keys()
        if any(pieces[index] != last[1][index] for index in twice) or (twice and twice != pieces.keys()):
            raise ProbeError(
                f"shard {path} holds some rows that a later one holds too, and others; no compaction left it: "
                f"move it out of the folder to compact the run without it"
            )
        if twice:
            _remove(path)
            removed += 1
        last[1].update(pieces)
    if removed:
        sync_folder(run.path / SHARDS_NAME)
    return removed


def _neighbours(run: Run) -> Iterator[Iterator[Part]]:
    """The shards that are worth packing, in stretches without a larger one between them."""

    def stretch_of(path: Path) -> tuple[int, bool]:
        return rank_and_index(path)[0], plain_file_size(path) > PACKED_BYTES // 2

    for (_, large), paths in groupby(run.shards, stretch_of):
        if not large:
            yield parts(replace(run, shards=tuple(paths)))


def _replace(pack: list[Part], identity: str) -> None:
    """Put one shard in the place of several."""
    rows, pieces = joined(pack)
    last = pack[-1].path
    file_parts = packed_file(rows, pieces, pack[-1].rank, identity)
    temporary = last.with_name(TEMPORARY_NAME)
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            file.writelines(file_parts)
            file.flush()
            os.fsync(file.fileno())
        _check_equal(temporary, file_parts)
        os.replace(temporary, last)
        sync_folder(last.parent)
    except OSError as error:
        raise ProbeError(f"cannot write {last}: {error.strerror or error}; no row is lost") from None
    finally:
        temporary.unlink(missing_ok=True)
    for part in reversed(pack[:-1]):
        _remove(part.path)
    sync_folder(last.parent)


def _check_equal(path: Path, file_parts: list[bytes | memoryview]) -> None:
    with open(path, "rb") as file:
        same = all(file.read(len(part)) == part for part in file_parts) and not file.read(1)
    if not same:
        raise ProbeError(f"{path} does not read back as it was written; the disk is failing, the run is as it was")


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise ProbeError(
            f"cannot remove {path}: {error.strerror}; its rows are in a later shard, none is lost"
        ) from None
