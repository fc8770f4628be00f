"""The verdict: what a run comes to in five lines, the same in the report, in `status` and in `findings`.

Shape letters: L blocks, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.show.words import counted, listed, share_text, size_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.settled import Confidence

NAMED = 3
"""At most so many blocks are named as the strongest, and as the weakest."""
NOW = (
    "take equal factors, the default: no weighting of blocks was seen to beat them (docs/study-weighting.md). "
    "Whether one does on your own data, layerprobe trial judges"
)


@dataclass(frozen=True)
class Verdict:
    """lines: what each is about -> a sentence without its full stop, in the order in which they are read. commands:
    what each makes -> what to type, all at one size; none where a config cannot be made."""

    lines: Mapping[str, str]
    commands: Mapping[str, str]


def enough_line(samples: str, sure: Confidence, goal: str, times: int | None) -> str:
    """Of how many images there are how many samples, and whether that is enough. goal: what `sure` is of. times: as
    `times_to_settle` says."""
    if sure.settled:
        return f"{samples}, enough for {goal}: {sure.text()}"
    more = f"settling all would take far more {sure.unit}s"
    if times is not None:
        more = f"settling all would take about {times} times the {sure.unit}s"
    return f"{samples}, not enough for all of {goal}: {sure.text()}" + (f"; {more}" if sure.enough else "")


def blocks_line(sure: Confidence, value_L: NDArray[np.float64], measured_L: NDArray[np.bool_]) -> str:
    """The blocks that change the hidden states most and least, and how often the replicates name the same."""
    numbers = np.flatnonzero(measured_L)
    count = max(1, min(NAMED, len(numbers) // 3))
    said = []
    for word, sign in (("most by", -1), ("least by", 1)):
        ranked = numbers[np.argsort(sign * value_L[numbers], kind="stable")][:count]
        ranked_RC = numbers[np.argsort(sign * sure.value_RL[:, numbers], axis=1, kind="stable")][:, :count]
        same = float((np.sort(ranked_RC, axis=1) == np.sort(ranked)).all(axis=1).mean())
        said.append(
            f"{word} block{'s' * (count > 1)} {listed([str(number) for number in ranked])} ({share_text(same)})"
        )
    return f"the states are turned {', '.join(said)}; in brackets, how many of the replicates name the same"


def capacity_line(parameters: int, own: int | None, article: int, parameter_bytes: int) -> str:
    """The size of what the commands make, beside what the run's own config trains (None: not known) and the article's
    recipe would. parameter_bytes: what each parameter takes."""

    def text(count: int) -> str:
        return f"{count:,} parameters ({size_text(parameter_bytes * count)})"

    if own is None:
        said = f"plans of {text(parameters)}; what your own config trains is not known"
    elif parameters == own:
        said = f"plans of {text(own)}, as many as your own config trains"
    else:
        said = f"plans of {text(parameters)}; your own config trains {own:,}: {parameters / own:.3g} times"
    if article == parameters:
        return f"{said}; it is the article's recipe's size"
    return f"{said}; the article's recipe would make {article:,}" + (f", {article / own:.3g} times" if own else "")


def weighting_line(differing: Sequence[int], blocks: int, enough: bool) -> str:
    """Whether the blocks differ enough for a weighting to be another plan than equal factors."""
    if not enough:
        return "not known: too few samples to say whether a weighting would be another plan than equal factors"
    if not differing:
        return "the blocks differ no more than chance would have it: a weighting would only move equal factors by noise"
    return (
        f"the blocks differ: a weighting gives {len(differing):,} of {counted(blocks, 'block')} other factors than the "
        "equal plan, in at least 95% of the replicates each"
    )
