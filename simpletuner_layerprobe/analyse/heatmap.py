"""Heatmaps: the mean angular distance, or that of another reading, per sigma bin and block, one per stream.

Shape letters: N samples, T bins, L blocks, C columns of a reading, P blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import ANGLE, Reading, parse_reading

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Stream
    from simpletuner_layerprobe.run.records import Run


@dataclass(frozen=True)
class Heatmap:
    """One stream's mean angular distances, or those of another reading of single blocks.

    tokens: the reading's name. mean_TL: (T, L) float64, of an angle fractions of pi in [0, 1]; 0 where a cell has no
    sample, as in the article, and NaN where no sample has the block's number (the cosine of an update of zero).
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

    `tokens` is the reading: "last" (the article's) or "mean", or a further one of single blocks (run/readings.py). Sums
    are taken in float64. A sample with a non-finite distance anywhere in a stream is left out of that stream and
    counted; of a reading that may lack a number (`Reading.complete`), only where it does.
    Raises ProbeError if the run has no samples or was not recorded with this reading.
    """
    manifest = run.manifest
    if tokens not in (*manifest.tokens, *(name for name in manifest.extra if parse_reading(name).span == 1)):
        raise ProbeError(f"{run.path} has no reading {tokens!r}; it has: {', '.join(manifest.tokens)} (see --tokens)")
    if not parse_reading(tokens).complete:
        return _incomplete_heatmaps(run, parse_reading(tokens), bins)
    streams = image_first(manifest.streams)
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


def _incomplete_heatmaps(run: Run, reading: Reading, bins: int) -> dict[str, Heatmap]:
    run.require_samples()
    means = _cell_means(run, reading, bins)
    found = {}
    for stream in image_first(run.manifest.streams):
        mean_TL, count_T = means[stream.name]
        mean_TL[count_T == 0] = 0.0
        found[stream.name] = Heatmap(stream.name, reading.name, stream.blocks, mean_TL, count_T, 0, bins)
    return found


@dataclass(frozen=True)
class PairHeatmap:
    """One stream's mean angular distances over several blocks in a row.

    mean_PL: (P, L) float64, fractions of pi: row n - 1 is for n blocks, column l for those from block l on. Each is the
    mean over the sigma bins that have samples, with equal weights; NaN where there is no such pair. samples: how many
    the run has.
    """

    stream: str
    tokens: str
    blocks: tuple[str, ...]
    mean_PL: NDArray[np.float64]
    samples: int


def pair_heatmaps(run: Run, *, tokens: str = "last", bins: int = 10) -> dict[str, PairHeatmap]:
    """One heatmap over pairs of blocks per stream, the image stream first. `tokens` is "last" or "mean".

    Raises ProbeError if the run has no samples or was recorded without pairs.
    """
    manifest = run.manifest
    found = (parse_reading(name) for name in (*manifest.tokens, *manifest.extra))
    readings = [one for one in found if one.kind == ANGLE and one.tokens == tokens]
    if not any(reading.span > 1 for reading in readings):
        raise ProbeError(
            f"{run.path} has no distances over several blocks ({tokens} tokens); a probe run records them with "
            f"layerprobe_block_pairs"
        )
    run.require_samples()
    samples = run.sample_count()
    longest = max(reading.span for reading in readings)
    mean_PL = {stream.name: np.full((longest, len(stream.blocks)), np.nan) for stream in image_first(manifest.streams)}
    for reading in readings:
        for name, (mean_TC, _) in _cell_means(run, reading, bins).items():
            filled_TC = np.isfinite(mean_TC)
            total_C = np.where(filled_TC, mean_TC, 0.0).sum(axis=0)
            with np.errstate(invalid="ignore"):
                mean_PL[name][reading.span - 1, : len(total_C)] = total_C / filled_TC.sum(axis=0)
    return {
        name: PairHeatmap(name, tokens, manifest.stream(name).blocks, values_PL, samples)
        for name, values_PL in mean_PL.items()
    }


def _cell_means(run: Run, reading: Reading, bins: int) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Stream -> (mean_TC of the finite numbers, NaN in a cell without one; count_T of samples) of a reading."""
    sum_TC: dict[str, NDArray[np.float64]] = {}
    number_TC: dict[str, NDArray[np.float64]] = {}
    count_T = np.zeros(bins, dtype=np.int64)
    for sigma_N, values in run.distances(reading.name):
        bin_N = bin_index(sigma_N, bins)
        count_T += np.bincount(bin_N, minlength=bins)
        for name, value_NC in values.items():
            C = value_NC.shape[1]
            cell_NC = bin_N[:, None] * C + np.arange(C)
            finite_NC = np.isfinite(value_NC)
            for total_TC, weight_NC in ((sum_TC, np.where(finite_NC, value_NC, 0.0)), (number_TC, finite_NC)):
                added_TC = np.bincount(cell_NC.ravel(), weights=weight_NC.ravel(), minlength=bins * C)
                total_TC[name] = total_TC.get(name, 0.0) + added_TC.reshape(bins, C)
    with np.errstate(invalid="ignore"):
        return {name: (sum_TC[name] / number_TC[name], count_T) for name in sum_TC}


def image_first(streams: Iterable[Stream]) -> list[Stream]:
    """The streams in the order in which they are shown."""
    return sorted(streams, key=lambda stream: stream.name != "image")


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
