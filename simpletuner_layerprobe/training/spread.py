"""Which steps of a run get the ablation: so many samples, spread evenly over sigma and over the images.

Never every n-th step: stratified sigmas come in a fixed order, and a stride would meet the same strata again and again.

Shape letters: B samples of the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

BINS = 10


class Spread:
    """Chooses steps, one after the other, for one rank.

    wanted, of: how many samples shall get it, among how many that are recorded. taken: how many have it.

    Selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S) in each tenth of sigma where sigmas are known, else over
    all; an image that already had it in its share of the samples gives its place to others. The draws are the same for
    the same samples.
    """

    def __init__(self, wanted: int, of: float, seed: int = 0) -> None:
        self.wanted = wanted
        self.of = of
        self.taken = 0
        self._seed = seed & 0xFFFFFFFF
        self._seen = 0
        self._seen_in: Counter[int] = Counter()
        self._taken_in: Counter[int] = Counter()
        self._seen_of: Counter[int] = Counter()
        self._taken_of: Counter[int] = Counter()

    def choose(self, sigmas: Sequence[float] | None, images: Sequence[int]) -> bool:
        """Whether the step with these B samples gets it. sigmas: None if the host does not know them."""
        bins = [-1] * len(images) if sigmas is None else [_bin(sigma) for sigma in sigmas]
        left = self.wanted - self.taken
        take = left > 0 and (left >= self.of - self._seen or self._drawn() < self._chance(bins, images))
        for number, image in zip(bins, images, strict=True):
            self._count(number, image, take)
        return take

    def _drawn(self) -> float:
        return float(np.random.default_rng([self._seed, self._seen]).random())

    def _chance(self, bins: Sequence[int], images: Sequence[int]) -> float:
        """How likely the step is taken: the mean over its samples of what their places still need."""
        parts = BINS if bins[0] >= 0 else 1
        chances = []
        for number, image in zip(bins, images, strict=True):
            if image and self._taken_of[image] * self.of >= self.wanted * (self._seen_of[image] + 1):
                chances.append(0.0)
                continue
            needed = self.wanted / parts - self._taken_in[number]
            to_come = max(self.of / parts - self._seen_in[number], 1.0)
            chances.append(min(max(needed / to_come, 0.0), 1.0))
        return sum(chances) / len(chances)

    def _count(self, number: int, image: int, taken: bool) -> None:
        self._seen += 1
        self._seen_in[number] += 1
        self._seen_of[image] += 1
        if taken:
            self.taken += 1
            self._taken_in[number] += 1
            self._taken_of[image] += 1


def _bin(sigma: float) -> int:
    return min(int(sigma * BINS), BINS - 1)
