from __future__ import annotations

import numpy as np
import pytest

from simpletuner_layerprobe.training.sigmas import stratified_sigmas, uniform_sigmas


def test_uniform_draws_are_independent_of_rank_and_start():
    draws = [uniform_sigmas(500, seed=1, rank=rank, first=first) for rank in (0, 1) for first in (0, 500)]
    assert len(np.unique(np.concatenate(draws))) == 2000
    assert np.array_equal(draws[0], uniform_sigmas(500, seed=1, rank=0, first=0))


@pytest.mark.parametrize("strata", [10, 100, 1000])
def test_aligned_windows_fill_equal_strata(strata):
    sigmas = stratified_sigmas(np.arange(2000), seed=7)
    for start in range(0, 2000, strata):
        window = sigmas[start : start + strata]
        assert sorted((window * strata).astype(int)) == list(range(strata))


def test_ranks_share_one_sequence():
    whole = stratified_sigmas(np.arange(60), seed=3)
    for rank in range(3):
        assert np.array_equal(stratified_sigmas(np.arange(rank, 60, 3), seed=3), whole[rank::3])


@pytest.mark.parametrize("sample", [0, 9, 123, 5001])
def test_each_stratified_sigma_is_uniform_in_distribution(sample):
    """Kolmogorov-Smirnov distance of one sample's sigma over 2,000 seeds; 1.95/sqrt(n) is the 0.1% bound."""
    sigmas = np.sort([stratified_sigmas(np.array([sample]), seed=seed)[0] for seed in range(2000)])
    steps = np.arange(2001) / 2000
    distance = max(np.abs(sigmas - steps[:-1]).max(), np.abs(sigmas - steps[1:]).max())
    assert distance < 1.95 / np.sqrt(2000)
    assert sigmas[0] >= 0 and sigmas[-1] < 1


def test_uniform_sigmas_are_uniform():
    sigmas = uniform_sigmas(20000, seed=5, rank=0, first=0)
    counts = np.bincount((sigmas * 10).astype(int), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom, 0.1%
