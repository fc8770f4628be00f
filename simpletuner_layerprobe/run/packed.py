"""Packing: several shards' rows of one rank into one file, with the pieces that they were written in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.run.records import MAX_BACKENDS, MAX_PIECES, Rows, Run, rank_and_index, shard_parts

PACKED_BYTES = 32 * 1024 * 1024
"""A packed shard is not made larger: about 100,000 samples of 75 distances."""
MAX_NAMES = 64 * 1024  # characters of the data backends' names


@dataclass(frozen=True)
class Part:
    """Rows of one rank from the shard `path`. pieces: index and rows of each piece in them, (P, 2) int64."""

    path: Path
    rank: int
    rows: Rows
    pieces: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.rows.columns().values(), *self.rows.distances.values()))

    def where(self, kept_P: NDArray[np.bool_]) -> Part:
        """Some of the pieces."""
        if kept_P.all():
            return self
        rows = self.rows.where(np.repeat(kept_P, self.pieces[:, 1]))
        return replace(self, rows=rows, pieces=self.pieces[kept_P])

    def kind(self) -> tuple[object, ...]:
        """Parts of one file must agree in it."""
        return self.rank, *(array.dtype for array in self.rows.distances.values())


def parts(run: Run) -> Iterator[Part]:
    """The rows of a run, a shard at a time, each once. Raises ProbeError naming a shard that is broken."""
    for shard, kept_N in run.open_shards({}):
        rank, _ = rank_and_index(shard.path)
        part = Part(shard.path, rank, shard.rows(run.manifest), np.stack(shard.pieces(), axis=1))
        if kept_N is not None:
            starts_P = np.cumsum(part.pieces[:, 1]) - part.pieces[:, 1]
            part = part.where(kept_N[starts_P])
        yield part


def packs(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Neighbours that fit into one file together; a part as large as a file stays alone."""
    waiting: list[Part] = []
    size_bytes = pieces = 0
    names: dict[str, None] = {}
    for part in parts:
        size_bytes += part.size_bytes
        pieces += len(part.pieces)
        names |= dict.fromkeys(part.rows.backends)
        fits = size_bytes <= PACKED_BYTES and pieces <= MAX_PIECES
        fits &= len(names) <= MAX_BACKENDS and sum(map(len, names)) <= MAX_NAMES
        if waiting and not (fits and part.kind() == waiting[0].kind()):
            yield waiting
            waiting = []
            size_bytes, pieces, names = part.size_bytes, len(part.pieces), dict.fromkeys(part.rows.backends)
        waiting.append(part)
    if waiting:
        yield waiting


def joined(pack: list[Part]) -> tuple[Rows, NDArray[np.int64]]:
    """The rows of one file's parts in their order, and their pieces."""
    if len(pack) == 1:
        return pack[0].rows, pack[0].pieces
    backends = tuple(dict.fromkeys(name for part in pack for name in part.rows.backends))
    number = {name: index for index, name in enumerate(backends)}
    every = [_renumbered(part.rows, number) for part in pack]
    columns = {f"{name}_N": np.concatenate([rows.columns()[name] for rows in every]) for name in every[0].columns()}
    distances = {key: np.concatenate([rows.distances[key] for rows in every]) for key in every[0].distances}
    pieces = np.concatenate([part.pieces for part in pack])
    return Rows(**columns, backends=backends, distances=distances), pieces


def packed_file(rows: Rows, pieces: NDArray[np.int64], rank: int, identity: str) -> list[bytes | memoryview]:
    """The file of a shard with these rows and pieces: one piece makes a shard as the writer's."""
    return shard_parts(rows, rank, identity, pieces if len(pieces) > 1 else None)


def _renumbered(rows: Rows, number: dict[str, int]) -> Rows:
    """The same rows with the data backends counted by `number`."""
    new_index = np.array([*(number[name] for name in rows.backends), -1], dtype=np.int16)
    return replace(rows, backends=tuple(number), backend_N=new_index[rows.backend_N])  # -1 takes the last
