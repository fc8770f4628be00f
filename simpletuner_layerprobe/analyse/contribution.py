"""Contributions: one number per block, 1 for the block that changes the hidden states most.

By ablation: 1 for the block that the loss needs most. Leaving out a block that hardly matters can lower the loss of the
samples at hand: a mean of a cell below 0 counts as 0, here and in the replicates, and for critical blocks.

Shape letters: T bins, L blocks, R sets of heatmaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.heatmap import Heatmap, columns, common_blocks
from simpletuner_layerprobe.errors import ConfigError, ProbeError
from simpletuner_layerprobe.readings import all_blocks

TUKEY_FAR_OUT = 3.0
"""Tukey's "far out" fence lies this many interquartile ranges above the third quartile."""


@dataclass(frozen=True)
class Contribution:
    """What each block contributes, for every block that any stream has, in the model's order.

    value_L: (L,) float64 in [0, 1]; 1 is the largest measured contribution, 0 the smallest.
    covered_L: (L,) bool; False where the block took the value of its nearest covered neighbour.
    critical: per stream, the numbers of its critical blocks (see `critical_blocks`).
    dropped: the streams that were left out because they have no sample with finite distances.
    """

    blocks: tuple[str, ...]
    value_L: NDArray[np.float64]
    covered_L: NDArray[np.bool_]
    critical: dict[str, tuple[int, ...]]
    dropped: tuple[str, ...] = ()

    def critical_union(self) -> tuple[int, ...]:
        """The numbers of the blocks that are critical in any stream, ascending."""
        return tuple(sorted({number for numbers in self.critical.values() for number in numbers}))

    def least(self, count: int) -> tuple[int, ...]:
        """The numbers of the `count` blocks that contribute least, ascending; of equal ones those with lower numbers.

        Raises ConfigError for a count below 1, and for more blocks than there are.
        """
        if not 1 <= count <= len(self.blocks):
            raise ConfigError(
                f"the {count} blocks that contribute least are asked for; there are {len(self.blocks)} blocks"
            )
        return least_blocks(self.value_L, count)


def least_blocks(value_L: NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The numbers of the `count` smallest, ascending; of equal ones the lower numbers."""
    return tuple(sorted(np.argsort(value_L, kind="stable")[:count].tolist()))


def article_contributions(
    streams: Mapping[str, Heatmap],
    *,
    by_own: bool = False,
    clip_percentile: float = 90.0,
    text_weight: float = 1 / 3,
    image_weight: float = 2 / 3,
) -> Contribution:
    """The article's contributions: clip, weight, combine, average over the bins, min-max normalise.

    Each heatmap is clipped at 0 and at its own percentile (numpy's linear one, over all of its cells, those without
    samples included), multiplied by its stream's weight, added up, divided by the number of streams and
    averaged over the bins; the smallest block becomes 0 and the largest 1.

    The rule for streams of unequal blocks: the sum goes over the blocks that every stream has. A block that
    a stream lacks takes the value of the nearest block before it that all have (after it, if none is
    before). On SD3.5 Large that gives the article's numbers: `(text + image[:, :37]) / 2`, and the 38th
    block repeats the 37th. With one stream that stream decides alone and its weight plays no part.
    by_own: such a block takes instead what the streams that have it give it by themselves (`stream_contributions`), for
    several their mean by the weights; the article's recipe does not.

    The text stream has `text_weight`, every other stream `image_weight`. A stream without a sample of finite
    distances (LTX-2's audio where all clips are silent) is left out, with the blocks that only it has. Raises
    ProbeError as `article_averages` does, if no stream has samples, and for contributions that are all equal.
    """
    dropped = tuple(name for name, heatmap in streams.items() if not heatmap.counts_T.any())
    if len(dropped) == len(streams):
        nonfinite = max(heatmap.nonfinite for heatmap in streams.values())
        raise ProbeError(
            f"no stream ({', '.join(dropped)}) has a sample with finite distances ({nonfinite} are not); "
            "probe the model again in a precision that does not overflow"
        )
    streams = {name: heatmap for name, heatmap in streams.items() if name not in dropped}
    parts = tuple(streams.values())
    covered = common_blocks([part.blocks for part in parts])
    blocks = all_blocks([part.blocks for part in parts])
    average_L = article_averages(
        {name: part.values_TL[None] for name, part in streams.items()},
        {name: part.blocks for name, part in streams.items()},
        clip_percentile=clip_percentile,
        text_weight=text_weight,
        image_weight=image_weight,
    )[0]
    low, high = average_L.min(), average_L.max()
    if not high > low:
        raise ProbeError(
            f"all {len(covered)} blocks have the same contribution ({low:.6g}), so nothing can be weighted; "
            "take fewer bins if some have no samples, a higher clip_percentile, or other weights"
        )
    value_L = ((average_L - low) / (high - low))[block_sources([part.blocks for part in parts])]
    if by_own:
        _set_own(
            value_L[None],
            {name: part.values_TL[None] for name, part in streams.items()},
            {name: part.blocks for name, part in streams.items()},
            clip_percentile=clip_percentile,
            text_weight=text_weight,
            image_weight=image_weight,
        )
    return Contribution(
        blocks=blocks,
        value_L=value_L,
        covered_L=np.array([by_own or block in covered for block in blocks]),
        critical=critical_blocks(streams),
        dropped=dropped,
    )


def stream_contributions(
    streams: Mapping[str, Heatmap], *, clip_percentile: float = 90.0
) -> dict[str, NDArray[np.float64]]:
    """Each stream's contributions by itself: stream -> (L,) float64 in [0, 1] for all blocks that any stream has.

    A block that the stream lacks takes the value of its nearest block, as in `article_contributions`, which raises the
    same errors and leaves out the same streams.
    """
    measured = {name: heatmap for name, heatmap in streams.items() if heatmap.counts_T.any()} or streams
    blocks = {name: heatmap.blocks for name, heatmap in measured.items()}
    return {
        name: article_contributions({name: heatmap}, clip_percentile=clip_percentile).value_L[
            stream_sources(name, blocks)
        ]
        for name, heatmap in measured.items()
    }


def stream_sources(stream: str, blocks: Mapping[str, Sequence[str]]) -> NDArray[np.intp]:
    """For every block of `all_blocks`, which of this stream's blocks its contribution by itself comes from. (L,)."""
    own = list(blocks[stream])
    every = all_blocks(list(blocks.values()))
    numbers = np.array([number for number, block in enumerate(every) if block in own])
    return np.array([own.index(every[_nearest_covered(number, numbers)]) for number in range(len(every))])


def article_values(
    mean_RTL: Mapping[str, NDArray[np.float64]],
    blocks: Mapping[str, Sequence[str]],
    *,
    by_own: bool = False,
    **weighting: float,
) -> NDArray[np.float64]:
    """(R, L) the article's contributions of R sets of heatmaps, for every block that any stream has.

    by_own: as `article_contributions` takes it. weighting: as `article_averages` takes it. Blocks that are all equal in
    a set get 0 there.
    """
    average_RC = article_averages(mean_RTL, blocks, **weighting)
    low_R1, high_R1 = average_RC.min(axis=1, keepdims=True), average_RC.max(axis=1, keepdims=True)
    spread_R1 = high_R1 - low_R1
    value_RL: NDArray[np.float64] = ((average_RC - low_R1) / np.where(spread_R1 > 0, spread_R1, 1))[
        :, block_sources(list(blocks.values()))
    ]
    if by_own:
        _set_own(value_RL, mean_RTL, blocks, **weighting)
    return value_RL


def _set_own(
    value_RL: NDArray[np.float64],
    mean_RTL: Mapping[str, NDArray[np.float64]],
    blocks: Mapping[str, Sequence[str]],
    *,
    clip_percentile: float = 90.0,
    text_weight: float = 1 / 3,
    image_weight: float = 2 / 3,
) -> None:
    """Set, in place, the contributions of the blocks that not all streams have: see `article_contributions`."""
    having = {
        number: [name for name in blocks if block in blocks[name]]
        for number, block in enumerate(all_blocks(list(blocks.values())))
    }
    own = stream_values(mean_RTL, blocks, clip_percentile) if any(len(h) < len(blocks) for h in having.values()) else {}
    for number, names in having.items():
        if len(names) < len(blocks):
            weights = [text_weight if name == "text" else image_weight for name in names]
            values = np.stack([own[name][:, number] for name in names])
            value_RL[:, number] = np.average(values, axis=0, weights=weights if any(weights) else None)


def stream_values(
    mean_RTL: Mapping[str, NDArray[np.float64]], blocks: Mapping[str, Sequence[str]], clip_percentile: float = 90.0
) -> dict[str, NDArray[np.float64]]:
    """`stream_contributions` of R sets of heatmaps: stream -> (R, L)."""
    return {
        name: article_values({name: mean_RTL[name]}, {name: blocks[name]}, clip_percentile=clip_percentile)[
            :, stream_sources(name, blocks)
        ]
        for name in blocks
    }


def article_averages(
    mean_RTL: Mapping[str, NDArray[np.float64]],
    blocks: Mapping[str, Sequence[str]],
    *,
    clip_percentile: float = 90.0,
    text_weight: float = 1 / 3,
    image_weight: float = 2 / 3,
) -> NDArray[np.float64]:
    """The article's combination of each of R sets of heatmaps, before the min-max normalisation.

    mean_RTL: stream -> (R, T, L) means, each clipped at 0, then at its own percentile. blocks: stream -> its L blocks.
    Returns (R, C) float64 for the C blocks that every stream has (`common_blocks`). Raises ProbeError for a percentile
    outside (1, 100], and for weights that are negative or both 0.
    """
    if not 1 < clip_percentile <= 100:
        meant = f": did you mean {100 * clip_percentile:g}?" if 0 < clip_percentile <= 1 else ""
        raise ProbeError(f"the clip percentile is {clip_percentile}; expected above 1 and at most 100{meant}")
    if not (0 <= text_weight < np.inf and 0 <= image_weight < np.inf and text_weight + image_weight > 0):
        raise ProbeError(
            f"text_weight is {text_weight} and image_weight {image_weight}; expected numbers of 0 or more, not both 0"
        )
    covered = common_blocks(list(blocks.values()))
    R, T, _ = next(iter(mean_RTL.values())).shape
    total_RTC = np.zeros((R, T, len(covered)))
    for stream, values_RTL in mean_RTL.items():
        weight = 1.0 if len(mean_RTL) == 1 else text_weight if stream == "text" else image_weight
        values_RTL = np.maximum(values_RTL, 0)
        limit_R = np.percentile(values_RTL.reshape(R, -1), clip_percentile, axis=1)
        values_RTC = columns(values_RTL, blocks[stream], covered)
        total_RTC += np.minimum(values_RTC, limit_R[:, None, None]) * weight
    average_RC: NDArray[np.float64] = (total_RTC / float(len(mean_RTL))).mean(axis=1)
    return average_RC


def critical_blocks(streams: Mapping[str, Heatmap]) -> dict[str, tuple[int, ...]]:
    """The blocks whose changes are so large that they hide the rest: `--critical auto`.

    Per stream, on the bins that have samples: the blocks that are `far_out`. The numbers are positions in the list of
    all blocks, which is the image stream's own list on SD3 and Flux.
    """
    return critical_of(
        {name: heatmap.values_TL for name, heatmap in streams.items()},
        {name: heatmap.counts_T for name, heatmap in streams.items()},
        {name: heatmap.blocks for name, heatmap in streams.items()},
    )


def critical_of(
    mean_TL: Mapping[str, NDArray[np.float64]],
    counts_T: Mapping[str, NDArray[np.int64]],
    blocks: Mapping[str, Sequence[str]],
) -> dict[str, tuple[int, ...]]:
    """`critical_blocks` of the means and samples of each stream's (T, L) cells and bins."""
    every = all_blocks(list(blocks.values()))
    outside = {name: far_out(values_TL[None], counts_T[name] > 0)[0] for name, values_TL in mean_TL.items()}
    return {
        name: tuple(every.index(blocks[name][i]) for i in np.flatnonzero(outside_L).tolist())
        for name, outside_L in outside.items()
    }


def far_out(mean_RTL: NDArray[np.float64], filled_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(R, L) which blocks lie above Tukey's far-out fence over the blocks, Q3 + 3 * (Q3 - Q1).

    It goes by the mean over the bins that are filled, clipped at 0 but at no percentile; without any, none does.
    """
    average_RL = np.maximum(mean_RTL, 0)[:, filled_T].sum(axis=1) / max(int(filled_T.sum()), 1)
    first_R, third_R = np.percentile(average_RL, [25, 75], axis=-1, keepdims=True)
    outside_RL: NDArray[np.bool_] = average_RL > third_R + TUKEY_FAR_OUT * (third_R - first_R)
    return outside_RL


def block_sources(streams: Sequence[Sequence[str]]) -> NDArray[np.intp]:
    """For every block of `all_blocks`, which of the `common_blocks` its contribution comes from. Returns (L,)."""
    covered = common_blocks(streams)
    blocks = all_blocks(streams)
    numbers = np.array([i for i, block in enumerate(blocks) if block in covered])
    return np.array([covered.index(blocks[_nearest_covered(i, numbers)]) for i in range(len(blocks))])


def _nearest_covered(number: int, covered: NDArray[np.intp]) -> int:
    """The last covered block number that is not above `number`, else the first covered one."""
    before = covered[covered <= number]
    return int(before[-1] if len(before) else covered[0])
