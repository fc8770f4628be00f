"""The order of the trainings: a sweep of learning rates for all arms, then rounds of fresh seeds.

The queue fills every chunk to the same size, so that one compiled model serves all: what waits for a sweep's result
comes when it is known, and a chunk may hold the end of one round and the beginning of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weighting.arm import Arm, Training
from weighting.results import Result, mean_by_rate

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TUNING_SEEDS = (1000, 1001)
ROUND, SHUFFLE_SEEDS = 4, 4


def sweep(arms: Mapping[str, Arm], rates: Sequence[float], seeds: Sequence[int]) -> list[Training]:
    return [Training(arm, seed, rate) for seed in seeds for rate in rates for arm in arms.values()]


def best_rate(results: Sequence[Result], base: str, arm: str) -> float:
    """The learning rate of the lowest tuning loss."""
    means = mean_by_rate(results, base, arm)
    return min(means, key=lambda rate: means[rate])


def extensions(
    results: Sequence[Result], base: str, arms: Mapping[str, Arm], rates: Sequence[float], seeds: Sequence[int]
) -> list[Training]:
    """For every arm whose best learning rate is at the end of those swept at first, the next one beyond it.

    Goes by the first sweep alone, so that it gives the same again after the extension.
    """
    more = []
    for name, arm in arms.items():
        means = mean_by_rate(results, base, name)
        best = min(rates, key=lambda rate: means[rate])
        if len(rates) > 1 and best in (min(rates), max(rates)):
            more += [Training(arm, seed, best / 2 if best == min(rates) else best * 2) for seed in seeds]
    return more


def final(arms: Mapping[str, Arm], rate_of: Mapping[str, float], first: int, seeds: int) -> list[Training]:
    """Round after round, all arms on the same seeds; the shuffles on the first SHUFFLE_SEEDS only."""
    return [
        Training(arm, first + seed, rate_of[name])
        for start in range(0, seeds, ROUND)
        for name, arm in arms.items()
        for seed in range(start, min(start + ROUND, seeds))
        if not (name.startswith("shuffle-") and seed >= SHUFFLE_SEEDS)
    ]
