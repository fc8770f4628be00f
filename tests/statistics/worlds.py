"""Made-up runs that break what a simple statistic takes for granted, as real runs do.

An image brings a level of its own to every sample of it; neighbouring blocks are alike, in their levels and in every
image and sample; samples scatter more at some noise levels than at others; facts stay the same for all samples of an
image. The truth is known.

Shape letters: N samples, T bins, L blocks, D columns of both streams side by side, U images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from simpletuner_layerprobe.analyse.samples import Samples

Array = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """A model and a data set.

    blocks: of the image stream; the text stream has one less. spread: of the blocks' levels, as a standard deviation of
    their logarithm; critical: whether four blocks stand out. image, noise: coefficients of variation of what an image
    and what a sample brings. alike: correlation of neighbouring blocks (AR(1)), in levels, images and samples. tilt:
    the largest change from sigma 0 to 1, of the level. images: "lognormal", "bimodal" (half at 0.7, half at 1.3) or
    "heavy" (one in twenty at 2.5). effect: of the fact "caption_words", over two standard deviations of its logarithm.
    """

    seed: int
    blocks: int = 14
    spread: float = 0.3
    critical: bool = True
    image: float = 0.3
    noise: float = 0.5
    alike: float = 0.9
    tilt: float = 0.5
    images: str = "lognormal"
    effect: float = 0.0
    level_D: Array = field(init=False)
    tilt_D: Array = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        level_D = 0.06 * np.exp(self.spread * self._neighbours(random, 1)[0])
        if self.critical:
            level_D[[0, self.blocks - 3, self.blocks, 2 * self.blocks - 5]] *= 4
        object.__setattr__(self, "level_D", level_D)
        object.__setattr__(self, "tilt_D", random.uniform(-self.tilt, self.tilt, 2 * self.blocks - 1))

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        names = tuple(f"transformer_blocks.{i}" for i in range(self.blocks))
        return {"image": names, "text": names[:-1]}

    def split(self, table_D: Array) -> dict[str, Array]:
        return {"image": table_D[..., : self.blocks], "text": table_D[..., self.blocks :]}

    def truth(self, bins: int = 10) -> dict[str, Array]:
        """stream -> (T, L) the means that infinitely many images would give."""
        centre_T = (np.arange(bins) + 0.5) / bins
        return self.split(self.level_D * (1 + self.tilt_D * (centre_T[:, None] - 0.5)))

    def _neighbours(self, random: np.random.Generator, rows: int) -> Array:
        """(rows, D) standard normal, a part of it shared by all blocks, neighbours in a stream alike."""
        step = random.standard_normal((rows, 2 * self.blocks))
        step[:, 1 : self.blocks] *= np.sqrt(1 - self.alike**2)
        step[:, self.blocks + 1 :] *= np.sqrt(1 - self.alike**2)
        streams = [lfilter([1], [1, -self.alike], part, axis=1) for part in np.split(step, 2, axis=1)]
        own = np.concatenate([streams[0], streams[1][:, :-1]], axis=1)
        return np.sqrt(0.3) * random.standard_normal((rows, 1)) + np.sqrt(0.7) * own

    def _image_levels(self, random: np.random.Generator, images: int) -> Array:
        level_UD = _positive(self._neighbours(random, images), self.image)
        if self.images == "bimodal":
            level_UD *= random.choice([0.7, 1.3], (images, 1))
        if self.images == "heavy":
            level_UD *= np.where(random.random((images, 1)) < 0.05, 2.5, 1.0) / 1.075
        return level_UD

    def samples(
        self, seed: int, samples: int, images: int, *, known: bool = True, stratified: bool = False, bins: int = 10
    ) -> Samples:
        """A run: whole epochs over the images, then a part of one. Of the facts, caption_words and size and the backend
        stay with the image; a caption is dropped from one sample in ten."""
        random = np.random.default_rng(seed)
        epochs = -(-samples // images)
        image_N = np.concatenate([random.permutation(images) for _ in range(epochs)])[:samples]
        sigma_N = random.random(samples)
        if stratified:
            strata_N = np.concatenate([random.permutation(100) for _ in range(-(-samples // 100))])[:samples]
            sigma_N = (strata_N + sigma_N) / 100
        log_words_U = 3 + 0.7 * random.standard_normal(images)
        effect_U = self.effect * (log_words_U - log_words_U.mean()) / (2 * log_words_U.std())
        level_UD = self._image_levels(random, images) * (1 + effect_U[:, None])
        # Samples scatter three times as much near noise as near clean images.
        scatter_ND = _positive(self._neighbours(random, samples), self.noise * (0.5 + sigma_N[:, None]))
        mean_ND = self.level_D * (1 + self.tilt_D * (sigma_N[:, None] - 0.5))
        distance_ND = (mean_ND * level_UD[image_N] * scatter_ND).astype(np.float32)
        side_U = random.choice([512, 768, 1024], (images, 2))
        facts: Mapping[str, Any] = {
            "caption_words": np.exp(log_words_U).astype(np.int32)[image_N],
            "width": side_U[image_N, 0].astype(np.int32),
            "height": side_U[image_N, 1].astype(np.int32),
            "dropped": (random.random(samples) < 0.1).astype(np.int8),
            "backend": np.where(random.random(images) < 0.3, "portraits", "places")[image_N],
        }
        number_N = np.zeros(samples, np.uint64) if not known else (image_N + 1).astype(np.uint64)
        return Samples(sigma_N, number_N, self.paths, self.split(distance_ND), facts=facts, stratified=stratified)


def _positive(normal: Array, variation: Array | float) -> Array:
    """Lognormal numbers of mean 1 with this coefficient of variation."""
    spread = np.sqrt(np.log1p(np.asarray(variation) ** 2))
    return np.exp(spread * normal - spread**2 / 2)
