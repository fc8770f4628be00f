"""Heatmaps: the mean angular distance per sigma bin and block, one per stream.

Shape letters: N samples, T bins, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.shards import Run


@dataclass(frozen=True)
class Heatmap:
    """One stream's mean angular distances.

    mean_TL: (T, L) float64, fractions of pi in [0, 1]; 0 where a cell has no sample, as in the article.
    count_T: (T,) int64, the samples that each row of cells is the mean of.
    nonfinite: samples left out of this stream because a distance was NaN or infinite.
    bins: T; the bins have equal widths over sigma 0 (clean) .. 1 (noise).
    """

    stream: str
    tokens: str
    blocks: tuple[str, ...]
    mean_TL: NDArray[np.float64]
    count_T: NDArray[np.int64]
    nonfinite: int
    bins: int

    def empty_bins(self) -> tuple[int, ...]:
        """The bins without a sample, in order."""
        return tuple(int(t) for t in np.flatnonzero(self.count_T == 0))


def bin_edges(bins: int) -> NDArray[np.float64]:
    """The T + 1 edges of T equal bins over sigma 0 .. 1. Returns (T + 1,) float64."""
    return np.arange(bins + 1, dtype=np.float64) / bins


def bin_index(sigma_N: NDArray[np.floating], bins: int) -> NDArray[np.int64]:
    """The bin of each sigma in [0, 1]: floor(sigma * bins), a sigma of exactly 1 in the last bin.

    Returns (N,) int64 in [0, bins - 1].
    """
    if bins < 1:
        raise ProbeError(f"the number of sigma bins is {bins}, at least 1 is needed")
    index_N = np.floor(np.asarray(sigma_N, dtype=np.float64) * bins).astype(np.int64)
    return np.clip(index_N, 0, bins - 1)


def heatmaps(run: Run, *, tokens: str = "last", bins: int = 10) -> dict[str, Heatmap]:
    """One heatmap per stream of a run, the image stream first, in one pass over the shards.

    `tokens` is the reading: "last" (the article's) or "mean". Sums are taken in float64. A sample with a
    non-finite distance anywhere in a stream is left out of that stream and counted.
    Raises ProbeError if the run has no samples or was not recorded with this reading.
    """
    manifest = run.manifest
    if tokens not in manifest.tokens:
        raise ProbeError(f"{run.path} has no reading {tokens!r}; it has: {', '.join(manifest.tokens)} (see --tokens)")
    streams = sorted(manifest.streams, key=lambda stream: stream.name != "image")
    sum_TL = {s.name: np.zeros((bins, len(s.blocks))) for s in streams}
    count_T = {s.name: np.zeros(bins, dtype=np.int64) for s in streams}
    nonfinite = {s.name: 0 for s in streams}
    for sigma_N, distances in run.distances(tokens):
        bin_of_N = bin_index(sigma_N, bins)
        for stream in streams:
            name, L = stream.name, len(stream.blocks)
            distance_NL, bin_N = distances[name], bin_of_N
            with np.errstate(over="ignore", invalid="ignore"):
                total = distance_NL.sum()  # it keeps every NaN and infinity
            if not np.isfinite(total):
                finite_N = np.isfinite(distance_NL).all(axis=1)
                nonfinite[name] += int(np.count_nonzero(~finite_N))
                distance_NL, bin_N = distance_NL[finite_N], bin_N[finite_N]
            cell_NL = bin_N[:, None] * L + np.arange(L)
            sum_TL[name] += np.bincount(cell_NL.ravel(), weights=distance_NL.ravel(), minlength=bins * L).reshape(
                bins, L
            )
            count_T[name] += np.bincount(bin_N, minlength=bins)
    if not any(nonfinite[s.name] or count_T[s.name].any() for s in streams):
        run.require_samples()
    return {
        s.name: Heatmap(
            stream=s.name,
            tokens=tokens,
            blocks=s.blocks,
            mean_TL=sum_TL[s.name] / np.maximum(count_T[s.name], 1)[:, None],
            count_T=count_T[s.name],
            nonfinite=nonfinite[s.name],
            bins=bins,
        )
        for s in streams
    }


def all_blocks(streams: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Every block of the streams once: the first stream's in order, then what only later streams have.

    A block that only a later stream has stands right after the block before it in its own stream (at the
    front if there is none), so that the list keeps the model's order. Block numbers are positions in it.
    """
    merged = list(streams[0])
    for stream in streams[1:]:
        position = 0
        for block in stream:
            if block not in merged:
                merged.insert(position, block)
            position = merged.index(block) + 1
    return tuple(merged)


def common_blocks(streams: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The blocks that every stream has, in the first stream's order. Raises ProbeError if there is none."""
    common = tuple(block for block in streams[0] if all(block in other for other in streams[1:]))
    if not common:
        raise ProbeError("the streams of this run share no block, so they cannot be combined")
    return common


def columns(heatmap: Heatmap, blocks: Sequence[str]) -> NDArray[np.float64]:
    """The columns of `blocks` of a heatmap's means. Returns (T, len(blocks)) float64."""
    position = {block: i for i, block in enumerate(heatmap.blocks)}
    return heatmap.mean_TL[:, [position[block] for block in blocks]]


def combined(streams: Mapping[str, Heatmap]) -> Heatmap:
    """The plain mean of the streams over the blocks that all of them have: the article's Figure 2.

    On SD3.5 Large it is `np.add(text, image[:, :-1]) / 2`. A cell counts as empty where any stream has no
    sample in that bin. Raises ProbeError if the streams share no block.
    """
    parts = tuple(streams.values())
    blocks = common_blocks([part.blocks for part in parts])
    return Heatmap(
        stream="combined",
        tokens=parts[0].tokens,
        blocks=blocks,
        mean_TL=np.sum([columns(part, blocks) for part in parts], axis=0) / float(len(parts)),
        count_T=np.minimum.reduce([part.count_T for part in parts]),
        nonfinite=max(part.nonfinite for part in parts),
        bins=parts[0].bins,
    )
