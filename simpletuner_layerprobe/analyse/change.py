"""A change from one run to another of the same blocks, as compare.py and paired.py tell it.

Shape letters: T bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.shapes import ranges
from simpletuner_layerprobe.errors import ProbeError

ALPHA = 0.05
"""The chance that a comparison of two runs of the same truth shows any change at all."""
KIND_ALPHA = ALPHA / 3
"""The part of it that the cells, the blocks and the factors may each take."""
BIN_SAMPLES = 20
"""Samples that a bin must have in both runs: with fewer, skewed distances make chances smaller than they are."""


@dataclass(frozen=True)
class Change:
    """Numbers of run A and of run B, arrays of one shape, and how they differ.

    a, b: float64. difference: b - a. low, high: its 95% interval, of each number by itself. p: the two-sided chance of
    a difference as large if there is none, after Holm's correction for all tests of its kind; NaN where none was made.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    difference: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Where there is a change beyond chance. The same shape, bool."""
        beyond: NDArray[np.bool_] = np.nan_to_num(self.p, nan=1.0) <= KIND_ALPHA
        return beyond

    def columns(self, part: slice) -> Change:
        """These columns of the last axis."""
        return Change(*(getattr(self, name)[..., part] for name in ("a", "b", "difference", "low", "high", "p")))


def require_same_blocks(a: Samples, b: Samples) -> None:
    """Raises ProbeError, naming the first difference, if the runs are not of the same reading, streams and blocks."""
    wanted = "compare runs of the same architecture"
    if a.reading != b.reading:
        raise ProbeError(f"the runs have different readings: A has {a.reading}, B has {b.reading}; compare the same")
    if a.blocks.keys() != b.blocks.keys():
        names = [", ".join(sorted(side.blocks)) for side in (a, b)]
        raise ProbeError(f"the runs have different streams: A has {names[0]}, B has {names[1]}; {wanted}")
    for name, blocks_a in a.blocks.items():
        blocks_b = b.blocks[name]
        if len(blocks_a) != len(blocks_b):
            differ = f"A has {len(blocks_a)}, B has {len(blocks_b)}"
        else:
            pair = next((pair for pair in zip(blocks_a, blocks_b, strict=True) if pair[0] != pair[1]), None)
            if pair is None:
                continue
            differ = f"A has {pair[0]!r:.80} where B has {pair[1]!r:.80}"
        raise ProbeError(f"the runs have different blocks in the {name} stream: {differ}; {wanted}")


def sigma_text(changed_T: NDArray[np.bool_]) -> str:
    """The parts of sigma that these bins cover, neighbours joined: "0.2 to 0.5, 0.9 to 1", "none"."""
    bins = len(changed_T)
    parts = (f"{first / bins:.3g} to {(last + 1) / bins:.3g}" for first, last in ranges(changed_T))
    return ", ".join(parts) or "none"
