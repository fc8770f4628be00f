from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas
from simpletuner_layerprobe.training.spread import Spread


@pytest.mark.parametrize("draw", [stratified_sigmas, uniform_sigmas])
@pytest.mark.parametrize(
    ("batch", "samples", "wanted", "images"),
    [(1, 2000, 200, 60), (1, 600, 200, 200), (8, 600, 200, 200), (10, 600, 200, 200), (4, 2000, 200, 1000)],
)
def test_so_many_samples_evenly_over_sigma_and_images(draw, batch, samples, wanted, images):
    sigma_N = draw(range(samples), seed=3, rank=0)
    random = np.random.default_rng(0)
    image_N = np.concatenate([random.permutation(images) + 1 for _ in range(samples // images + 1)])[:samples]
    spread, taken = Spread(wanted, samples), []
    for start in range(0, samples, batch):
        step = slice(start, start + batch)
        if spread.choose(sigma_N[step].tolist(), image_N[step].tolist()):
            taken += range(start, start + batch)
    assert spread.taken == len(taken) and wanted <= len(taken) < wanted + batch
    tenths = np.bincount((sigma_N[taken] * 10).astype(int), minlength=10)
    assert tenths.min() >= 0.6 * wanted / 10, tenths
    # A stride would meet a tenth of the hundredths alone.
    assert len(np.unique((sigma_N[taken] * 100).astype(int))) > 75
    per_image = Counter(image_N[taken].tolist())
    assert len(per_image) >= 0.7 * min(images, wanted)
    assert max(per_image.values()) <= 2 * wanted / images + 2


def test_every_sample_where_all_are_wanted():
    spread = Spread(40, 40)
    assert all(spread.choose([0.5] * 8, [1] * 8) for _ in range(5))
    assert not spread.choose([0.5] * 8, [1] * 8)


@pytest.mark.parametrize("images", [[0] * 4, [1, 2, 3, 4]])
def test_without_sigmas_or_images_there_are_as_many(images):
    spread = Spread(100, 400)
    taken = sum(spread.choose(None, images) for _ in range(100))
    assert 25 <= taken <= 26
    assert not Spread(0, 400).choose(None, images)


def test_where_the_end_is_not_known_the_first_are_taken():
    spread = Spread(3, float("inf"))
    assert not any(spread.choose([0.5], [1]) for _ in range(100))
