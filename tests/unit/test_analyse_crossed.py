"""The mean of a table of seeds and images: against a plain reference, and its intervals on images as they are."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner_layerprobe.analyse.crossed import Crossed, crossed, mean_squares

SHARES = (0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.99)
"""Of the mean's variance, what the seeds bring: from seeds that are all alike to images that are all alike."""


def effects(random: np.random.Generator, kind: str, images: int) -> np.ndarray:
    """(Q,) effects of images with mean 0 and variance 1, skewed as real ones are."""
    if kind == "gamma":  # skewness 1.4
        return (random.gamma(2.0, size=images) - 2) / 2**0.5
    student = random.standard_t(5, images)  # heavy tails, the right nearly twice as wide as the left
    student = np.where(student > 0, 1.7 * student, student) - 0.7 * 0.949 / 2
    return student / 1.757


def tables(random: np.random.Generator, kind: str, S: int, Q: int, share: float, rest: float) -> np.ndarray:
    """(S, Q) differences with mean 0: effects of seeds and of images, and a rest of this variance."""
    other = 1 / Q + rest / (S * Q)
    seed_S1 = random.normal(0, (S * other * share / (1 - share)) ** 0.5, (S, 1))
    return seed_S1 + effects(random, kind, Q) + random.normal(0, rest**0.5, (S, Q))


def held(kind: str, S: int, Q: int, times: int) -> tuple[np.ndarray, float]:
    """How often the 95% intervals hold the truth, by the seeds' share and the rest, and how often p is at most .05."""
    random = np.random.default_rng(S * 1000 + Q)
    inside, beyond = np.zeros((len(SHARES), 2)), 0
    for i, share in enumerate(SHARES):
        for j, rest in enumerate((0.3, 3.0)):
            for _ in range(times):
                made = crossed(tables(random, kind, S, Q, share, rest))
                low, high = made.interval()
                inside[i, j] += low <= 0 <= high
                beyond += made.p <= 0.05
    return inside / times, beyond / (times * inside.size)


@pytest.mark.parametrize("kind", ["gamma", "student"])
@pytest.mark.parametrize("images", [20, 100])
@pytest.mark.parametrize("seeds", [2, 3, 4, 12])
def test_intervals_hold_the_truth_and_nothing_is_seldom_called_something(kind: str, seeds: int, images: int) -> None:
    """93% of the time or more, whatever seeds and images bring, but for three standard errors of such a share."""
    times = 400
    inside, beyond = held(kind, seeds, images, times)
    assert inside.mean() >= 0.935 and beyond <= 0.065
    assert inside.min() >= 0.93 - 3 * (0.93 * 0.07 / times) ** 0.5
    assert seeds == 2 or inside.mean() <= 0.975  # and no wider than need be


def test_without_the_seeds_alone_two_seeds_would_be_too_sure() -> None:
    """The test can tell: Satterthwaite's error by itself holds a mean that the seeds move in well under 93%."""
    random, held_alone = np.random.default_rng(0), 0
    for _ in range(600):
        made = crossed(tables(random, "student", 2, 100, 0.9, 1.0))
        alone = Crossed(made.mean, made.error_3[:1], made.freedom_3[:1], 2, 100)
        low, high = alone.interval()
        held_alone += low <= 0 <= high
    assert held_alone / 600 < 0.91


def test_the_mean_squares_are_those_of_a_plain_loop() -> None:
    change_SQ = np.random.default_rng(1).gamma(2.0, size=(3, 7)) * 1e-3
    S, Q = change_SQ.shape
    mean = sum(change_SQ.ravel().tolist()) / (S * Q)
    by_seed = [sum(change_SQ[s].tolist()) / Q for s in range(S)]
    by_image = [sum(change_SQ[:, q].tolist()) / S for q in range(Q)]
    seed = sum(Q * (m - mean) ** 2 for m in by_seed) / (S - 1)
    image = sum(S * (m - mean) ** 2 for m in by_image) / (Q - 1)
    whole = sum((value - mean) ** 2 for value in change_SQ.ravel().tolist())
    rest = (whole - seed * (S - 1) - image * (Q - 1)) / ((S - 1) * (Q - 1))
    assert mean_squares(change_SQ) == pytest.approx((seed, image, rest))
    made = crossed(change_SQ)
    both = max(seed + image - rest, seed, image)
    assert made.error_3**2 * S * Q == pytest.approx([both, seed, image])
    if both > max(seed, image):
        parts = seed**2 / (S - 1) + image**2 / (Q - 1) + rest**2 / ((S - 1) * (Q - 1))
        assert made.freedom_3[0] == pytest.approx(both**2 / parts)


def test_many_seeds_alone_give_students_interval() -> None:
    """Images that are all alike leave the t test of the seeds' means; scipy.stats is the reference."""
    from scipy import stats

    seed_S = np.random.default_rng(2).normal(0.3, 1.0, 9)
    made, other = crossed(np.repeat(seed_S[:, None], 20, axis=1)), stats.ttest_1samp(seed_S, 0.0)
    assert made.p == pytest.approx(other.pvalue)
    for level in (0.05, 0.01):
        expected = other.confidence_interval(1 - level)
        assert made.interval(level) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_p_and_interval_say_the_same(level: float) -> None:
    random = np.random.default_rng(3)
    for S in (2, 3, 8):
        made = crossed(tables(random, "student", S, 30, 0.4, 1.0))
        turned = Crossed(made.half(level) * 1.0001, made.error_3, made.freedom_3, S, 30)
        assert turned.interval(level)[0] > 0 and turned.p < level
        turned = Crossed(made.half(level) * 0.9999, made.error_3, made.freedom_3, S, 30)
        assert turned.interval(level)[0] < 0 and turned.p > level


@pytest.mark.parametrize("shape", [(1, 30), (4, 1), (1, 1)])
def test_one_seed_or_one_image_cannot_tell(shape: tuple[int, int]) -> None:
    made = crossed(np.random.default_rng(4).normal(1.0, 0.1, shape))
    assert not made.known and np.isnan([*made.interval(), made.p]).all() and 0.5 < made.mean < 1.5


def test_differences_that_are_all_alike() -> None:
    none = crossed(np.zeros((3, 20)))
    assert none.interval() == (0.0, 0.0) and none.p == 1.0
    same = crossed(np.full((3, 20), 0.25))
    assert same.interval() == pytest.approx((0.25, 0.25)) and same.p == pytest.approx(0.0, abs=1e-12)
    rounded = crossed(np.full((3, 20), 1e-9), least_error=1e-8)
    assert rounded.interval()[0] < 0 < rounded.interval()[1] and rounded.p > 0.5
    tiny = crossed(1e-180 * np.random.default_rng(5).normal(size=(3, 20)))
    assert 0 <= tiny.p <= 1
