"""Samples and units: what is refused, and standard errors against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from simpletuner_layerprobe.analyse.chances import holm, pooled_freedom, scores, sign_chances, student95
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.units import bin_index, grouped, unit_means, unit_numbers

BLOCKS = {"image": ("b.0", "b.1", "b.2"), "text": ("b.0", "b.1")}


def made(images: NDArray[np.int_] | int, samples: int = 400, seed: int = 0, **more: object) -> Samples:
    """Samples with levels of their own for every image. images: a number of them, or one per sample."""
    random = np.random.default_rng(seed)
    image_N = random.integers(1, images + 1, samples) if isinstance(images, int) and images else images
    image_N = np.broadcast_to(image_N, samples).astype(np.uint64)
    level_U = random.normal(1, 0.3, int(image_N.max()) + 1)
    sigma_N = random.random(samples)
    distances = {
        name: (0.1 * level_U[image_N, None] * (1 + sigma_N[:, None]) + 0.02 * random.random((samples, len(paths))))
        for name, paths in BLOCKS.items()
    }
    return Samples(sigma_N, image_N, BLOCKS, distances, **more)  # type: ignore[arg-type]


# Samples


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = made(5)
    with fails("image has the shape (3,), expected (400,) for 400 samples"):
        Samples(good.sigma_N, good.image_N[:3], BLOCKS, good.distances)
    with fails("the text stream has the shape (400, 3), expected (400, 2)"):
        Samples(good.sigma_N, good.image_N, BLOCKS, {**good.distances, "text": good.distances["image"]})
    with fails("size has the shape (2,)"):
        Samples(good.sigma_N, good.image_N, BLOCKS, good.distances, facts={"size": np.zeros(2)})
    with fails("have distances of the streams ['image'], blocks of ['image', 'text']"):
        Samples(good.sigma_N, good.image_N, BLOCKS, {"image": good.distances["image"]})
    with fails("there is no reading 'first'"):
        Samples(good.sigma_N, good.image_N, BLOCKS, good.distances, "first")


def test_images_are_counted_only_where_all_are_known() -> None:
    assert made(5).images == 5 and made(5).samples == 400
    assert made(0).images is None
    some_N = np.repeat([0, 7, 8, 9], 100)
    assert made(some_N).images is None
    with fails("there are no samples yet"):
        Samples(
            np.zeros(0), np.zeros(0, np.uint64), BLOCKS, {k: np.zeros((0, len(v))) for k, v in BLOCKS.items()}
        ).require()


# Units


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_units_are_images_and_samples_of_unknown_ones(images: list[int]) -> None:
    samples = made(np.array(images), len(images))
    number_N, units = unit_numbers(samples)
    assert sorted(set(number_N.tolist())) == list(range(units))
    assert units == len({i for i in images if i}) + images.count(0)
    for i, image in enumerate(images):
        same = {j for j in range(len(images)) if number_N[j] == number_N[i]}
        assert same == ({j for j in range(len(images)) if images[j] == image} if image else {i})


@given(st.integers(1, 5000), st.integers(1, 300))
def test_groups_are_few_neighbours_and_about_alike(units: int, most: int) -> None:
    group_U = grouped(np.arange(units), units, most)
    sizes = np.bincount(group_U)
    assert len(sizes) == min(units, most) and (np.diff(group_U) >= 0).all()
    assert sizes.max() - sizes.min() <= 1


def test_errors_of_unknown_images_are_those_of_the_textbook() -> None:
    samples = made(0, bins := 300)
    means = unit_means(samples, 3)
    bin_N = bin_index(samples.sigma_N, 3)
    for t in range(3):
        inside_ND = np.concatenate([samples.distances[name][bin_N == t] for name in BLOCKS], axis=1)
        np.testing.assert_allclose(means.mean_TD[t], inside_ND.mean(axis=0), rtol=1e-12)
        error_D = inside_ND.std(axis=0, ddof=1) / math.sqrt(len(inside_ND))
        np.testing.assert_allclose(means.error_TD[t], error_D, rtol=1e-9)
        np.testing.assert_allclose(means.freedom_TD[t], len(inside_ND) - 1)
    assert means.unit == "sample" and means.units == bins


def test_errors_between_equal_images_are_those_of_the_images_means() -> None:
    """Twelve images of ten samples each: the textbook's error of twelve numbers."""
    samples = made(np.repeat(np.arange(1, 13), 10), 120)
    means = unit_means(samples, 1)
    image_UD = np.stack([np.mean(samples.distances["image"][i * 10 : i * 10 + 10], axis=0) for i in range(12)])
    np.testing.assert_allclose(means.mean_TD[0, :3], image_UD.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(means.error_TD[0, :3], image_UD.std(axis=0, ddof=1) / math.sqrt(12), rtol=1e-9)
    assert means.unit == "image" and means.units == 12 and means.freedom_TD[0, 0] == pytest.approx(11)
    rows = unit_means(made(0, 120), 1)
    assert (means.error_TD[0] > 2 * rows.error_TD[0]).all()


def test_a_level_over_bins_knows_that_an_image_moves_them_together() -> None:
    samples = made(np.repeat(np.arange(1, 21), 100), 2000)
    means = unit_means(samples, 10)
    _, error_D, freedom_D = means.levels(np.full((10, 5), 0.1))
    apart_D = np.sqrt((means.error_TD**2).sum(axis=0)) / 10
    assert (error_D > 2 * apart_D).all() and (freedom_D <= 19 + 1e-9).all()
    image_U = [np.mean(samples.distances["image"][i * 100 : i * 100 + 100, 0]) for i in range(20)]
    assert error_D[0] == pytest.approx(np.std(image_U, ddof=1) / math.sqrt(20), rel=0.1)


def test_a_bin_of_one_image_tells_no_error() -> None:
    samples = made(np.where(np.arange(400) % 2, 1, 2))
    one = Samples(samples.sigma_N, np.ones(400, np.uint64), BLOCKS, samples.distances)
    means = unit_means(one, 2)
    assert np.isnan(means.error_TD).all() and not means.influence_GTD.any() and not means.freedom_TD.any()
    assert np.isfinite(unit_means(samples, 2).error_TD).all()


def test_many_units_are_put_together_and_keep_their_spread() -> None:
    samples = made(0, 60_000)
    means = unit_means(samples, 1)
    assert len(means.influence_GTD) == 2048 and means.units == 60_000
    error_D = samples.distances["image"].std(axis=0, ddof=1) / math.sqrt(60_000)
    np.testing.assert_allclose(means.error_TD[0, :3], error_D, rtol=0.06)
    assert unit_means(samples, 1) is means


def test_stratified_sigmas_take_no_part_of_the_error() -> None:
    """Distances that follow sigma: with sigmas drawn evenly the mean hardly scatters, and the error says so."""
    random = np.random.default_rng(3)
    sigma_N = (np.concatenate([random.permutation(1000) for _ in range(4)]) + random.random(4000)) / 1000
    distance_NL = 0.1 + np.outer(sigma_N, [0.5, 0.3, -0.05]) + 0.001 * random.standard_normal((4000, 3))
    blocks = {"image": BLOCKS["image"]}
    errors = {
        stratified: unit_means(
            Samples(sigma_N, np.zeros(4000, np.uint64), blocks, {"image": distance_NL}, stratified=stratified), 10
        ).error_TD
        for stratified in (False, True)
    }
    np.testing.assert_allclose(errors[True], 0.001 / 20, rtol=0.15)
    assert (errors[False][:, 0] > 5 * errors[True][:, 0]).all()


# Chances


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=30))
def test_holm_by_its_definition(chances: list[float]) -> None:
    corrected_D = holm(np.array(chances, dtype=np.float64))
    known = sorted(p for p in chances if p == p)
    for p, corrected in zip(chances, corrected_D.tolist(), strict=True):
        if p != p:
            assert corrected != corrected
            continue
        assert corrected == max(min(1.0, (len(known) - rank) * other) for rank, other in enumerate(known) if other <= p)


def test_an_interval_without_freedom_is_everything() -> None:
    freedom = np.array([0.0, -1.0, 1.0, 19.0, np.inf])
    wanted = [np.inf, np.inf, *stats.t.ppf(0.975, [1, 19]), stats.norm.ppf(0.975)]
    np.testing.assert_allclose(student95(freedom), wanted, rtol=1e-12)
    assert scores(np.array([1.0, 0.0, -1.0]), np.zeros(3)).tolist() == [np.inf, 0.0, -np.inf]


def test_pooled_freedom_is_welchs() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(0, 1, 8), random.normal(0, 3, 25)
    square_2 = np.array([[part.var(ddof=1) / len(part)] for part in (a, b)])
    expected = stats.ttest_ind(a, b, equal_var=False).df
    assert pooled_freedom(square_2, np.array([[7.0], [24.0]]))[0] == pytest.approx(expected)
    assert pooled_freedom(np.zeros((2, 1)), np.ones((2, 1)))[0] == np.inf


def test_signs_at_random_give_the_exact_chance_of_few_units() -> None:
    """Six units: all 64 signs can be written down."""
    score_G1 = np.array([[3.0], [1.0], [2.0], [-0.5], [1.5], [0.7]])
    every = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T @ score_G1[:, 0]
    exact = (np.abs(every) >= score_G1.sum() - 1e-9).mean()
    assert sign_chances(score_G1, draws=20_000)[0] == pytest.approx(exact, abs=0.005)
    assert sign_chances(np.zeros((4, 2))).tolist() == [1.0, 1.0]
    # Of 20 columns that are the same, none costs more than one; of 20 independent ones each does.
    random = np.random.default_rng(0)
    same = random.normal(0.5, 1, (30, 1)) * np.ones(20)
    assert sign_chances(same)[0] == pytest.approx(sign_chances(same[:, :1])[0], abs=1e-9)
    noise = np.concatenate([same[:, :1], random.normal(0, 1, (30, 19))], axis=1)
    assert sign_chances(noise)[0] > 3 * sign_chances(same[:, :1])[0]


def test_many_units_get_their_signs_in_groups() -> None:
    random = np.random.default_rng(0)
    score_GD = random.normal(0.02, 1, (20_000, 2))
    z = score_GD.sum(axis=0) / np.sqrt((score_GD**2).sum(axis=0))
    chance_D = sign_chances(score_GD[:, :1], draws=4000)
    assert chance_D[0] == pytest.approx(2 * stats.norm.sf(abs(z[0])), abs=0.02)
