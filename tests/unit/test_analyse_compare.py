from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from synthetic_run import SD35_LARGE, manifest, rows

from simpletuner_layerprobe.analyse import compare as compare_module
from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Tally
from simpletuner_layerprobe.analyse.compare import (
    ALPHA,
    CHANGED,
    KIND_ALPHA,
    OPEN,
    SAME,
    SAMPLES,
    Comparison,
    as_json,
    compare,
    factor_comparison,
    holm,
    sigma_ranges,
    stream_comparisons,
    student95,
    two_sided,
)
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.run.records import Run, ShardWriter, create_run, open_run
from simpletuner_layerprobe.training.sigmas import stratified_sigmas

SMALL = {"image": tuple(f"b.{i}" for i in range(12)), "text": tuple(f"b.{i}" for i in range(11))}
Levels = dict[str, NDArray[np.float64]]


def even_levels(blocks: dict[str, tuple[str, ...]], random: np.random.Generator) -> Levels:
    """(10, L) levels that differ by 8% from block to block and not with sigma."""
    return {
        name: np.tile(0.05 * np.exp(0.08 * random.standard_normal(len(paths))), (10, 1))
        for name, paths in blocks.items()
    }


def drawn(levels: Levels, samples: int, random: np.random.Generator) -> tuple[NDArray[np.float64], Levels]:
    """Sigmas and distances: skewed noise of half the level, 30% of it shared by all blocks of a sample."""
    sigma_N = random.random(samples)
    shared_N1 = random.exponential(size=(samples, 1)) - 1
    distances = {}
    for name, level_TL in levels.items():
        own_NL = random.exponential(size=(samples, level_TL.shape[1])) - 1
        noise_NL = np.sqrt(0.3) * shared_N1 + np.sqrt(0.7) * own_NL
        distances[name] = level_TL[(sigma_N * 10).astype(int)] * (1 + 0.5 * noise_NL)
    return sigma_N, distances


def bootstrap(
    blocks: dict[str, tuple[str, ...]], sigma_N: NDArray[np.float64], distances: Levels, **settings: object
) -> Bootstrap:
    tally = Tally(replace(manifest(blocks, tokens=("last",)), settings=settings))
    tally.add(rows(sigma_N, {(name, "last"): values_NL for name, values_NL in distances.items()}))
    return tally.bootstrap(replicates=100)


def made_run(folder: Path, sigma_N: NDArray[np.float64], distances: Levels, **facts: object) -> Run:
    blocks = {name: tuple(f"b.{i}" for i in range(values_NL.shape[1])) for name, values_NL in distances.items()}
    what = replace(manifest(blocks, tokens=("last",)), **facts)
    create_run(folder, what)
    ShardWriter(folder, what, rank=0).write(
        rows(sigma_N, {(name, "last"): values_NL for name, values_NL in distances.items()})
    )
    return open_run(folder)


# Against an independent reference


@given(st.floats(0, 40), st.floats(10, 1e6))
def test_the_chance_is_students(score: float, freedom: float) -> None:
    expected = 2 * stats.t.sf(score, freedom)
    found = float(two_sided(np.array(score), np.array(freedom)))
    assert found == pytest.approx(expected, rel=5e-3, abs=1e-300)
    assert float(student95(np.array(freedom))) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=30))
def test_holm_by_its_definition(chances: list[float]) -> None:
    found = holm(np.array(chances, dtype=np.float64))
    known = sorted(p for p in chances if p == p)
    for p, corrected in zip(chances, found.tolist(), strict=True):
        if p != p:
            assert corrected != corrected
            continue
        steps = [min(1.0, (len(known) - rank) * one) for rank, one in enumerate(known) if one <= p]
        assert corrected == max(steps)


def test_cells_and_levels_are_those_of_welchs_test() -> None:
    random = np.random.default_rng(0)
    per_bin, L = 40, 7
    sigma_N = np.repeat((np.arange(10) + 0.5) / 10, per_bin)
    a_NL, b_NL = (0.1 + scale * random.random((len(sigma_N), L)) for scale in (0.02, 0.05))
    blocks = {"image": tuple(f"b.{i}" for i in range(L))}
    found = stream_comparisons(*(bootstrap(blocks, sigma_N, {"image": one}) for one in (a_NL, b_NL)))["image"]
    reference = stats.ttest_ind(b_NL.reshape(10, per_bin, L), a_NL.reshape(10, per_bin, L), axis=1, equal_var=False)
    flat = reference.pvalue.ravel()
    order = np.argsort(flat)
    corrected = np.empty(flat.size)
    corrected[order] = np.minimum(1, np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)))
    np.testing.assert_allclose(found.cells.p.ravel(), corrected, rtol=5e-3)
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(found.cells.low, interval.low, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found.cells.high, interval.high, rtol=1e-4, atol=1e-8)
    for i in range(L):
        parts = [one[:, i].reshape(10, per_bin) for one in (a_NL, b_NL)]
        squares = np.concatenate([part.var(axis=1, ddof=1) / per_bin / 100 for part in parts])
        freedom = squares.sum() ** 2 / (squares**2 / (per_bin - 1)).sum()
        difference = parts[1].mean() - parts[0].mean()
        margin = stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum())
        assert found.levels.difference[i] == pytest.approx(difference, rel=1e-9)
        assert found.levels.high[i] - found.levels.low[i] == pytest.approx(2 * margin, rel=1e-4)


def test_stratified_runs_have_the_smaller_errors_that_they_earn() -> None:
    random = np.random.default_rng(3)
    blocks = {"image": ("b.0", "b.1", "b.2")}
    widths = {}
    for kind in ("uniform", "stratified"):
        pair = []
        for seed in (1, 2):
            sigma_N = random.random(4000) if kind == "uniform" else stratified_sigmas(np.arange(4000), seed=seed)
            distance_NL = 0.1 + np.outer(sigma_N, [0.5, 0.3, -0.05]) + 0.001 * random.standard_normal((4000, 3))
            pair.append(bootstrap(blocks, sigma_N, {"image": distance_NL}, sigmas=kind))
        levels = stream_comparisons(*pair)["image"].levels
        widths[kind] = (levels.high - levels.low)[0]
        assert (levels.low[0] <= 0 <= levels.high[0]) and not levels.significant.any()
    assert widths["stratified"] < widths["uniform"] / 4


# What it must find, and what not


def test_planted_changes_are_found_and_nothing_else() -> None:
    right = wrong = missed = 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        before = even_levels(SD35_LARGE, random)
        after = {name: level_TL.copy() for name, level_TL in before.items()}
        whole = {(name, int(i)) for name in after for i in random.choice(30, 3, replace=False)}
        for name, i in whole:
            after[name][:, i] *= random.choice([0.9, 1.1])
        for name in after:
            after[name][3, 33] *= 1.4
        pair = [bootstrap(SD35_LARGE, *drawn(levels, SAMPLES, random)) for levels in (before, after)]
        for name, stream in stream_comparisons(*pair).items():
            changed = set(np.flatnonzero(stream.levels.significant).tolist())
            planted = {i for one, i in whole if one == name}
            right += len(changed & planted) + int(stream.cells.significant[3, 33])
            missed += len(planted - changed) + int(not stream.cells.significant[3, 33])
            wrong += len(changed - planted - {33})
            elsewhere_TL = stream.cells.significant.copy()
            elsewhere_TL[:, [*planted, 33]] = False
            wrong += int(elsewhere_TL.sum())
    assert right / (right + wrong) >= 0.95
    assert right / (right + missed) >= 0.95


@pytest.mark.parametrize(("samples_a", "samples_b"), [(250, 2500), (1000, 1000)])
def test_two_runs_of_the_same_truth_rarely_differ(samples_a: int, samples_b: int) -> None:
    random = np.random.default_rng(0)
    repetitions = 200  # of 1,500 with 1,000 samples each 2.7% showed something, of 800 with 250 and 2,500 0.25%
    shown = 0
    for _ in range(repetitions):
        levels = even_levels(SMALL, random)
        levels["image"][:, 5] *= 5
        pair = [bootstrap(SMALL, *drawn(levels, samples, random)) for samples in (samples_a, samples_b)]
        streams = stream_comparisons(*pair)
        changed = any(one.cells.significant.any() or one.levels.significant.any() for one in streams.values())
        shown += changed or CHANGED in factor_comparison(*pair, streams, article_factors).verdict_L
    assert shown / repetitions <= ALPHA


def test_factors_change_only_where_both_are_settled() -> None:
    random = np.random.default_rng(0)
    before = {name: np.tile(np.linspace(0.02, 0.2, len(paths)), (10, 1)) for name, paths in SMALL.items()}
    after = {name: level_TL.copy() for name, level_TL in before.items()}
    for name in after:
        after[name][:, 2] = 0.15
    verdicts = {}
    for samples in (300, 20_000):
        pair = [bootstrap(SMALL, *drawn(levels, samples, random)) for levels in (before, after)]
        found = factor_comparison(*pair, stream_comparisons(*pair), article_factors)
        verdicts[samples] = found.verdict_L
        assert found.a.factor_K[2] > found.b.factor_K[2] + 2
    assert verdicts[20_000][2] == CHANGED and verdicts[20_000].count(CHANGED) == 1
    assert verdicts[20_000].count(SAME) >= 5
    assert verdicts[300].count(OPEN) > verdicts[20_000].count(OPEN)


def test_a_critical_block_that_is_none_any_more_changes_its_factor() -> None:
    random = np.random.default_rng(1)
    before = even_levels(SMALL, random)
    after = {name: level_TL.copy() for name, level_TL in before.items()}
    before["text"][:, 4] *= 8
    after["text"][:, 4] = after["image"][:, 4] = 0.03
    pair = [bootstrap(SMALL, *drawn(levels, 20_000, random)) for levels in (before, after)]
    found = factor_comparison(*pair, stream_comparisons(*pair), article_factors)
    assert 4 in found.critical_a and 4 not in found.critical_b
    assert found.a.factor_K[4] == 1 and found.b.factor_K[4] == 12 and found.verdict_L[4] == CHANGED


# Whole runs


def comparison(folder: Path, **facts: object) -> Comparison:
    random = np.random.default_rng(5)
    levels = even_levels(SMALL, random)
    a = made_run(folder / "a", *drawn(levels, 2000, random))
    sigma_N, distances = drawn(levels, 1500, random)
    distances["text"][:7, 3] = np.nan
    sigma_N[sigma_N < 0.1] += 0.1
    return compare(a, made_run(folder / "b", sigma_N, distances, **facts), article_factors)


def test_runs_of_different_size_with_an_empty_bin_and_nan(tmp_path: Path) -> None:
    found = comparison(tmp_path, flavour="medium", settings={"sigmas": "uniform", "seed": 1}, fingerprint="ab")
    assert (found.samples_a, found.samples_b) == (2000, 1500)
    for name, stream in found.streams.items():
        assert stream.used_T.tolist() == [False] + [True] * 9
        assert np.isnan(stream.cells.difference[0]).all() and np.isnan(stream.cells.p[0]).all()
        assert (stream.nonfinite_a, stream.nonfinite_b) == (0, 7 if name == "text" else 0)
    assert found.factors is not None and set(found.factors.verdict_L) == {OPEN}  # a bin is empty in one run only
    said = " | ".join(found.notes)
    assert "1 of 10 sigma bins of the image stream are left out" in said
    assert "not finite: 0 in A, 7 in B" in said and "1,493 samples: with fewer than 2,000" in said
    assert "draw sigma in different ways" in said
    assert found.differences == (
        "flavour: large in A, medium in B",
        "fingerprint: unknown in A, ab in B",
        "settings.sigmas: absent in A, uniform in B",
        "settings.seed: absent in A, 1 in B",
    )
    as_text = json.dumps(as_json(found), allow_nan=False)
    assert json.loads(as_text)["streams"]["text"]["cells"]["p"][0] == [None] * 11


def test_too_few_samples_are_said_to_be_too_few(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    levels = even_levels(SMALL, random)
    a, b = (made_run(tmp_path / name, *drawn(levels, 60, random)) for name in "ab")
    found = compare(a, b, article_factors)
    assert all(one.missing.startswith("not enough samples: no sigma bin has 20") for one in found.streams.values())
    assert not any(one.levels.significant.any() for one in found.streams.values())


def test_a_run_compared_with_itself_has_not_changed(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    run = made_run(tmp_path / "a", *drawn(even_levels(SMALL, random), 2000, random))
    found = compare(run, run, article_factors)
    assert found.differences == () and found.notes == ()
    for stream in found.streams.values():
        assert not stream.cells.difference.any() and (stream.cells.p == 1).all()
    assert found.factors is not None and CHANGED not in found.factors.verdict_L


def test_rounding_is_no_change_and_noiseless_changes_are_certain(tmp_path: Path) -> None:
    sigma_N = (np.arange(1000) + 0.5) / 1000
    level_L = np.linspace(0.1, 0.2, 4)
    parts = {"a": level_L, "b": level_L * (1 + 1e-9), "c": level_L * [1, 1, 1, 1.001]}
    runs = {
        name: made_run(tmp_path / name, sigma_N, {"image": np.tile(one_L, (1000, 1))}) for name, one_L in parts.items()
    }
    assert not compare(runs["a"], runs["b"], article_factors).streams["image"].levels.significant.any()
    assert compare(runs["a"], runs["c"], article_factors).streams["image"].levels.significant.tolist() == [
        False
    ] * 3 + [True]


def test_equal_blocks_have_no_factors_but_can_be_compared(tmp_path: Path) -> None:
    sigma_N = (np.arange(1000) + 0.5) / 1000
    run = made_run(tmp_path / "a", sigma_N, {"image": np.full((1000, 3), 0.1)})
    found = compare(run, run, article_factors)
    assert found.factors is None and found.factors_missing.startswith("A has no contributions: all 3 blocks have")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, other, image = (
        made_run(tmp_path / name, *drawn(even_levels(blocks, random), 50, random))
        for name, blocks in (("a", SMALL), ("b", SMALL | {"text": SMALL["text"][:9]}), ("c", {"image": SMALL["image"]}))
    )
    with fails("different blocks in the text stream: A has 11, B has 9; compare runs of the same architecture"):
        compare(a, other, article_factors)
    with fails("different streams: A has image, text, B has image; compare"):
        compare(a, image, article_factors)
    renamed = replace(a.manifest.streams[0], blocks=("x.0", *SMALL["image"][1:]))
    with fails("in the image stream: A has 'b.0' where B has 'x.0'; compare"):
        compare_module.require_same_blocks(a.manifest, replace(a.manifest, streams=(renamed, a.manifest.streams[1])))
    with fails("has no reading 'mean'"):
        compare(a, a, article_factors, tokens="mean")
    what = manifest(SMALL, tokens=("last",))
    with fails("has no samples"):
        compare(a, create_run(tmp_path / "empty", what), article_factors)


def test_module_tables_that_differ_are_told(tmp_path: Path) -> None:
    from synthetic_run import sd3_modules

    random = np.random.default_rng(0)
    a = made_run(tmp_path / "a", *drawn(even_levels(SMALL, random), 400, random))
    b = replace(a.manifest, modules=sd3_modules(2))
    assert compare_module.manifest_differences(a.manifest, b)[-1].startswith("modules: 0 in A, ")


def test_ranges_of_sigma() -> None:
    assert sigma_ranges(np.array([True, True, False, True])) == ((0, 0.5), (0.75, 1))
    assert sigma_ranges(np.zeros(3, dtype=bool)) == ()
    assert pytest.approx(3 * KIND_ALPHA) == ALPHA
