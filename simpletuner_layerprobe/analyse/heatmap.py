"""Heatmaps: the mean angular distance, or that of another reading, per sigma bin and block, one per stream.

Shape letters: N samples, T bins, L blocks, C columns of a reading, P blocks in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.units import bin_index, unit_means
from simpletuner_layerprobe.errors import ProbeError


@dataclass(frozen=True)
class Heatmap:
    """One stream's mean angular distances, or those of another reading of single blocks.

    values_TL: (T, L) float64, of an angle fractions of pi in [0, 1]; 0 where a bin has no sample, as in the article,
    and NaN where none of its samples has the block's number (the cosine of an update of zero). counts_T: (T,) int64,
    samples of each bin. standard_errors_TL: (T, L), by how much other images would move each value, NaN where that
    cannot be told. nonfinite: samples left out of this stream because a distance was NaN or infinite. The bins have
    equal widths over sigma 0 (clean) .. 1 (noise).
    """

    stream: str
    reading: str
    blocks: tuple[str, ...]
    values_TL: NDArray[np.float64]
    counts_T: NDArray[np.int64]
    standard_errors_TL: NDArray[np.float64]
    nonfinite: int

    @property
    def bins(self) -> int:
        return len(self.counts_T)

    def empty_bins(self) -> tuple[int, ...]:
        """The bins without a sample, in order."""
        return tuple(int(t) for t in np.flatnonzero(self.counts_T == 0))


@dataclass(frozen=True)
class PairHeatmap:
    """One stream's mean angular distances over several blocks in a row.

    values_PL: (P, L) float64, fractions of pi: row n - 1 is for n blocks, column l for those from block l on. Each is
    the mean over the sigma bins that have samples, with equal weights; NaN where there is no such pair. samples: how
    many the run has.
    """

    stream: str
    reading: str
    blocks: tuple[str, ...]
    values_PL: NDArray[np.float64]
    samples: int


def bin_edges(bins: int) -> NDArray[np.float64]:
    """The T + 1 edges of T equal bins over sigma 0 .. 1. Returns (T + 1,) float64."""
    return np.arange(bins + 1, dtype=np.float64) / bins


def heatmaps(samples: Samples, bins: int = 10) -> dict[str, Heatmap]:
    """One heatmap per stream, the image stream first.

    A sample with a non-finite distance anywhere in a stream is left out of that stream and counted; of a reading that
    may lack a number (`Reading.complete`), only where it does. Raises ProbeError without samples, and for a reading
    over several blocks (see `pair_heatmaps`).
    """
    if samples.kind.span > 1:
        raise ProbeError(f"{samples.reading} is over {samples.kind.span} blocks in a row: it has a heatmap of its own")
    means = unit_means(samples, bins)
    made = {}
    for name, columns in means.columns.items():
        values_TL, count_TL = means.mean_TD[:, columns], means.count_TD[:, columns]
        counts_T = np.bincount(bin_index(samples.sigma_N, bins), minlength=bins)
        if samples.kind.complete:
            counts_T = count_TL.max(axis=1)
        made[name] = Heatmap(
            stream=name,
            reading=samples.reading,
            blocks=samples.blocks[name],
            values_TL=np.where(counts_T[:, None] == 0, 0.0, values_TL),
            counts_T=counts_T.astype(np.int64),
            standard_errors_TL=means.error_TD[:, columns],
            nonfinite=means.nonfinite[name] if samples.kind.complete else 0,
        )
    return made


def pair_heatmaps(spans: Sequence[Samples], bins: int = 10) -> dict[str, PairHeatmap]:
    """One heatmap over pairs of blocks per stream. spans: the samples of each reading, single blocks among them.

    Raises ProbeError without samples or without a reading over several blocks.
    """
    longest = max((samples.kind.span for samples in spans), default=1)
    if longest < 2:
        raise ProbeError(
            "the run has no distances over several blocks; a probe run records them with layerprobe_block_pairs"
        )
    first = min(spans, key=lambda samples: samples.kind.span)
    values = {name: np.full((longest, len(blocks)), np.nan) for name, blocks in first.blocks.items()}
    for samples in spans:
        means = unit_means(samples, bins)
        for name, columns in means.columns.items():
            mean_TC = means.mean_TD[:, columns]
            filled_TC = np.isfinite(mean_TC)
            with np.errstate(invalid="ignore"):
                mean_C = np.where(filled_TC, mean_TC, 0.0).sum(axis=0) / filled_TC.sum(axis=0)
            values[name][samples.kind.span - 1, : len(mean_C)] = mean_C
    return {
        name: PairHeatmap(name, first.kind.tokens, first.blocks[name], values_PL, first.samples)
        for name, values_PL in values.items()
    }


def common_blocks(streams: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The blocks that every stream has, in the first stream's order. Raises ProbeError if there is none."""
    common = tuple(block for block in streams[0] if all(block in other for other in streams[1:]))
    if not common:
        raise ProbeError("the streams of this run share no block, so they cannot be combined")
    return common


def columns(values_TL: NDArray[np.float64], blocks: Sequence[str], wanted: Sequence[str]) -> NDArray[np.float64]:
    """The columns of the blocks `wanted` of a table that has one for each of `blocks`, along its last axis."""
    position = {block: i for i, block in enumerate(blocks)}
    return values_TL[..., [position[block] for block in wanted]]


def combined(streams: Mapping[str, Heatmap]) -> Heatmap:
    """The plain mean of the streams over the blocks that all of them have: the article's Figure 2.

    On SD3.5 Large it is `np.add(text, image[:, :-1]) / 2`. A cell counts as empty where any stream has no sample in
    that bin. The standard errors are upper bounds, as if the streams always moved together. Raises ProbeError if the
    streams share no block.
    """
    parts = tuple(streams.values())
    blocks = common_blocks([part.blocks for part in parts])
    values, errors = (
        np.mean([columns(table, part.blocks, blocks) for table, part in zip(tables, parts, strict=True)], axis=0)
        for tables in ([part.values_TL for part in parts], [part.standard_errors_TL for part in parts])
    )
    return Heatmap(
        stream="combined",
        reading=parts[0].reading,
        blocks=blocks,
        values_TL=values,
        counts_T=np.minimum.reduce([part.counts_T for part in parts]),
        standard_errors_TL=errors,
        nonfinite=max(part.nonfinite for part in parts),
    )
