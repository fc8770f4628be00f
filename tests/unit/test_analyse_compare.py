"""Two runs: what changed, how sure that is, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from failing import fails
from numpy.typing import NDArray
from scipy import stats

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.change import ALPHA, KIND_ALPHA, sigma_text
from simpletuner_layerprobe.analyse.compare import (
    CHANGED,
    OPEN,
    SAME,
    Comparison,
    as_json,
    change_text,
    compare,
)
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.settled import Decide, article_decide
from simpletuner_layerprobe.errors import ProbeError

SD35_LARGE, SMALL = {"image": 38, "text": 37}, {"image": 12, "text": 11}
Levels = dict[str, NDArray[np.float64]]


def article(bootstrap: Bootstrap) -> Decide:
    return article_decide(bootstrap, lambda value_N: np.clip(np.rint((1 - value_N) * 11 + 1), 1, 12).astype(np.int64))


def even_levels(blocks: dict[str, int], random: np.random.Generator) -> Levels:
    """(10, L) levels that differ by 8% from block to block and not with sigma."""
    return {name: np.tile(0.05 * np.exp(0.08 * random.standard_normal(L)), (10, 1)) for name, L in blocks.items()}


def drawn(levels: Levels, samples: int, random: np.random.Generator, images: int = 0, **more: Any) -> Samples:
    """Skewed noise of half the level, 30% of it shared by all blocks, and 20% by all samples of an image."""
    sigma_N = random.random(samples)
    image_N = np.arange(samples) % images + 1 if images else np.zeros(samples, np.int64)
    own_U = 0.2 * random.standard_normal(images + 1) * (images > 0)
    shared_N1 = random.exponential(size=(samples, 1)) - 1
    distances = {}
    for name, level_TL in levels.items():
        noise_NL = np.sqrt(0.3) * shared_N1 + np.sqrt(0.7) * (random.exponential(size=(samples, len(level_TL.T))) - 1)
        distances[name] = level_TL[(sigma_N * 10).astype(int)] * (1 + 0.5 * noise_NL + own_U[image_N, None])
    return whole(sigma_N, distances, image_N=image_N.astype(np.uint64), **more)


def whole(sigma_N: NDArray[np.float64], distances: Levels, **more: Any) -> Samples:
    paths = {name: tuple(f"b.{i}" for i in range(values_NL.shape[1])) for name, values_NL in distances.items()}
    image_N = more.pop("image_N", np.zeros(len(sigma_N), np.uint64))
    return Samples(sigma_N, image_N, paths, distances, **more)


# Against an independent reference


def test_cells_and_levels_are_those_of_welchs_test() -> None:
    random = np.random.default_rng(0)
    per_bin, L = 40, 7
    sigma_N = np.repeat((np.arange(10) + 0.5) / 10, per_bin)
    a_NL, b_NL = (0.1 + scale * random.random((len(sigma_N), L)) for scale in (0.02, 0.05))
    stream = compare(whole(sigma_N, {"image": a_NL}), whole(sigma_N, {"image": b_NL})).streams["image"]
    reference = stats.ttest_ind(b_NL.reshape(10, per_bin, L), a_NL.reshape(10, per_bin, L), axis=1, equal_var=False)
    flat = reference.pvalue.ravel()
    order = np.argsort(flat)
    corrected = np.empty(flat.size)
    corrected[order] = np.minimum(1, np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)))
    np.testing.assert_allclose(stream.cells.p.ravel(), corrected, rtol=1e-6)
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(stream.cells.low, interval.low, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(stream.cells.high, interval.high, rtol=1e-6, atol=1e-10)
    for i in range(L):
        parts = [side[:, i].reshape(10, per_bin) for side in (a_NL, b_NL)]
        error = np.sqrt(sum((part.var(axis=1, ddof=1) / per_bin / 100).sum() for part in parts))
        assert stream.levels.difference[i] == pytest.approx(parts[1].mean() - parts[0].mean(), rel=1e-9)
        assert stream.levels.high[i] - stream.levels.low[i] == pytest.approx(2 * 1.963 * error, rel=2e-3)


def test_between_images_the_errors_are_those_of_images() -> None:
    random = np.random.default_rng(1)
    levels = even_levels(SMALL, random)
    known = [drawn(levels, 2000, random, images=20) for _ in range(2)]
    unknown = [replace(side, image_N=np.zeros(2000, np.uint64)) for side in known]
    wide, narrow = (compare(*pair).streams["image"].levels for pair in (known, unknown))
    assert ((wide.high - wide.low) > 3 * (narrow.high - narrow.low)).all()
    assert compare(*unknown).notes[:2] == (
        "the images of A are not known: a change may be one of images",
        "the images of B are not known: a change may be one of images",
    )


# What it must show, and what not


def test_planted_changes_are_shown_and_nothing_else() -> None:
    right = wrong = missed = 0
    for seed in range(6):
        random = np.random.default_rng(seed)
        before = even_levels(SD35_LARGE, random)
        after = {name: level_TL.copy() for name, level_TL in before.items()}
        moved = {(name, int(i)) for name in after for i in random.choice(30, 3, replace=False)}
        for name, i in moved:
            after[name][:, i] *= random.choice([0.9, 1.1])
        for name in after:
            after[name][3, 33] *= 1.4
        streams = compare(*(drawn(levels, 2000, random) for levels in (before, after))).streams
        for name, stream in streams.items():
            changed = set(np.flatnonzero(stream.levels.significant).tolist())
            planted = {i for side, i in moved if side == name}
            right += len(changed & planted) + int(stream.cells.significant[3, 33])
            missed += len(planted - changed) + int(not stream.cells.significant[3, 33])
            elsewhere_TL = stream.cells.significant.copy()
            elsewhere_TL[:, [*planted, 33]] = False
            wrong += len(changed - planted - {33}) + int(elsewhere_TL.sum())
    assert right / (right + wrong) >= 0.95
    assert right / (right + missed) >= 0.95


def test_factors_change_only_where_both_are_settled() -> None:
    random = np.random.default_rng(0)
    before = {name: np.tile(np.linspace(0.02, 0.2, L), (10, 1)) for name, L in SMALL.items()}
    after = {name: level_TL.copy() for name, level_TL in before.items()}
    for name in after:
        after[name][:, 2] = 0.15
    verdicts = {}
    for samples in (300, 20_000):
        factors = compare(*(drawn(levels, samples, random) for levels in (before, after)), article).factors
        assert factors is not None and factors.a.factor_K[2] > factors.b.factor_K[2] + 2
        verdicts[samples] = factors.verdict_K
    assert verdicts[20_000][2] == CHANGED and verdicts[20_000].count(CHANGED) == 1
    assert verdicts[20_000].count(SAME) >= 5
    assert verdicts[300].count(OPEN) > verdicts[20_000].count(OPEN)


def test_a_critical_block_that_is_none_any_more_changes_its_factor() -> None:
    random = np.random.default_rng(1)
    before = even_levels(SMALL, random)
    after = {name: level_TL.copy() for name, level_TL in before.items()}
    before["text"][:, 4] *= 8
    after["text"][:, 4] = after["image"][:, 4] = 0.03
    factors = compare(*(drawn(levels, 20_000, random) for levels in (before, after)), article).factors
    assert factors is not None
    assert factors.a.factor_K[4] == 1 and factors.b.factor_K[4] == 12 and factors.verdict_K[4] == CHANGED


def test_of_decisions_that_are_not_one_per_block_the_settled_ones_count() -> None:
    random = np.random.default_rng(0)
    levels = {name: np.tile(np.linspace(0.02, 0.2, L), (10, 1)) for name, L in SMALL.items()}
    pair = [drawn(levels, 2000, random) for _ in range(2)]

    def largest(bootstrap: Bootstrap) -> Decide:
        return lambda mean_RTL: (
            article(bootstrap)(mean_RTL)[0],
            mean_RTL["image"].mean(axis=1).argmax(axis=1)[:, None],
        )

    factors = compare(pair[0], pair[1], largest).factors
    assert factors is not None and factors.verdict_K == (SAME,)


# Whole runs


def comparison() -> Comparison:
    random = np.random.default_rng(5)
    levels = even_levels(SMALL, random)
    a, b = drawn(levels, 2000, random), drawn(levels, 1500, random, images=50, stratified=True)
    b.distances["text"][:7, 3] = np.nan
    sigma_N = np.where(b.sigma_N < 0.1, b.sigma_N + 0.1, b.sigma_N)
    return compare(a, replace(b, sigma_N=sigma_N), article)


def test_runs_of_different_size_with_an_empty_bin_and_nan() -> None:
    told = comparison()
    assert (told.samples_a, told.samples_b, told.blocks) == (2000, 1500, tuple(f"b.{i}" for i in range(12)))
    for name, stream in told.streams.items():
        assert stream.used_T.tolist() == [False] + [True] * 9
        assert np.isnan(stream.cells.difference[0]).all() and np.isnan(stream.cells.p[0]).all()
        assert (stream.nonfinite_a, stream.nonfinite_b) == (0, 7 if name == "text" else 0)
    assert told.factors is not None and set(told.factors.verdict_K) == {OPEN}  # a bin is empty in one run only
    said = " | ".join(told.notes)
    assert "1 of 10 sigma bins of the image stream are left out" in said
    assert "not finite: 0 in A, 7 in B" in said and "draw sigma in different ways" in said
    assert "images of A are not known" in said and "images of B" not in said
    again = json.loads(json.dumps(as_json(told), allow_nan=False))
    assert again["streams"]["text"]["cells"]["p"][0] == [None] * 11
    assert again["factors"]["verdict_K"] == [OPEN] * 12 and len(again["factors"]["a"]["factor_K"]) == 12


def test_too_few_samples_are_said_to_be_too_few() -> None:
    random = np.random.default_rng(0)
    levels = even_levels(SMALL, random)
    told = compare(*(drawn(levels, 60, random) for _ in range(2)))
    assert all(part.missing.startswith("not enough samples: no sigma bin has 20") for part in told.streams.values())
    assert not any(part.levels.significant.any() for part in told.streams.values())
    assert as_json(told)["factors"] is None and told.factors_missing == "nothing was asked to be decided"


def test_a_run_of_one_image_tells_no_change() -> None:
    random = np.random.default_rng(0)
    levels = even_levels(SMALL, random)
    single = drawn(levels, 2000, random, images=1)
    told = compare(single, drawn({k: 2 * v for k, v in levels.items()}, 2000, random, images=100))
    assert np.isnan(told.streams["image"].levels.p).all() and np.isnan(told.streams["image"].cells.p).all()


def test_a_run_compared_with_itself_has_not_changed() -> None:
    random = np.random.default_rng(0)
    run = drawn(even_levels(SMALL, random), 2000, random, images=100)
    told = compare(run, run, article)
    assert told.notes == ()
    for stream in told.streams.values():
        assert not stream.cells.difference.any() and (stream.cells.p == 1).all()
    assert told.factors is not None and CHANGED not in told.factors.verdict_K


def test_rounding_is_no_change_and_noiseless_changes_are_certain() -> None:
    sigma_N, level_L = (np.arange(1000) + 0.5) / 1000, np.linspace(0.1, 0.2, 4)
    a, b, c = (
        whole(sigma_N, {"image": np.tile(part_L, (1000, 1))})
        for part_L in (level_L, level_L * (1 + 1e-9), level_L * [1, 1, 1, 1.001])
    )
    assert not compare(a, b).streams["image"].levels.significant.any()
    assert compare(a, c).streams["image"].levels.significant.tolist() == [False] * 3 + [True]


def test_what_cannot_be_decided_is_told_and_the_rest_is_compared() -> None:
    random = np.random.default_rng(0)
    levels = even_levels(SMALL, random)
    a, b = (drawn(levels, 1000, random) for _ in range(2))

    def refuses(bootstrap: Bootstrap) -> Decide:
        raise ProbeError("the run has no module table")

    assert compare(a, b, refuses).factors_missing == "the run has no module table"
    silent = whole(b.sigma_N, {"image": b.distances["image"], "text": b.distances["text"] * np.nan})
    told = compare(a, silent, article)
    assert told.factors is None and "finite distances of the same streams" in told.factors_missing
    assert not told.streams["image"].missing and told.streams["text"].missing


def test_other_architectures_readings_and_empty_runs_are_refused() -> None:
    random = np.random.default_rng(0)
    a = drawn(even_levels(SMALL, random), 50, random)
    with fails("different blocks in the text stream: A has 11, B has 9; compare runs of the same architecture"):
        compare(a, drawn(even_levels(SMALL | {"text": 9}, random), 50, random))
    with fails("different streams: A has image, text, B has image; compare"):
        compare(a, drawn(even_levels({"image": 12}, random), 50, random))
    with fails("in the image stream: A has 'b.0' where B has 'x.0'; compare"):
        compare(a, replace(a, blocks={**a.blocks, "image": ("x.0", *a.blocks["image"][1:])}))
    with fails("different readings: A has last, B has mean"):
        compare(a, replace(a, reading="mean"))
    with fails("there are no samples yet"):
        compare(a, drawn(even_levels(SMALL, random), 0, random))


def test_words() -> None:
    assert sigma_text(np.array([True, True, False, True])) == "0 to 0.5, 0.75 to 1"
    assert sigma_text(np.zeros(3, dtype=bool)) == "none"
    random = np.random.default_rng(0)
    before = even_levels({"image": 3}, random)
    levels = (
        compare(*(drawn(part, 4000, random) for part in (before, {"image": 2 * before["image"]})))
        .streams["image"]
        .levels
    )
    assert "(+1" in change_text(levels, 0) or "(+9" in change_text(levels, 0)
    assert pytest.approx(3 * KIND_ALPHA) == ALPHA
