"""The bootstrap, the intervals of contributions, and what counts as settled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from failing import fails
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.contribution import article_contributions, article_values
from simpletuner_layerprobe.analyse.heatmap import Heatmap, heatmaps
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.settled import (
    TIMES,
    Confidence,
    article_decide,
    confidence,
    interval,
    times_to_settle,
)
from simpletuner_layerprobe.analyse.units import unit_means

BLOCKS = {"image": tuple("abcdef"), "text": tuple("abcde")}
LEVEL = {"image": np.array([0.30, 0.10, 0.22, 0.16, 0.27, 0.20]), "text": np.array([0.2, 0.05, 0.15, 0.12, 0.10])}
BINS = 4


def factors(value_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The article's: 1 for the largest contribution .. 12 for the smallest."""
    return np.clip(np.rint((1 - value_N) * 11 + 1), 1, 12).astype(np.int64)


def drawn(samples: int, noise: float, *, images: int = 0, seed: int = 0, **more: Any) -> Samples:
    """Samples of a model whose contributions are known. images: 0 for samples of images that are not known."""
    random = np.random.default_rng(seed)
    sigma_N = more.pop("sigma_N", None)
    sigma_N = random.random(samples) if sigma_N is None else sigma_N
    image_N = np.arange(samples) % images + 1 if images else np.zeros(samples)
    own_U = random.standard_normal(images + 1)[:, None] if images else np.zeros((1, 1))
    distances = {
        name: level_L
        + noise * (random.exponential(size=(samples, len(level_L))) - 1 + own_U[image_N.astype(int)] * level_L / 0.2)
        for name, level_L in LEVEL.items()
    }
    return Samples(sigma_N, image_N.astype(np.uint64), BLOCKS, distances, **more)


def bootstrap(samples: int, noise: float, **more: Any) -> Bootstrap:
    return Bootstrap.of(drawn(samples, noise, **more), BINS)


def judged(drawn_from: Bootstrap, **more: Any) -> Confidence:
    return confidence(drawn_from, article_decide(drawn_from, factors), **more)


# Replicates


def test_replicates_scatter_by_the_standard_errors_around_the_means() -> None:
    samples = drawn(400, 0.03, images=40)
    means, replicates = unit_means(samples, BINS), Bootstrap.of(samples, BINS, replicates=4000)
    for name, values_RTL in replicates.replicates().items():
        columns = means.columns[name]
        np.testing.assert_allclose(values_RTL.mean(axis=0), means.mean_TD[:, columns], rtol=1e-9)
        # 39 degrees of freedom: Student's interval is 3% wider than the normal one.
        spread_TL = values_RTL.std(axis=0) / means.error_TD[:, columns]
        np.testing.assert_allclose(spread_TL, 1.032, atol=0.06)
        assert np.array_equal(replicates.mean_TL[name], means.mean_TD[:, columns])
    assert (replicates.unit, replicates.units, replicates.images, replicates.samples) == ("image", 40, 40, 400)


def test_an_image_moves_all_of_its_samples_together() -> None:
    """The same numbers, once with their images known: what an image brings along counts once, not ten times."""
    known = drawn(2000, 0.03, images=20)
    unknown = Samples(known.sigma_N, np.zeros(2000, np.uint64), BLOCKS, known.distances)
    wide, narrow = (
        Bootstrap.of(samples, BINS).replicates()["image"].mean(axis=1).std(axis=0) for samples in (known, unknown)
    )
    assert (wide > 3 * narrow).all()
    assert Bootstrap.of(unknown, BINS).unit == "sample" and Bootstrap.of(unknown, BINS).images is None


def test_the_same_samples_give_the_same_replicates_and_another_seed_others() -> None:
    one, same = bootstrap(200, 0.03), bootstrap(200, 0.03)
    other = Bootstrap.of(drawn(200, 0.03), BINS, seed=1)
    assert np.array_equal(one.replicates()["text"], same.replicates()["text"])
    assert not np.array_equal(one.replicates()["text"], other.replicates()["text"])


def test_times_the_units_scatter_by_the_root_less() -> None:
    made = bootstrap(200, 0.03)
    np.testing.assert_allclose(
        made.replicates(16)["image"] - made.mean_TL["image"], made.deviation_RTL["image"] / 4, atol=1e-15
    )


def test_a_stream_without_a_finite_distance_is_left_out_and_no_stream_is_refused() -> None:
    samples = drawn(50, 0.03)
    samples.distances["text"][:, 2] = np.nan
    made = Bootstrap.of(samples, BINS)
    assert list(made.blocks) == ["image"] and made.names == BLOCKS["image"]
    samples = drawn(50, 0.03)
    for values_NL in samples.distances.values():
        values_NL[:] = np.inf
    with fails("no stream (image, text) has a sample with finite distances"):
        Bootstrap.of(samples, BINS)
    cosine = Samples(samples.sigma_N, samples.image_N, BLOCKS, samples.distances, "update_cosine_last")
    with fails("update_cosine_last may lack numbers"):
        Bootstrap.of(cosine)


# Intervals


def test_the_interval_holds_the_replicates_and_the_place_without_their_bias() -> None:
    random = np.random.default_rng(0)
    value_RL = np.stack([random.normal(0.5, 0.05, 999), random.normal(0.4, 0.05, 999), np.full(999, 0.99)], axis=1)
    low_L, high_L = interval(value_RL, np.array([0.5, 0.5, 1.0]))
    assert low_L[:2] == pytest.approx([0.4, 0.3], abs=0.02)
    assert high_L[:2] == pytest.approx([0.6, 0.7], abs=0.02)  # replicates 0.1 too low: so may be the run itself
    assert (low_L[2], high_L[2]) == pytest.approx((0.99, 1.0))


def test_what_is_decided_for_the_run_itself_is_the_articles() -> None:
    samples = drawn(400, 0.03)
    streams, made = heatmaps(samples, BINS), Bootstrap.of(samples, BINS)
    expected = article_contributions(streams, clip_percentile=80, text_weight=0.5)
    decide = article_decide(made, factors, clip_percentile=80, text_weight=0.5)
    value_1L, factor_1L = decide({name: heatmap.values_TL[None] for name, heatmap in streams.items()})
    assert np.array_equal(value_1L[0], expected.value_L)
    assert np.array_equal(factor_1L[0], factors(expected.value_L))
    assert np.array_equal(confidence(made, decide).factor_K, factor_1L[0])
    named = article_decide(made, factors, critical=(3,))(made.replicates())[1]
    assert (named[:, 3] == 1).all() and (named[:, 1] > 1).all()
    doubled = article_decide(made, factors, alike=lambda factor_RL: np.repeat(factor_RL, 2, axis=1))
    assert confidence(made, doubled).factor_K.shape == (12,)
    with pytest.raises(TypeError):
        article_decide(made, factors, weight=1.0)(made.replicates())


def test_a_critical_block_is_looked_for_in_every_replicate() -> None:
    samples = drawn(400, 0.001)
    samples.distances["text"][:, 2] += 2.0
    made = Bootstrap.of(samples, BINS)
    assert (article_decide(made, factors)(made.replicates())[1][:, 2] == 1).all()


def test_replicates_count_negative_means_as_zero_as_the_run_does() -> None:
    """Loss increases around 0: each replicate is what its own heatmap gives, critical blocks included."""
    random = np.random.default_rng(5)
    change_NL = np.array([0.2, 0.0, -0.1, 0.02, 0.1, 3.0]) + 0.3 * random.standard_normal((400, 6))
    images = (np.arange(400) % 40 + 1).astype(np.uint64)
    samples = Samples(random.random(400), images, {"block": tuple("abcdef")}, {"block": change_NL}, "ablation")
    made = Bootstrap.of(samples, BINS, replicates=50)
    mean_RTL = made.replicates()["block"]
    assert (mean_RTL < 0).any(axis=(1, 2)).all()
    value_RL, factor_RL = article_decide(made, factors)(made.replicates())
    for value_L, factor_L, mean_TL in zip(value_RL, factor_RL, mean_RTL, strict=True):
        counts_T = made.counts_T["block"]
        alone = article_contributions(
            {"block": Heatmap("block", "ablation", tuple("abcdef"), mean_TL, counts_T, mean_TL, 0)}
        )
        assert np.array_equal(value_L, alone.value_L)
        expected_L = factors(alone.value_L)
        expected_L[list(alone.critical_union())] = 1
        assert np.array_equal(factor_L, expected_L)
    sure = judged(made)
    assert np.array_equal(sure.value_RL, value_RL)
    for numbers in ((2,), (2, 1), (1, 2, 3), (0, 5)):
        same = [{*sorted(range(6), key=value_L.__getitem__)[: len(numbers)]} for value_L in value_RL]
        assert sure.least_agreement(numbers) == same.count({*numbers}) / 50
    assert 0 < sure.least_agreement((1, 2)) < 1


def test_intervals_by_ablation_hold_the_truth_though_cells_fall_below_zero() -> None:
    """Blocks next to idle, images that differ, skewed effects and noise of its own in every loss increase."""
    level_L = np.array([0.02, 0.03, 0.05, 0.04, 0.06, 0.08, 0.1, 0.4, 0.12, 0.07, 0.03, 0.002, 0.0, 0.01])
    blocks = {"block": tuple(f"block.{i}" for i in range(14))}
    true_TL = level_L * (0.5 + np.arange(0.05, 1, 0.1)[:, None])
    truth_L = article_values({"block": true_TL[None]}, blocks)[0]
    held, below = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        sigma_N, image_N = (random.permutation(200) + random.random(200)) / 200, random.permutation(200) % 60
        harder_N = np.exp(0.5 * random.standard_normal(60) - 0.125)[image_N]
        skewed_NL = np.exp(0.5 * random.standard_normal((200, 14)) - 0.125)
        change_NL = level_L * skewed_NL * ((0.5 + sigma_N) * harder_N)[:, None]
        change_NL += 0.045 * random.standard_normal((200, 14))
        samples = Samples(sigma_N, (image_N + 1).astype(np.uint64), blocks, {"block": change_NL}, "ablation")
        made = Bootstrap.of(samples)
        sure = judged(made)
        held.append((sure.low_L <= truth_L + 1e-12) & (truth_L <= sure.high_L + 1e-12))
        below.append(made.mean_TL["block"] < 0)
    assert np.mean(below) > 0.05 and np.mean(held) > 0.92 and np.mean(held, axis=0).min() > 0.8


# Settled


def test_little_noise_settles_what_much_does_not() -> None:
    loud, quiet = judged(bootstrap(400, 0.1, images=50)), judged(bootstrap(400, 0.0001, images=50))
    assert not loud.settled and quiet.settled and quiet.settled_K.all()
    assert ((loud.agreement_K >= 0.95) == loud.settled_K).all() and (loud.high_L - loud.low_L)[2:].min() > 0.05
    assert judged(bootstrap(400, 0.1, images=50), share=0.01).settled_K.all()
    assert (
        quiet.text()
        == "6 of 6 factors settled for images like these 50: 95% of 400 bootstrap replicates decide the same"
    )
    assert loud.text("rank").startswith(f"{loud.settled_K.sum()} of 6 ranks settled for images like these 50")
    assert judged(bootstrap(400, 0.0001)).text().startswith("6 of 6 factors settled for these images: 95%")


@pytest.mark.parametrize("images", [1, 4])
def test_few_images_settle_nothing_however_many_samples(images: int) -> None:
    sure = judged(bootstrap(4000, 0.0001, images=images))
    assert not sure.enough and not sure.settled_K.any()
    assert sure.text().endswith("fewer than 5 images, or fewer than 10 samples in a sigma bin")
    assert judged(bootstrap(4000, 0.0001, images=5)).settled


def test_a_bin_with_few_samples_settles_nothing_and_one_with_none_does_not_count() -> None:
    random = np.random.default_rng(6)
    for last, enough in ((9, False), (10, True), (0, True)):
        sigma_N = np.concatenate([random.random(4000) * 0.75, np.full(last, 0.9)])
        assert judged(bootstrap(4000 + last, 0.0001, sigma_N=sigma_N)).settled is enough


def test_times_to_settle_says_how_many_times_the_images_all_need() -> None:
    few = bootstrap(400, 0.05, images=40)
    decide = article_decide(few, factors)
    times = times_to_settle(few, decide)
    assert times in TIMES
    agreement = {
        factor: (decide(few.replicates(factor))[1] == confidence(few, decide).factor_K).mean(axis=0).min()
        for factor in (times, times / 2)
    }
    assert agreement[times] >= 0.95 > agreement[times / 2]
    quiet = bootstrap(400, 0.0001, images=40)
    assert times_to_settle(quiet, article_decide(quiet, factors)) == 1


def test_a_boundary_that_no_number_of_images_can_tell_is_said_to_be_one() -> None:
    # The middle block lies exactly between two factors, and scatters evenly around that.
    middle_N = 1 - 0.5 / 11 + 0.01 * np.tile([-1.0, 1.0], 500)
    distance_NL = np.stack([middle_N * 0, middle_N, middle_N * 0 + 1], axis=1)
    samples = Samples(np.full(1000, 0.5), np.zeros(1000, np.uint64), {"image": tuple("abc")}, {"image": distance_NL})
    made = Bootstrap.of(samples, 1)
    decide = article_decide(made, factors, clip_percentile=100, critical=())
    assert confidence(made, decide).settled_K.tolist() == [True, False, True]
    assert times_to_settle(made, decide) is None


def test_times_to_settle_decides_few_times() -> None:
    """A plan takes seconds for its replicates: at most five looks."""
    made, looks = bootstrap(400, 0.05, images=40), []

    def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        looks.append(len(mean_RTL["image"]))
        return article_decide(made, factors)(mean_RTL)

    times_to_settle(made, decide)
    assert looks[0] == 1 and len(looks) <= 6


def test_blocks_that_are_all_equal_are_judged_without_a_warning() -> None:
    ones = {name: np.ones((20, len(paths))) for name, paths in BLOCKS.items()}
    made = Bootstrap.of(Samples(np.full(20, 0.1), np.zeros(20, np.uint64), BLOCKS, ones), 1)
    assert judged(made).factor_K.tolist() == [12] * 6
