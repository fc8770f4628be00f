"""At most one run in twenty shows anything that is not there, and planted effects are found.

Of R runs that each show something false with a chance of 5%, more than `most(R)` do in one of a thousand tests.
"""

from __future__ import annotations

import pytest
from scipy import stats
from study import WORLDS, differences, false_findings, power
from worlds import World

FLAT = World(0, spread=0, critical=False, tilt=0)


def most(runs: int) -> int:
    return int(stats.binom.ppf(0.999, runs, 0.05))


@pytest.mark.parametrize("images", [20, 50, 200, 1000])
def test_images_that_come_back_show_nothing_that_is_not_there(images: int) -> None:
    """Images differ by 30%, neighbouring blocks are alike, facts stay with the image; no fact has an effect."""
    assert false_findings(World(0), images, 40)["any"].sum() <= most(40)


def test_heavy_tails_and_flat_levels_show_nothing_that_is_not_there() -> None:
    """One image in twenty at 2.5 times its level; and a model in which all blocks are the same at every sigma."""
    runs = [false_findings(world, images, 25)["any"].sum() for world in (WORLDS["heavy"], FLAT) for images in (20, 200)]
    assert sum(runs) <= most(100)


def test_two_runs_of_the_same_truth_show_no_change() -> None:
    runs = [differences(World(0), images, 25)["any change"].sum() for images in (50, 1000)]
    assert sum(runs) <= most(50)


def test_samples_taken_for_independent_would_show_some() -> None:
    """The test can tell: without the images almost every run of 20 images shows something that is not there."""
    assert false_findings(World(0), 20, 10, known=False)["conditions"].sum() >= 8


def test_effects_are_found() -> None:
    """An effect of caption length of 20% over two standard deviations, in 200 images: nine runs in ten or more."""
    assert power(World(0), 200, 25, 0.2)["found"].mean() >= 0.8
    assert power(World(0), 200, 15, 0.3)["blocks"].mean() >= 0.8
