"""Ablation: its numbers against independent references, what is planted is named, chances on data that break the rules.

Shape letters: N samples, T bins, L blocks, U images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from failing import fails
from numpy.typing import NDArray
from scipy import stats

from simpletuner_layerprobe.analyse.ablation import ablation, levels, of_images, parted
from simpletuner_layerprobe.analyse.compare import compare
from simpletuner_layerprobe.analyse.findings import findings
from simpletuner_layerprobe.analyse.ranks import agreement, derangements, interval, profile, reliability, spearman
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.sections import words
from simpletuner_layerprobe.analyse.told import DEPTH, UPDATE_NORM

LEVELS = (0.018, 0.008, 0.045, 0.01, 0.012, 0.009, 0.011, 0.09, 0.01, 0.012, 0.008, 0.0005, -0.0003, 0.011)


def made(
    loss: Any = LEVELS,
    angle: Any = None,
    *,
    samples: int = 600,
    images: int = 150,
    seed: int = 0,
    spread: float = 0.3,
    noise: float = 0.5,
    streams: tuple[str, ...] = ("image",),
    bent: float = 0.0,
) -> tuple[Samples, Samples]:
    """The ablation and the angle of the same samples. loss, angle: level of each block; an image is harder or easier in
    all its samples and for each block by itself (`spread`), a sample by `noise`. bent: by how much the profiles of
    blocks over sigma differ. Image 0 stands for unknown ones."""
    random = np.random.default_rng(seed)
    loss_L = np.asarray(loss, float)
    angle_L = 10 * np.abs(loss_L) if angle is None else np.asarray(angle, float)
    L = len(loss_L)
    sigma_N = (random.permutation(samples) + random.random(samples)) / samples
    image_N = random.permutation(np.arange(samples) % max(images, 1))
    harder_N1 = np.exp(spread * random.standard_normal((max(images, 1), 1)))[image_N]
    own_NL = 1 + spread * random.standard_normal((max(images, 1), L))[image_N]
    over_NL = 1 + bent * np.cos(2 * np.pi * (sigma_N[:, None] + np.arange(L) / L))
    loss_NL = loss_L * over_NL * harder_N1 * own_NL * (1 + noise * random.standard_normal((samples, L)))
    angle_NL = angle_L * over_NL * harder_N1**0.3 * np.exp(0.1 * random.standard_normal((samples, L)))
    number_N = (image_N + 1 if images else image_N * 0).astype(np.uint64)
    paths = tuple(f"b.{i}" for i in range(L))
    whole = Samples(sigma_N, number_N, {"block": paths}, {"block": loss_NL}, "ablation")
    blocks = {name: paths if name == "image" else paths[:-1] for name in streams}
    angles = {name: angle_NL[:, : len(blocks[name])] for name in streams}
    return whole, Samples(sigma_N, number_N, blocks, angles, "mean")


def other(samples: Samples, reading: str, distances: dict[str, NDArray[np.floating]]) -> Samples:
    blocks = {name: samples.blocks["block"][: value.shape[1]] for name, value in distances.items()}
    return Samples(samples.sigma_N, samples.image_N, blocks, distances, reading)


def cells(samples: Samples, stream: str, chosen: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.float64]:
    bin_N = np.floor(samples.sigma_N[chosen] * 10).astype(int)
    value_NL = samples.distances[stream][chosen]
    return np.array([value_NL[bin_N == t].mean(axis=0) for t in range(10)])


# Numbers against references


def test_ranks_are_those_of_scipy() -> None:
    random = np.random.default_rng(1)
    a_RD, b_RD = random.integers(0, 6, (2, 20, 9)).astype(float)
    expected = [stats.spearmanr(a_D, b_D)[0] for a_D, b_D in zip(a_RD, b_RD, strict=True)]
    np.testing.assert_allclose(spearman(a_RD, b_RD), expected, atol=1e-12)
    assert spearman(np.ones(5), np.arange(5.0)) == 0


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    """Levels, correlations over blocks and cells, and intervals of a bootstrap that draws whole images, one by one."""
    whole, angle = made(bent=0.4, streams=("image", "text"))
    result = ablation(whole, angle)
    loss_TL, angle_TL = cells(whole, "block"), cells(angle, "image")
    np.testing.assert_allclose(result.loss_TL, loss_TL, rtol=1e-9)
    np.testing.assert_allclose(result.loss.value_L, loss_TL.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(result.angle["image"].value_L, angle_TL.mean(axis=0), rtol=1e-9)
    assert np.isnan(result.angle["text"].value_L).tolist() == [False] * 13 + [True]
    told, depth_L = result.told["image"], np.abs(np.arange(14) - 6.5)
    over_blocks = stats.spearmanr(loss_TL.mean(axis=0), angle_TL.mean(axis=0))[0]
    alone = stats.spearmanr(loss_TL.mean(axis=0), depth_L)[0]
    assert told.angle.blocks.value == pytest.approx(over_blocks)
    assert told.angle.cells.value == pytest.approx(stats.spearmanr(loss_TL.ravel(), angle_TL.ravel())[0])
    assert told.baselines[DEPTH].blocks.value == pytest.approx(alone)
    assert told.better[DEPTH].blocks.value == pytest.approx(over_blocks - alone)
    within = [stats.spearmanr(loss_TL[:, i], angle_TL[:, i])[0] for i in range(14)]
    assert told.profile.mean.value == pytest.approx(np.mean(within))
    assert result.told["text"].blocks == whole.blocks["block"][:13]
    random, drawn = np.random.default_rng(5), []
    of_image = [np.flatnonzero(whole.image_N == image) for image in np.unique(whole.image_N)]
    for _ in range(400):
        chosen = np.concatenate([of_image[u] for u in random.integers(150, size=150)])
        again, beside = cells(whole, "block", chosen).mean(axis=0), cells(angle, "image", chosen).mean(axis=0)
        drawn.append((*again, stats.spearmanr(again, beside)[0]))
    naive = np.array(drawn)
    low_D, high_D = np.quantile(naive, [0.025, 0.975], axis=0)
    width_L = high_D[:-1] - low_D[:-1]
    np.testing.assert_allclose(result.loss.high_L - result.loss.low_L, width_L, rtol=0.25)
    np.testing.assert_allclose(result.loss.low_L, low_D[:-1], atol=0.2 * width_L.max())
    assert told.angle.blocks.low == pytest.approx(low_D[-1], abs=0.04)
    assert told.angle.blocks.high >= high_D[-1] - 0.02


def test_both_draw_the_same_images() -> None:
    """An angle that is the loss increase itself tells it all, in every replicate; drawn apart it could not."""
    whole, _ = made(spread=1.0, noise=2.0)
    same = other(whole, "mean", {"image": whole.distances["block"]})
    told = ablation(whole, same, norm=other(whole, "update_norm_mean", {"image": whole.distances["block"]})).told[
        "image"
    ]
    assert (told.angle.blocks.low, told.angle.cells.low) == (pytest.approx(1), pytest.approx(1))
    better = told.better[UPDATE_NORM].cells
    assert (better.value, better.low, better.high) == (0, 0, 0)


def test_text_updates_have_their_share_and_their_own_order() -> None:
    whole, angle = made(streams=("image", "text"))
    part_NL = 0.3 * whole.distances["block"][:, :13]
    result = ablation(whole, angle, text=other(whole, "ablation_text", {"text": part_NL}))
    assert result.text is not None and result.text.blocks == whole.blocks["block"][:13]
    expected = 0.3 * cells(whole, "block").mean(axis=0)[:13].sum() / cells(whole, "block").mean(axis=0)[:13].sum()
    assert result.text.share.value == pytest.approx(expected) and result.text.share.high < 0.31
    assert result.text.told.angle.blocks.value == pytest.approx(result.told["text"].angle.blocks.value)
    nothing = other(
        whole, "ablation", {"block": whole.distances["block"] * np.where(np.arange(600) % 2, 1, -1)[:, None]}
    )
    assert np.isnan(ablation(nothing, angle, text=other(whole, "ablation_text", {"text": part_NL})).text.share.value)  # type: ignore[union-attr]


# What is planted


@pytest.mark.parametrize(("samples", "images"), [(600, 150), (200, 100), (400, 40)])
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_planted_blocks_are_named(samples: int, images: int, seed: int) -> None:
    whole, angle = made(samples=samples, images=images, seed=seed)
    result = ablation(whole, angle)
    assert (result.needed, result.hardly) == ((7, 2), (12, 11))


def test_where_in_sigma_a_block_is_needed() -> None:
    whole, angle = made()
    late_N = whole.sigma_N >= 0.7
    whole.distances["block"][~late_N, 7] *= 0.05
    (finding,) = (part for part in ablation(whole, angle).sections[0].findings if part.blocks == ("b.7",))
    assert (finding.low_sigma, finding.high_sigma) == (0.7, 1.0)
    assert words(finding).endswith("most at sigma 0.7 to 1") and "times as much as the median block" in words(finding)


def test_a_block_that_is_never_needed_leaves_the_others_their_place_in_sigma() -> None:
    whole, angle = made([0.01, -0.004, 0.01, 0.01, 0.01, 0.08, 0.01, 0.01])
    whole.distances["block"][whole.sigma_N < 0.6, 5] *= 0.05
    (finding,) = ablation(whole, angle).sections[0].findings
    assert (finding.blocks, finding.low_sigma, finding.high_sigma) == (("b.5",), 0.6, 1.0)


def test_a_wide_interval_around_nothing_is_no_proof_that_a_block_is_needless() -> None:
    whole, angle = made([0.01] * 12, samples=200, images=100)
    whole.distances["block"][:, 5] = 0.1 * np.random.default_rng(0).standard_normal(200)
    result = ablation(whole, angle)
    assert result.loss.low_L[5] < 0 < result.loss.high_L[5] and result.hardly == ()


def test_profiles_over_sigma_are_known_from_shuffled_ones() -> None:
    own = ablation(*made([0.01] * 12, bent=0.6)).told["image"].profile
    assert own.mean.low > own.limit and own.p < 0.001
    whole, angle = made([0.01] * 12, bent=0.6)
    turned = other(whole, "mean", {"image": np.roll(angle.distances["image"], 6, axis=1)})
    assert ablation(whole, turned).told["image"].profile.p > 0.9
    # A trend that all blocks share is nothing of a block's own.
    whole, angle = made([0.01] * 12)
    for samples in (whole, angle):
        for value_NL in samples.distances.values():
            value_NL *= 0.2 + samples.sigma_N[:, None]
    shared = ablation(whole, angle).told["image"].profile
    assert shared.mean.value > 0.8 and shared.p > 0.025


def test_shuffles_leave_nothing_in_its_place() -> None:
    orders = derangements(4, 900, seed=0)
    assert orders.shape == (900, 4) and not (orders == np.arange(4)).any()
    assert len(np.unique(orders, axis=0)) == 9  # all there are
    assert np.isnan(profile(np.random.default_rng(0).random((50, 6, 3)), np.ones((50, 6, 3))).limit)


# Chances on images that come back, differ, and are alike in neighbouring blocks


def held(runs: int, samples: int, images: int) -> tuple[NDArray[np.float64], int]:
    """The share of runs whose intervals hold the truth: of the levels, of the image angle's correlation over blocks, of
    its difference to that of depth; and how many runs name a block that they should not.

    Images come back, move all blocks together and each by itself; blocks are like their neighbours; two stand at the
    very limits of what is named.
    """
    random, share, wrong = np.random.default_rng(7), np.zeros(3), 0
    for seed in range(runs):
        z_L = np.convolve(random.standard_normal(16), [0.5, 0.7, 0.5], "valid")
        loss_L = 0.01 * np.exp(0.25 * z_L)
        angle_L = 0.1 * np.exp(0.3 * z_L + 0.2 * random.standard_normal(14))
        order = np.argsort(loss_L)
        middle = float(np.median(loss_L))
        loss_L[order[0]], loss_L[order[-1]] = 0.1 * middle, 2 * middle
        result = ablation(*made(loss_L, angle_L, samples=samples, images=images, seed=seed, noise=1.0))
        own, depth = (stats.spearmanr(loss_L, side_L)[0] for side_L in (angle_L, np.abs(np.arange(14) - 6.5)))
        told, true_L = result.told["image"], loss_L * np.exp(0.3**2 / 2)  # images are harder by e^(0.3 z)
        share += ((result.loss.low_L <= true_L) & (true_L <= result.loss.high_L)).mean(), 0, 0
        for k, (part, true) in enumerate(((told.angle.blocks, own), (told.better[DEPTH].blocks, own - depth)), 1):
            share[k] += part.low - 1e-9 <= true <= part.high + 1e-9
        wrong += bool(result.needed or result.hardly)
    return share / runs, wrong


def test_intervals_hold_the_truth_and_nothing_untrue_is_named() -> None:
    share, wrong = held(30, 300, 150)
    assert (share >= 0.85).all() and not wrong, share


def test_unknown_images_are_drawn_as_samples() -> None:
    result = ablation(*made(images=0))
    assert result.images is None and result.needed[0] == 7


# Stability


def test_halves_of_the_images_and_parts_of_them() -> None:
    whole, _ = made()
    first, second = parted(whole)
    assert len(first) == len(second) == 75 and not set(first) & set(second)
    few, rest = parted(whole, 50, seed=1)
    assert (len(few), len(rest)) == (50, 100)
    level_L = levels(whole, images=few)
    part = of_images(whole, few)
    assert set(part.image_N) == set(few)
    np.testing.assert_allclose(level_L, cells(part, "block").mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(levels(whole), cells(whole, "block").mean(axis=0), rtol=1e-9)
    alike = agreement(levels(whole, images=first), levels(whole, images=second))
    assert alike.correlation > 0.8 and (alike.most, alike.ends) == (3, 3) and alike.least >= 2
    back = agreement(np.arange(9.0), -np.arange(9.0))
    assert (round(back.correlation, 9), back.most, back.least) == (-1, 0, 0)
    for count, seen in ((0, 150), (150, 150)):
        with fails(f"{count} images cannot be drawn: there are {seen}"):
            parted(whole, count)
    with fails("there are unknown ones"):
        parted(made(images=0)[0])


def test_what_as_many_other_images_would_tell() -> None:
    """The correlation of two runs of different images is what each alone says of it."""
    seen, said = [], []
    for seed in range(8):
        level_L = 0.01 * np.exp(0.3 * np.random.default_rng(seed).standard_normal(14))
        a, b = (ablation(*made(level_L, samples=200, noise=3.0, seed=s)) for s in (seed, seed + 100))
        seen.append(spearman(a.loss.value_L, b.loss.value_L))
        said.append(a.told["image"].reliable[0])
    assert np.mean(said) == pytest.approx(np.mean(seen), abs=0.1)
    assert reliability(np.zeros((20, 5))) == 0


def test_an_interval_reaches_to_both_sides_of_what_chance_pulls_down() -> None:
    pulled = interval(np.concatenate([[0.9], np.linspace(0.7, 0.88, 2000)]))
    assert pulled.low == pytest.approx(0.7045, abs=1e-3) and 0.95 < pulled.high < 1
    below = interval(np.concatenate([[-0.9], np.linspace(-0.88, -0.7, 2000)]))
    assert (below.low, below.high) == (pytest.approx(-pulled.high), pytest.approx(-pulled.low))
    assert interval(np.array([0.9, *[1.0] * 60, *[0.8] * 60])).low == 0.8
    assert str(interval(np.array([1.0, 1.0, 1.0]))) == "1.00 [1.00, 1.00]"


# What is too little, and what does not fit


def test_too_little_is_said() -> None:
    with fails("not enough samples with ablation: no sigma bin has 10"):
        ablation(*made(samples=60, images=30))
    with fails("not enough images with ablation: 4, at least 5"):
        ablation(*made(images=4))
    whole, angle = made(samples=0)
    with fails("no sample has been taken with ablation yet"):
        ablation(whole, angle)
    with fails("not of the same samples"):
        ablation(made()[0], made(seed=1)[1])
    for few in (made([0.01, 0.02, 0.01]), made([0.0] * 9)):
        needed, hardly, *_ = ablation(*few).sections
        assert needed.missing == hardly.missing != ""


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    whole, angle = made()
    whole.distances["block"][3, 2] = np.inf
    result = ablation(whole, angle)
    assert np.isfinite(result.loss.value_L).all() and result.counts_T.sum() == 599


def test_a_loss_has_no_conditions_and_decides_no_factors() -> None:
    whole, _ = made()
    assert [part.kind for part in findings(whole)] == ["needed", "hardly", "gradients", "two-ended"]
    changes = other(whole, "ablation_change", {"block": np.abs(whole.distances["block"])})
    assert [part.kind for part in findings(changes)] == ["gradients", "two-ended"]
    compared = compare(whole, made(seed=1)[0], decide_of=lambda bootstrap: pytest.fail("nothing to decide"))
    assert compared.factors is None and "an ablation" in compared.factors_missing
    assert not compared.streams["block"].levels.significant.any()


def test_a_negative_level_is_no_slope() -> None:
    """A block that the loss would rather do without has no gradient for that alone."""
    levels_L = np.full(12, 0.01)
    levels_L[4] = -0.02
    for part in findings(made(levels_L)[0])[2:]:
        assert not part.findings


if __name__ == "__main__":  # the table of docs/findings.md: PYTHONPATH=tests python tests/unit/test_analyse_ablation.py
    for samples, images in ((200, 20), (200, 50), (200, 200), (600, 200)):
        print(samples, images, *held(200, samples, images))
