from __future__ import annotations

import numpy as np
import pytest

from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas


@pytest.mark.parametrize("draw", [uniform_sigmas, stratified_sigmas])
def test_ranks_and_numbers_have_sigmas_of_their_own(draw):
    draws = [draw(range(500), seed=1, rank=rank) for rank in (0, 1, 2)]
    assert len(np.unique(np.concatenate(draws))) == 1500
    # A number has the same sigma whenever it is drawn.
    assert np.array_equal(draw([7, 400], seed=1, rank=1), draws[1][[7, 400]])


@pytest.mark.parametrize("strata", [10, 100, 1000])
@pytest.mark.parametrize("rank", [0, 3])
def test_aligned_windows_of_a_rank_fill_equal_strata(strata, rank):
    sigmas = stratified_sigmas(range(2000), seed=7, rank=rank)
    for start in range(0, 2000, strata):
        window = sigmas[start : start + strata]
        assert sorted((window * strata).astype(int)) == list(range(strata))


@pytest.mark.parametrize("number", [0, 9, 123, 5001])
def test_each_stratified_sigma_is_uniform_in_distribution(number):
    """Kolmogorov-Smirnov distance of one sample's sigma over 2,000 seeds; 1.95/sqrt(n) is the 0.1% bound."""
    sigmas = np.sort([stratified_sigmas([number], seed=seed, rank=0)[0] for seed in range(2000)])
    steps = np.arange(2001) / 2000
    distance = max(np.abs(sigmas - steps[:-1]).max(), np.abs(sigmas - steps[1:]).max())
    assert distance < 1.95 / np.sqrt(2000)
    assert sigmas[0] >= 0 and sigmas[-1] < 1


def test_uniform_sigmas_are_uniform():
    sigmas = uniform_sigmas(range(20000), seed=5, rank=0)
    counts = np.bincount((sigmas * 10).astype(int), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom, 0.1%
