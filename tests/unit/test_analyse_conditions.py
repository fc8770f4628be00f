"""Conditions: what the facts of samples go with, within images and between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from simpletuner_layerprobe.analyse.conditions import (
    ASPECT,
    BACKEND,
    CAPTION,
    DROPPED,
    SIZE,
    Condition,
    Effect,
    conditions,
    effect,
)
from simpletuner_layerprobe.analyse.findings import Section, findings
from simpletuner_layerprobe.analyse.samples import Samples

BLOCKS = {"image": tuple(f"b.{i}" for i in range(10))}
IMAGES, SAMPLES = 60, 1200
IMAGE_N = np.tile(np.arange(1, IMAGES + 1), SAMPLES // IMAGES)


def made(
    facts: dict[str, Any], *, moves: NDArray[np.float64] | None = None, known: bool = True, seed: int = 0
) -> Samples:
    """Samples whose block 4 goes with `moves`, as a share of its level; images have levels of their own."""
    random = np.random.default_rng(seed)
    sigma_N = random.random(SAMPLES)
    level_U = np.exp(0.3 * random.standard_normal((IMAGES + 1, 10)))
    distance_NL = 0.1 * level_U[IMAGE_N] * (1 + sigma_N[:, None]) * np.exp(0.3 * random.standard_normal((SAMPLES, 10)))
    if moves is not None:
        distance_NL[:, 4] *= 1 + moves
    image_N = IMAGE_N.astype(np.uint64) if known else np.zeros(SAMPLES, np.uint64)
    return Samples(sigma_N, image_N, BLOCKS, {"image": distance_NL}, facts=facts)


def answer(samples: Samples, name: str) -> Effect | str:
    return effect(samples, next(condition for condition in conditions(samples) if condition.name == name))


def known(samples: Samples, name: str) -> Effect:
    told = answer(samples, name)
    assert isinstance(told, Effect), told
    return told


# Facts


def test_a_captions_length_is_in_words_else_in_characters_else_in_tokens() -> None:
    words_N, characters_N = np.arange(SAMPLES) % 7, np.arange(SAMPLES) % 50
    facts = {"caption_words": words_N, "caption_characters": characters_N, "text_tokens": np.full(SAMPLES, 77)}
    for missing, length_N in ((), words_N), (("caption_words",), characters_N):
        left = {name: value for name, value in facts.items() if name not in missing}
        caption = next(condition for condition in conditions(made(left)) if condition.name == CAPTION)
        np.testing.assert_allclose(caption.x_N, np.log2(1 + length_N))
    constant = made({"caption_words": np.full(SAMPLES, -1), "text_tokens": np.full(SAMPLES, 77)})
    assert answer(constant, CAPTION) == "the caption length does not vary in this run"


def test_dropped_captions_are_no_short_ones_and_sizes_are_logarithms() -> None:
    dropped_N = (np.arange(SAMPLES) % 10 == 0).astype(np.int8)
    facts = {"caption_words": np.where(dropped_N, 0, 8), "dropped": dropped_N}
    facts |= {"width": np.full(SAMPLES, 1024), "height": np.full(SAMPLES, 512)}
    facts["height"][0] = 0
    by_name = {condition.name: condition.x_N for condition in conditions(made(facts))}
    assert np.isnan(by_name[CAPTION][dropped_N == 1]).all() and (by_name[CAPTION][dropped_N == 0] == np.log2(9)).all()
    assert np.isnan(by_name[SIZE][0]) and by_name[SIZE][1] == 19 and by_name[ASPECT][1] == 1
    assert by_name[DROPPED].tolist() == dropped_N.tolist()


def test_facts_that_are_not_there_are_said_to_be_missing() -> None:
    samples = made({})
    for name in (CAPTION, SIZE, ASPECT, DROPPED):
        assert answer(samples, name) == "not recorded in this run"
    assert [condition.name for condition in conditions(samples)] == [CAPTION, SIZE, ASPECT, DROPPED]


# Effects


def test_within_images_it_is_the_slope_that_plain_regression_on_dummies_gives() -> None:
    dropped_N = np.random.default_rng(5).random(SAMPLES) < 0.3
    samples = made({"dropped": dropped_N.astype(np.int8)}, moves=np.where(dropped_N, 0.4, 0.0))
    told = known(samples, DROPPED)
    assert told.within and told.units == IMAGES and told.samples == SAMPLES
    bin_N = np.floor(samples.sigma_N * 10).astype(int)
    bins = np.eye(10)[bin_N]
    x_N = dropped_N - bins @ (bins.T @ dropped_N / bins.sum(axis=0))
    x_N -= (np.bincount(IMAGE_N, x_N) / np.maximum(np.bincount(IMAGE_N), 1))[IMAGE_N]
    log_NL = np.log(samples.distances["image"])
    rest_NL = log_NL - bins @ (bins.T @ log_NL / bins.sum(axis=0)[:, None])
    np.testing.assert_allclose(np.log1p(told.effect_D), x_N @ rest_NL / (x_N @ x_N), rtol=1e-9)
    assert told.low_D[4] < 0.4 < told.high_D[4] and told.p_D[4] <= 0.001
    assert (np.delete(told.p_D, 4) > 0.005).all()


def test_between_images_an_image_counts_once() -> None:
    """Copies of the same samples add nothing: neither certainty nor a finding."""
    words_U = np.concatenate([[0], np.random.default_rng(1).integers(3, 60, IMAGES)])
    samples = made({"caption_words": words_U[IMAGE_N]})
    once = known(samples, CAPTION)
    assert not once.within and once.units == IMAGES
    copies = Samples(
        np.tile(samples.sigma_N, 5),
        np.tile(samples.image_N, 5),
        BLOCKS,
        {"image": np.tile(samples.distances["image"], (5, 1))},
        facts={"caption_words": np.tile(words_U[IMAGE_N], 5)},
    )
    again = known(copies, CAPTION)
    np.testing.assert_allclose(again.low_D, once.low_D, rtol=1e-9)
    np.testing.assert_allclose(again.p_D, once.p_D)


def test_between_images_it_is_the_slope_over_two_standard_deviations_with_an_honest_interval() -> None:
    length_U = np.random.default_rng(2).normal(4, 1, IMAGES + 1)
    x_N = length_U[IMAGE_N]
    moves = np.expm1(0.5 * (x_N - x_N.mean()) / (2 * x_N.std()))
    told = effect(made({}, moves=moves), Condition(CAPTION, "", x_N))
    assert isinstance(told, Effect)
    slope = stats.linregress(length_U[1:], np.zeros(IMAGES)).slope
    assert slope == 0
    assert told.low_D[4] < np.expm1(0.5) < told.high_D[4]
    assert 0.2 < told.high_D[4] - told.low_D[4] < 0.8


def test_groups_of_images_are_compared_with_the_rest() -> None:
    names_N = np.array(["", "photos", "art", "scans"])[1 + IMAGE_N % 3]
    samples = made({"backend": names_N}, moves=np.where(names_N == "art", 0.8, 0.0))
    told = {
        condition.value: effect(samples, condition) for condition in conditions(samples) if condition.name == BACKEND
    }
    assert list(told) == ["art", "photos", "scans"]
    assert isinstance(told["art"], Effect) and told["art"].p_D[4] <= 0.005 and 0.4 < told["art"].effect_D[4] < 1.3


@pytest.mark.parametrize("known_images", [True, False])
def test_a_distance_of_zero_has_an_effect_without_a_warning(known_images: bool) -> None:
    dropped_N = np.random.default_rng(5).random(SAMPLES) < 0.3
    samples = made({"dropped": dropped_N.astype(np.int8)}, known=known_images)
    samples.distances["image"][:, 2] = 0.0
    samples.distances["image"][::2, 3] = 0.0
    samples.distances["image"][5] = np.nan
    told = known(samples, DROPPED)
    assert told.effect_D[2] == 0 and told.p_D[2] == 1 and np.isfinite(told.effect_D).all()


def test_what_is_too_little_is_said() -> None:
    ones = np.ones(SAMPLES, np.int8)
    assert answer(made({"dropped": ones}), DROPPED) == "all captions dropped"
    assert answer(made({"dropped": 0 * ones}), DROPPED) == "no captions dropped"
    some = ((IMAGE_N <= 5) & (np.arange(SAMPLES) < 600)).astype(np.int8)
    assert answer(made({"dropped": some}), DROPPED) == "not enough images: 5 tell something of it, 12 are needed"
    few = np.where(IMAGE_N <= 3, "few", "many")
    told = answer(made({"backend": few}), BACKEND)
    assert told == "not enough images: 3 in the smaller group, 4 are needed"


# Sections


def sections(samples: Samples) -> dict[str, Section]:
    return {section.kind: section for section in findings(samples)}


def test_a_section_says_how_it_was_compared() -> None:
    dropped_N = np.random.default_rng(5).random(SAMPLES) < 0.3
    facts = {"dropped": dropped_N.astype(np.int8), "caption_words": 3 + IMAGE_N, "backend": np.full(SAMPLES, "photos")}
    told = sections(made(facts, moves=np.where(dropped_N, 0.5, 0.0)))
    (dropped,) = told[DROPPED].findings
    assert dropped.blocks == ("b.4",) and dropped.effect == pytest.approx(0.5, abs=0.15) and dropped.share is None
    assert told[DROPPED].notes == ("compared within each of 60 images",)
    assert told[CAPTION].notes == ("compared between 60 images",) and not told[CAPTION].missing
    assert told[BACKEND].missing == "all samples come from one data backend (photos)"
    assert told[SIZE].missing == "not recorded in this run"
    unknown = sections(made(facts, known=False))
    assert unknown[DROPPED].notes == ("images are not known: this holds for these images, others may differ",)


def test_two_backends_are_one_comparison_and_several_are_corrected_for() -> None:
    two = np.where(IMAGE_N % 2, "a", "b")
    told = sections(made({"backend": two}, moves=np.where(two == "a", 1.0, 0.0)))[BACKEND]
    assert {finding.value for finding in told.findings} == {"a"}
    three = np.array(["a", "b", "c"])[IMAGE_N % 3]
    samples = made({"backend": three}, moves=np.where(three == "a", 1.0, 0.0))
    alone = effect(samples, next(condition for condition in conditions(samples) if condition.value == "a"))
    assert isinstance(alone, Effect)
    finding = next(finding for finding in sections(samples)[BACKEND].findings if finding.value == "a")
    assert finding.p == pytest.approx(3 * alone.p_D[4])
