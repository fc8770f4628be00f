"""Contributions: one number per block, 1 for the block that changes the hidden states most.

Shape letters: T bins, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.analyse.heatmap import Heatmap, all_blocks, columns, common_blocks

TUKEY_FAR_OUT = 3.0
"""Tukey's "far out" fence lies this many interquartile ranges above the third quartile."""


@dataclass(frozen=True)
class Contribution:
    """What each block contributes, for every block that any stream has, in the model's order.

    value_L: (L,) float64 in [0, 1]; 1 is the largest measured contribution, 0 the smallest.
    covered_L: (L,) bool; False where the block took the value of its nearest covered neighbour.
    critical: per stream, the numbers of its critical blocks (see `critical_blocks`).
    """

    blocks: tuple[str, ...]
    value_L: NDArray[np.float64]
    covered_L: NDArray[np.bool_]
    critical: dict[str, tuple[int, ...]]

    def critical_union(self) -> tuple[int, ...]:
        """The numbers of the blocks that are critical in any stream, ascending."""
        return tuple(sorted({number for numbers in self.critical.values() for number in numbers}))


def article_contributions(
    streams: Mapping[str, Heatmap],
    *,
    clip_percentile: float = 90.0,
    text_weight: float = 1 / 3,
    image_weight: float = 2 / 3,
) -> Contribution:
    """The article's contributions: clip, weight, combine, average over the bins, min-max normalise.

    Each heatmap is clipped at its own percentile (numpy's linear one, over all of its cells, those without
    samples included), multiplied by its stream's weight, added up, divided by the number of streams and
    averaged over the bins; the smallest block becomes 0 and the largest 1.

    The rule for streams of unequal blocks: the sum goes over the blocks that every stream has. A block that
    a stream lacks takes the value of the nearest block before it that all have (after it, if none is
    before). On SD3.5 Large that gives the article's numbers: `(text + image[:, :37]) / 2`, and the 38th
    block repeats the 37th. With one stream that stream decides alone and its weight plays no part.

    The text stream has `text_weight`, every other stream `image_weight`. Raises ProbeError for a percentile
    outside (0, 100], a stream without samples, or contributions that are all equal.
    """
    if not 0 < clip_percentile <= 100:
        raise ProbeError(f"the clip percentile is {clip_percentile}, expected above 0 and at most 100")
    for heatmap in streams.values():
        if not heatmap.count_T.any():
            raise ProbeError(
                f"the {heatmap.stream} stream has no sample with finite distances "
                f"({heatmap.nonfinite} are not); probe the model again in a precision that does not overflow"
            )
    parts = tuple(streams.values())
    covered = common_blocks([part.blocks for part in parts])
    blocks = all_blocks([part.blocks for part in parts])
    total_TL = np.zeros((parts[0].bins, len(covered)))
    for part in parts:
        weight = 1.0 if len(parts) == 1 else text_weight if part.stream == "text" else image_weight
        limit = np.percentile(part.mean_TL, clip_percentile)
        total_TL += np.minimum(columns(part, covered), limit) * weight
    average_L = (total_TL / float(len(parts))).mean(axis=0)
    low, high = average_L.min(), average_L.max()
    if not high > low:
        raise ProbeError(
            f"all {len(covered)} blocks have the same contribution ({low:.6g}), so nothing can be weighted; "
            "use fewer --bins if some have no samples, a higher --clip-percentile, or other weights"
        )
    value = dict(zip(covered, (average_L - low) / (high - low), strict=True))
    numbers_covered = np.array([i for i, block in enumerate(blocks) if block in value])
    source_L = [_nearest_covered(i, numbers_covered) for i in range(len(blocks))]
    return Contribution(
        blocks=blocks,
        value_L=np.array([value[blocks[i]] for i in source_L]),
        covered_L=np.array([block in value for block in blocks]),
        critical=critical_blocks(streams),
    )


def critical_blocks(streams: Mapping[str, Heatmap]) -> dict[str, tuple[int, ...]]:
    """The blocks whose changes are so large that they hide the rest: `--critical auto`.

    Per stream, on the unclipped mean over the bins that have samples: the blocks above Tukey's far-out
    fence, Q3 + 3 * (Q3 - Q1) over the blocks of the stream. The numbers are positions in the list of all
    blocks, which is the image stream's own list on SD3 and Flux.
    """
    blocks = all_blocks([heatmap.blocks for heatmap in streams.values()])
    critical = {}
    for name, heatmap in streams.items():
        filled_TL = heatmap.mean_TL[heatmap.count_T > 0]
        average_L = filled_TL.mean(axis=0) if len(filled_TL) else np.zeros(len(heatmap.blocks))
        first, third = np.percentile(average_L, [25, 75])
        fence = third + TUKEY_FAR_OUT * (third - first)
        critical[name] = tuple(blocks.index(heatmap.blocks[i]) for i in np.flatnonzero(average_L > fence))
    return critical


def _nearest_covered(number: int, covered: NDArray[np.intp]) -> int:
    """The last covered block number that is not above `number`, else the first covered one."""
    before = covered[covered <= number]
    return int(before[-1] if len(before) else covered[0])
