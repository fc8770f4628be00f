"""Settled: how sure the contributions of a run and what is decided by them are. The one answer to that question.

`lokr`, `status`, `report`, `compare` and the stop of a settled run all ask `confidence`, with what they decide.

Shape letters: T bins, L blocks, R replicates, K things that are decided: a factor per block or per group of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, MIN_UNITS, Bootstrap
from simpletuner_layerprobe.analyse.contribution import article_values, far_out, least_blocks
from simpletuner_layerprobe.analyse.units import IMAGE
from simpletuner_layerprobe.readings import all_blocks

INTERVAL = 0.95
"""The part of the replicates that an interval holds."""
SHARE = 0.95
"""A factor is settled if at least this share of the replicates decides the same, unless asked otherwise."""
TIMES = (2, 4, 8, 16, 32, 64)
"""So many times the images (or samples) are tried by `times_to_settle`."""

Decide = Callable[[Mapping[str, NDArray[np.float64]]], tuple[NDArray[np.float64], NDArray[np.int64]]]
"""What is done with heatmaps: stream -> (R, T, L) means in, (R, L) contributions and (R, K) decisions out.

Two replicates agree where these numbers are equal, so what trains alike should have the same number."""
Factors = Callable[[NDArray[np.float64]], NDArray[np.int64]]
"""A recipe: contributions (N,) in [0, 1] -> factors (N,), each by itself."""


@dataclass(frozen=True)
class Confidence:
    """How sure the contributions and the decisions of a run are.

    blocks: all, in the model's order. low_L, high_L: 95% intervals of the contributions, see `interval`. factor_K: what
    the run itself decides, as the `Decide` gives it. agreement_K: share of the replicates that decide the same.
    settled_K: whether that is `share` or more and there is `enough` to judge by. unit: what the replicates draw,
    "image" or "sample". images: None where they are not known. value_RL: the contributions of the replicates.
    """

    blocks: tuple[str, ...]
    low_L: NDArray[np.float64]
    high_L: NDArray[np.float64]
    factor_K: NDArray[np.int64]
    agreement_K: NDArray[np.float64]
    settled_K: NDArray[np.bool_]
    share: float
    replicates: int
    enough: bool
    unit: str
    images: int | None
    samples: int
    value_RL: NDArray[np.float64] = field(repr=False)

    @property
    def settled(self) -> bool:
        """Whether everything is."""
        return bool(self.settled_K.all())

    def least_agreement(self, numbers: Sequence[int]) -> float:
        """The share of the replicates in which the blocks that contribute least are just these."""
        blocks = tuple(sorted(numbers))
        return sum(least_blocks(value_L, len(blocks)) == blocks for value_L in self.value_RL) / self.replicates

    def text(self, what: str = "factor") -> str:
        """One line: "33 of 38 factors settled for images like these 50: ..."."""
        K = len(self.settled_K)
        whom = f"for images like these {self.images:,}" if self.unit == IMAGE else "for these images"
        head = f"{int(self.settled_K.sum())} of {K:,} {what}{'s' if K != 1 else ''} settled {whom}"
        if not self.enough:
            units = "images" if self.unit == IMAGE else "samples"
            return f"{head}: fewer than {MIN_UNITS} {units}, or fewer than {MIN_SAMPLES} samples in a sigma bin"
        return f"{head}: {self.share:.0%} of {self.replicates:,} bootstrap replicates decide the same"


def confidence(bootstrap: Bootstrap, decide: Decide, share: float = SHARE) -> Confidence:
    """Intervals of the contributions, and which decisions the replicates agree with."""
    value_1L, factor_1K = decide({name: mean_TL[None] for name, mean_TL in bootstrap.mean_TL.items()})
    value_RL, factor_RK = decide(bootstrap.replicates())
    low_L, high_L = interval(value_RL, value_1L[0])
    agreement_K = (factor_RK == factor_1K).mean(axis=0)
    return Confidence(
        blocks=bootstrap.names,
        low_L=low_L,
        high_L=high_L,
        factor_K=factor_1K[0],
        agreement_K=agreement_K,
        settled_K=(agreement_K >= share) & bootstrap.enough,
        share=share,
        replicates=len(factor_RK),
        enough=bootstrap.enough,
        unit=bootstrap.unit,
        images=bootstrap.images,
        samples=bootstrap.samples,
        value_RL=value_RL,
    )


def differing(bootstrap: Bootstrap, decide: Decide, other: Decide) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What sets blocks and decisions apart from a plan in which all blocks count the same, `other`.

    (L,) whether SHARE of the replicates has the block's contribution on one side of the mean of all, and (K,) whether
    SHARE of them decides for a number on one side of the other plan's. To differ now this way, now that way is chance;
    and only both together say something: a plan that weighs alike blocks by their noise still gives most of them a
    little less, for the few that it gives much.
    """
    value_RL, number_RK = decide(bootstrap.replicates())
    _, other_1K = other({name: mean_TL[None] for name, mean_TL in bootstrap.mean_TL.items()})
    return _one_sided(value_RL - value_RL.mean(axis=1, keepdims=True)), _one_sided(number_RK - other_1K)


def _one_sided(difference_RX: NDArray[Any]) -> NDArray[np.bool_]:
    """(X,) whether SHARE of the replicates has the same sign, and not 0."""
    one_sided_X: NDArray[np.bool_] = (
        np.maximum((difference_RX > 0).mean(axis=0), (difference_RX < 0).mean(axis=0)) >= SHARE
    )
    return one_sided_X


def by_chance(blocks: int) -> int:
    """So many of the blocks may be set apart in a run in which all are alike, in 95 of 100 such runs."""
    return next(count for count in range(blocks + 1) if bdtr(count, blocks, 1 - SHARE) >= SHARE)


def interval(
    value_RL: NDArray[np.float64], value_L: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(L,) low and (L,) high of contributions value_L of a run, of which value_RL are the replicates.

    What holds the middle INTERVAL of the replicates (at Weibull's positions: plain quantiles of R replicates would
    hold about 1 / R too little on either side), stretched to where they would lie without their bias. The largest block
    and the clip are picked by their noise, which pushes the other contributions down: once in the run, once more in the
    replicates.
    """
    low_L, high_L = np.quantile(value_RL, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0, method="weibull")
    bias_L = value_RL.mean(axis=0) - value_L
    low_L, high_L = low_L - np.maximum(2 * bias_L, 0), high_L + np.maximum(-2 * bias_L, 0)
    return np.clip(low_L, 0, 1), np.clip(high_L, 0, 1)


def times_to_settle(bootstrap: Bootstrap, decide: Decide, share: float = SHARE) -> int | None:
    """How many times the images (samples, where these are the unit) would settle everything: 1, or one of TIMES.

    None if the most would not, or if there is not enough to judge by. It draws the replicates in towards the means, as
    more images with as many samples each would, and takes the means for the truth: a rough number. More samples of the
    same images would not do it.
    """
    if not bootstrap.enough:
        return None
    _, factor_1K = decide({name: mean_TL[None] for name, mean_TL in bootstrap.mean_TL.items()})

    def settled(times: int) -> bool:
        _, factor_RK = decide(bootstrap.replicates(times))
        return bool(((factor_RK == factor_1K).mean(axis=0) >= share).all())

    if settled(1):
        return 1
    if not settled(TIMES[-1]):
        return None
    low, high = 0, len(TIMES) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(TIMES[middle]) else (middle + 1, high)
    return TIMES[high]


def article_decide(
    bootstrap: Bootstrap,
    factors: Factors,
    *,
    critical: tuple[int, ...] | None = None,
    alike: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
    **weighting: float,
) -> Decide:
    """The article's recipe for many heatmaps at once.

    critical: the blocks that get factor 1, None to look for them anew in every replicate. alike: (R, L) factors ->
    (R, K) numbers that are equal where what trains is the same; None to compare the factors by name. weighting: as
    `article_contributions` takes it.
    """
    blocks = bootstrap.blocks
    names = all_blocks(list(blocks.values()))
    filled_T = {name: bootstrap.counts_T[name] > 0 for name in blocks}
    number_L = {name: [names.index(block) for block in blocks[name]] for name in blocks}

    def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        value_RL = article_values(mean_RTL, blocks, by_own=False, **weighting)
        factor_RL = factors(value_RL.ravel()).reshape(value_RL.shape)
        critical_RL = np.zeros(value_RL.shape, dtype=bool)
        if critical is not None:
            critical_RL[:, list(critical)] = True
        else:
            for name, values_RTL in mean_RTL.items():
                critical_RL[:, number_L[name]] |= far_out(values_RTL, filled_T[name])
        factor_RL = np.where(critical_RL, 1, factor_RL)
        return value_RL, factor_RL if alike is None else alike(factor_RL)

    return decide
