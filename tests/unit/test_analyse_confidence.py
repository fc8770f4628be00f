from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from failing import fails
from synthetic_run import SD35_LARGE, manifest, rows, write_run

from simpletuner_layerprobe.analyse import bootstrap as module
from simpletuner_layerprobe.analyse.bootstrap import (
    Bootstrap,
    Tally,
    article_decision,
    confidence,
    more_samples,
    tally,
)
from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.run.manifest import Manifest
from simpletuner_layerprobe.run.records import Rows
from simpletuner_layerprobe.training.sigmas import stratified_sigmas

BLOCKS = {"image": tuple("abcdef"), "text": tuple("abcde")}
LEVEL = {"image": np.array([0.30, 0.10, 0.22, 0.16, 0.27, 0.20]), "text": np.array([0.2, 0.05, 0.15, 0.12, 0.10])}
SLOPE = {"image": np.array([0.10, 0.02, -0.05, 0.04, 0, 0.03]), "text": np.array([0, 0.03, 0.05, -0.04, 0.02])}
BINS = 4


def known(stratified: bool = False) -> Manifest:
    what = manifest(BLOCKS, tokens=("last",))
    what.settings["sigmas"] = "stratified" if stratified else "uniform"
    return what


def draw(random: np.random.Generator, samples: int, noise: float, sigma_N: np.ndarray | None = None) -> Rows:
    """Samples of a model whose contributions are known: skewed noise per distance, and some shared by a sample."""
    sigma_N = random.random(samples) if sigma_N is None else sigma_N
    shared_N1 = random.standard_normal((samples, 1))
    distances = {}
    for stream, level_L in LEVEL.items():
        own_NL = random.exponential(size=(samples, len(level_L))) - 1
        distances[stream, "last"] = level_L + SLOPE[stream] * sigma_N[:, None] + noise * (own_NL + shared_N1)
    return rows(sigma_N, distances)


def true_means(bins: int = BINS) -> dict[str, np.ndarray]:
    centre_T1 = (np.arange(bins)[:, None] + 0.5) / bins
    return {stream: LEVEL[stream] + SLOPE[stream] * centre_T1 for stream in BLOCKS}


def article(found: Bootstrap, **options):
    return article_decision(found.blocks, found.count_T, article_factors, **options)


def bootstrap_of(random: np.random.Generator, samples: int, noise: float, replicates: int = 400) -> Bootstrap:
    counted = Tally(known(), bins=BINS)
    counted.add(draw(random, samples, noise))
    return counted.bootstrap(replicates=replicates, seed=int(random.integers(2**30)))


# Intervals


def test_the_intervals_cover_the_truth() -> None:
    """1,000 repetitions of a run of 200 samples; blocks 0 and 1 are the ends of the scale by definition."""
    random = np.random.default_rng(7)
    decide = article_decision(
        BLOCKS, dict.fromkeys(BLOCKS, np.ones(BINS, dtype=np.int64)), article_factors, critical=()
    )
    truth_L = decide({stream: mean_TL[None] for stream, mean_TL in true_means().items()})[0][0]
    assert truth_L[:2].tolist() == [1, 0] and len(set(truth_L)) == 5
    covered_RL = np.zeros((1000, 6), dtype=bool)
    for repetition in range(1000):
        found = confidence(bootstrap_of(random, 200, 0.03), decide)
        covered_RL[repetition] = (found.low_L <= truth_L) & (truth_L <= found.high_L)
    coverage_L = covered_RL.mean(axis=0)
    assert 0.93 <= coverage_L[2:].mean() <= 0.97
    assert (coverage_L[2:] >= 0.925).all() and (coverage_L[2:] <= 0.975).all()


def test_standard_errors_are_those_of_the_textbook(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 300)
    found = tally(run, bins=3).bootstrap(replicates=4000)
    every = list(run.rows())
    sigma_N = np.concatenate([part.sigma_N for part in every])
    for stream in SD35_LARGE:
        distance_NL = np.concatenate([part.distances[stream, "last"] for part in every]).astype(np.float64)
        for t in range(3):
            inside_NL = distance_NL[(sigma_N * 3).astype(int) == t]
            error_L = inside_NL.std(axis=0, ddof=1) / math.sqrt(len(inside_NL))
            np.testing.assert_allclose(found.error_TL[stream][t], error_L, rtol=1e-9)
            np.testing.assert_allclose(found.deviation_RTL[stream][:, t].std(axis=0), error_L, rtol=0.06)
            np.testing.assert_allclose(found.mean_TL[stream][t], inside_NL.mean(axis=0), rtol=1e-12)


def test_what_is_decided_is_the_articles_contribution_and_factors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 400, peaks=[("image", 0), ("text", 31), ("image", 35)])
    streams = heatmaps(run)
    expected = article_contributions(streams, clip_percentile=80, text_weight=0.5)
    found = tally(run).bootstrap(replicates=50)
    decide = article(found, clip_percentile=80, text_weight=0.5)
    value_1L, factor_1L = decide({name: heatmap.mean_TL[None] for name, heatmap in streams.items()})
    assert np.array_equal(value_1L[0], expected.value_L)
    factors = article_factors(expected.value_L, critical=expected.critical_union())
    assert factor_1L[0].tolist() == factors.tolist()
    assert confidence(found, decide).factor_K.tolist() == factors.tolist()
    # A critical block is looked for in each replicate, unless it was named.
    named = article(found, critical=(3,))(found.replicates())[1]
    assert (named[:, 3] == 1).all() and not (named[:, 0] > 1).any() and (named[:, 31] > 1).any()


# Groups


def test_groups_do_not_depend_on_the_shards_and_stay_few() -> None:
    random = np.random.default_rng(0)
    whole = draw(random, 9000, 0.05)
    pieces = np.array_split(np.arange(9000), [1, 2, 700, 705, 8999])
    tallies = []
    for parts in ([np.arange(9000)], pieces):
        counted = Tally(known(), bins=64)
        for index_N in parts:
            counted.add(rows(whole.sigma_N[index_N], {k: v[index_N] for k, v in whole.distances.items()}))
        tallies.append(counted)
    one, other = tallies
    assert one.samples == other.samples == 9000
    assert one._sum_TGD.shape[1] == 128 and one._size_T.max() == 2
    assert np.array_equal(one._count_TGS, other._count_TGS) and np.array_equal(one._size_T, other._size_T)
    np.testing.assert_allclose(one._sum_TGD, other._sum_TGD, rtol=1e-12)


def test_the_spread_survives_the_joining_of_groups() -> None:
    random = np.random.default_rng(1)
    found = draw(random, 60_000, 0.05)
    counted = Tally(known(), bins=1)
    for part in range(0, 60_000, 20_000):
        index = slice(part, part + 20_000)
        counted.add(rows(found.sigma_N[index], {k: v[index] for k, v in found.distances.items()}))
    assert counted._size_T.tolist() == [8]
    expected_L = found.distances["image", "last"].std(axis=0, ddof=1) / math.sqrt(60_000)
    np.testing.assert_allclose(counted.bootstrap(replicates=10).error_TL["image"][0], expected_L, rtol=0.05)


def test_stratified_samples_are_drawn_in_tens() -> None:
    """Noise-free distances that follow sigma: with strata the means hardly scatter, and the errors say so."""
    sigma_N = stratified_sigmas(np.arange(2000), seed=0)
    errors = {}
    for stratified in (False, True):
        counted = Tally(known(stratified), bins=10)
        counted.add(draw(np.random.default_rng(0), 2000, 0.0, sigma_N))
        errors[stratified] = counted.bootstrap(replicates=10).error_TL["image"][:, 0]
    assert (errors[True] < errors[False] / 5).all()
    few = Tally(known(True), bins=10)
    few.add(draw(np.random.default_rng(0), 1000, 0.0, sigma_N[:1000]))
    assert (few.bootstrap(replicates=10).error_TL["image"][:, 0] > errors[False]).all()


def test_a_sample_that_is_not_finite_is_left_out_of_its_stream_alone() -> None:
    random = np.random.default_rng(2)
    found = draw(random, 100, 0.05)
    found.distances["text", "last"][::2, 1] = np.nan
    counted = Tally(known(), bins=1)
    counted.add(found)
    made = counted.bootstrap(replicates=2000)
    assert made.count_T["image"].tolist() == [100] and made.count_T["text"].tolist() == [50]
    good_NL = found.distances["text", "last"][1::2]
    np.testing.assert_allclose(made.mean_TL["text"][0], good_NL.mean(axis=0))
    error_L = good_NL.std(axis=0, ddof=1) / math.sqrt(50)
    np.testing.assert_allclose(made.error_TL["text"][0], error_L, rtol=0.02)
    np.testing.assert_allclose(made.deviation_RTL["text"][:, 0].std(axis=0), error_L, rtol=0.1)


def test_the_same_samples_give_the_same_replicates() -> None:
    one, other = (bootstrap_of(np.random.default_rng(3), 100, 0.05) for _ in range(2))
    for stream in BLOCKS:
        assert np.array_equal(one.deviation_RTL[stream], other.deviation_RTL[stream])


def test_many_bins_take_fewer_replicates() -> None:
    for bins, replicates in ((10, 1000), (50, 400), (1000, 200)):
        counted = Tally(known(), bins=bins)
        counted.add(draw(np.random.default_rng(0), 50, 0.05))
        assert len(counted.bootstrap().deviation_RTL["image"]) == replicates


# What is settled


def test_more_samples_settle_what_few_did_not() -> None:
    random = np.random.default_rng(4)
    few, many = bootstrap_of(random, 400, 0.05), bootstrap_of(random, 400_000, 0.05)
    unsettled = confidence(few, article(few)).unsettled()
    assert unsettled and 1 not in unsettled
    assert confidence(many, article(many)).unsettled() == ()
    assert more_samples(many, article(many)) == 0
    # The estimate takes the means for the truth: spread as little as so many samples would be, all agree, and just so.
    asked = more_samples(few, article(few))
    assert asked is not None and 400 < asked < 400_000
    for part, settled in ((1.0, True), (0.9, False)):
        sure = confidence(few, article(few), times=part * (400 + asked) / 400)
        assert (sure.unsettled() == ()) == settled
    assert (more_samples(few, article(few), share=0.99) or 0) > asked
    assert more_samples(few, article(few), sure=confidence(few, article(few))) == asked


def test_more_samples_decides_no_more_than_it_takes() -> None:
    """The run itself is judged once, and replicates are not counted further where they cannot settle all any more."""
    found = bootstrap_of(np.random.default_rng(4), 400, 0.05)
    decided: list[int] = []

    def never_alike(mean_RTL: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        decided.append(len(mean_RTL["image"]))
        value_RL, factor_RL = article(found)(mean_RTL)
        return value_RL, np.arange(len(factor_RL))[:, None] + 0 * factor_RL

    sure = confidence(found, never_alike)
    R = sure.replicates
    assert decided == [1, R]
    assert more_samples(found, never_alike, sure=sure) is None
    assert sum(decided[2:]) < R / 4


def test_it_is_the_spread_that_shrinks_with_more_samples() -> None:
    found = bootstrap_of(np.random.default_rng(5), 200, 0.05)
    wide, narrow = (confidence(found, article(found), times=times) for times in (1, 16))
    np.testing.assert_allclose((narrow.high_L - narrow.low_L)[2:], (wide.high_L - wide.low_L)[2:] / 4, rtol=0.15)


def test_a_bin_with_few_samples_settles_nothing() -> None:
    random = np.random.default_rng(6)
    sigma_N = np.concatenate([random.random(4000) * 0.75, np.full(5, 0.9)])
    counted = Tally(known(), bins=BINS)
    counted.add(draw(random, 4005, 0.0001, sigma_N))
    found = counted.bootstrap()
    sure = confidence(found, article(found))
    assert not sure.enough and sure.unsettled() == tuple(range(6))
    assert more_samples(found, article(found)) == 4005  # twice the five of the scarcest bin


def test_blocks_that_are_all_equal_are_judged_without_a_warning() -> None:
    counted = Tally(known(), bins=1)
    counted.add(rows([0.1] * 20, {(stream, "last"): np.ones((20, len(BLOCKS[stream]))) for stream in BLOCKS}))
    found = counted.bootstrap()
    assert confidence(found, article(found)).factor_K.tolist() == [12] * 6


def test_a_boundary_that_no_number_of_samples_can_tell_is_said_to_be_one() -> None:
    counted = Tally(manifest({"image": tuple("abc")}, tokens=("last",)), bins=1)
    # The middle block lies exactly between two factors, and scatters evenly around that.
    middle_N = 1 - 0.5 / 11 + 0.01 * np.tile([-1.0, 1.0], 500)
    counted.add(rows([0.5] * 1000, {("image", "last"): np.stack([middle_N * 0, middle_N, middle_N * 0 + 1], axis=1)}))
    found = counted.bootstrap()
    decide = article(found, clip_percentile=100, critical=())
    assert confidence(found, decide).unsettled() == (1,)
    assert more_samples(found, decide) is None
    assert module.MOST_TIMES >= 1000


def test_errors() -> None:
    with fails("no reading 'mean'; it has: last"):
        Tally(known(), tokens="mean")
    with fails("no samples to judge by"):
        Tally(known()).bootstrap()


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", BLOCKS, 0)
    with fails("has no samples"):
        tally(run)


def test_an_odd_number_of_the_weights_is_not_swallowed() -> None:
    found = bootstrap_of(np.random.default_rng(8), 100, 0.05)
    with pytest.raises(TypeError):
        article(found, weight=1.0)(found.replicates())
