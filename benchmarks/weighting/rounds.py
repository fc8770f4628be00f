"""The order of the trainings: a sweep of learning rates for all arms, then rounds of fresh seeds.

The queue fills every chunk to the same size, so that one compiled model serves all: what waits for a sweep's result
comes when it is known, and a chunk may hold the end of one round and the beginning of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weighting.arm import Arm, Training
from weighting.results import Result, mean_by_rate

RATES = (3e-3, 6e-3, 12e-3)
TUNING_SEEDS = (1000,)
ROUND, SHUFFLE_SEEDS = 4, 2
SWEPT_SHUFFLES = ("shuffle-00", "shuffle-01")


def is_shuffle(arm: str) -> bool:
    return arm.startswith("shuffle-")


def swept(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms that learning rates are tried on: of the shuffles two, whose mean chooses for all of them."""
    return {name: arm for name, arm in arms.items() if not is_shuffle(name) or name in SWEPT_SHUFFLES}


def sweep(arms: Mapping[str, Arm], rates: Sequence[float], seeds: Sequence[int]) -> list[Training]:
    return [Training(arm, seed, rate) for seed in seeds for rate in rates for arm in swept(arms).values()]


def tuning_means(results: Sequence[Result], base: str, arm: str) -> dict[float, float]:
    """Mean tuning loss by learning rate, of a shuffle over all that were swept."""
    return mean_by_rate(results, base, SWEPT_SHUFFLES if is_shuffle(arm) else (arm,))


def best_rate(results: Sequence[Result], base: str, arm: str) -> float:
    """The learning rate of the lowest tuning loss."""
    means = tuning_means(results, base, arm)
    return min(means, key=lambda rate: means[rate])


def extensions(
    results: Sequence[Result], base: str, arms: Mapping[str, Arm], rates: Sequence[float], seeds: Sequence[int]
) -> list[Training]:
    """For every arm whose best learning rate is at the end of those swept at first, the next one beyond it.

    Goes by the first sweep alone, so that it gives the same again after the extension.
    """
    more = []
    for name, arm in swept(arms).items():
        means = tuning_means(results, base, name)
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
        if not (is_shuffle(name) and seed >= SHUFFLE_SEEDS)
    ]
