"""95% intervals hold the truth in 92 to 97% of cases, for 20 to 1,000 images that come back in every epoch.

A run counts as one number, as its blocks and bins move together: the mean over R runs may lie SLACK standard errors of
that mean outside. With three, a method that covers 92% or 97% fails one of a thousand such tests.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from study import IMAGES, WORLDS, Numbers, coverage, differences, settled_factors
from worlds import World

LOW, HIGH, SLACK = 0.92, 0.97, 3.0


def holds(covered_R: NDArray[np.float64]) -> bool:
    error = covered_R.std(ddof=1) / np.sqrt(len(covered_R))
    return bool(LOW - SLACK * error <= covered_R.mean() <= HIGH + SLACK * error)


def assert_held(numbers: Numbers) -> None:
    for name in ("cells", "block levels", "contributions"):
        assert holds(numbers[name]), (name, numbers[name].mean())


@pytest.mark.parametrize("images", IMAGES)
def test_intervals_hold_the_truth(images: int) -> None:
    assert_held(coverage(World(0), images, 60))


@pytest.mark.parametrize("images", [50, 1000])
def test_intervals_hold_the_truth_where_there_are_two_kinds_of_images(images: int) -> None:
    assert_held(coverage(WORLDS["bimodal"], images, 40))


def test_intervals_hold_the_truth_with_stratified_sigmas() -> None:
    assert_held(coverage(World(0), 200, 40, stratified=True))


def test_intervals_of_differences_hold_none_where_there_is_none() -> None:
    for images in (20, 200):
        assert_held(differences(World(0), images, 30))


def test_samples_taken_for_independent_would_not_hold() -> None:
    """The test can tell: without the images the intervals of 20 images hold the levels in well under 92%."""
    covered = coverage(World(0), 20, 20, known=False)
    assert covered["block levels"].mean() < 0.6 and not holds(covered["block levels"])


def test_settled_factors_are_those_of_infinitely_many_images() -> None:
    """97% or more of them, where 95% of the replicates agree; some are settled and some are not."""
    for images in (20, 200):
        numbers = settled_factors(World(0, spread=0.6), images, 30)
        assert numbers["true if settled"].mean() >= 0.97
        assert 0.3 < numbers["settled"].mean() < 0.97
