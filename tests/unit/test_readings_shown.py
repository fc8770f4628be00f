"""The further readings from a run folder to heatmaps, figures and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Result, assert_one_line
from failing import fails
from synthetic_run import manifest, rows, sd3_modules, write_ablated_run, write_extra_run, write_rows, write_run

from simpletuner_layerprobe import Run, compare, load
from simpletuner_layerprobe.analyse.ranks import agreement

BLOCKS = {"image": tuple(f"a.{i}" for i in range(6)), "text": ("a.0", "a.1", "a.2")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("extra") / "run"
    write_extra_run(folder, BLOCKS, 200, seam=2)
    return load(folder)


def bins_of(run: Run) -> np.ndarray:
    return np.floor(run.sigma * 5)


@pytest.mark.parametrize("reading", ["update_norm_last", "update_cosine_mean"])
def test_heatmaps_of_updates_are_means_over_what_there_is(run: Run, reading: str) -> None:
    for stream in BLOCKS:
        heatmap = run.heatmap(stream, reading, bins=5)
        value_NL = run.distances(stream, reading).astype(float)
        expected = [np.nanmean(value_NL[bins_of(run) == t], axis=0) for t in range(5)]
        np.testing.assert_allclose(heatmap.values_TL, expected, rtol=1e-6)
        assert heatmap.counts_T.tolist() == run.counts(5).tolist()
        assert heatmap.nonfinite == 0 and heatmap.reading == reading


def test_pairs_weigh_bins_equally_and_end_at_the_seam(run: Run) -> None:
    shown = run.pair_heatmaps("mean", bins=5)
    assert run.heatmap("image").nonfinite == 0  # a pair that does not exist is no broken sample
    assert shown["image"].values_PL.shape == (4, 6) and shown["text"].values_PL.shape == (4, 3)
    for stream, heatmap in shown.items():
        for span in range(1, 5):
            row_L = heatmap.values_PL[span - 1]
            columns = max(len(BLOCKS[stream]) - span + 1, 0)
            crossing = [first for first in range(columns) if first < 2 < first + span]
            assert np.isnan(row_L[columns:]).all()
            assert np.flatnonzero(np.isnan(row_L[:columns])).tolist() == crossing
            for first in set(range(columns)) - set(crossing):
                value_NC = run.distances(stream, "mean" if span == 1 else f"pair{span}_mean").astype(float)
                expected = np.mean([value_NC[bins_of(run) == t, first].mean() for t in range(5)])
                assert row_L[first] == pytest.approx(expected, rel=1e-6)


def test_what_a_run_was_not_recorded_with_is_said(layerprobe: Callable[..., Result], tmp_path: Path, run: Run) -> None:
    plain = load(write_run(tmp_path / "run", BLOCKS, 20).path)
    with fails("has no reading 'update_norm_last' of image; it has: last, mean"):
        plain.heatmap("image", "update_norm_last")
    with fails("is over 2 blocks in a row"):
        run.heatmap("image", "pair2_last")
    with fails("no distances over several blocks; a probe run records them with layerprobe_block_pairs"):
        plain.pair_heatmaps()
    for reading, option in (("update_norm", "layerprobe_residual"), ("pairs", "layerprobe_block_pairs")):
        result = layerprobe("heatmap", plain.path, "--out", tmp_path / "out", "--reading", reading)
        assert_one_line(result, 1, option)
    assert not (tmp_path / "out").exists()


def test_the_command_draws_each_reading(layerprobe: Callable[..., Result], run: Run, tmp_path: Path) -> None:
    for reading in ("update_norm", "update_cosine", "pairs"):
        shown = layerprobe("heatmap", run.path, "--out", tmp_path, "--reading", reading, "--tokens", "mean")
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.splitlines() == [str(tmp_path / f"{reading}.png"), str(tmp_path / f"{reading}.npz")]
    with np.load(tmp_path / "pairs.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["image_pairs"], run.pair_heatmaps("mean")["image"].values_PL)
        assert arrays["text_blocks"].tolist() == list(BLOCKS["text"]) and arrays["reading"] == "mean"
    with np.load(tmp_path / "update_norm.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["image_mean"], run.heatmap("image", "update_norm_mean").values_TL)


# Ablation

NEEDED = (0.02, 0.01, 0.011, 0.06, 0.009, 0.0004)
ABLATIONS = ("ablation", "ablation_text", "ablation_change", "ablation_text_change")


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ablated") / "run"
    blocks = {"image": tuple(f"transformer_blocks.{i}" for i in range(6))}
    blocks["text"] = blocks["image"][:5]
    write_ablated_run(
        folder, blocks, 900, NEEDED, images=100, modules=sd3_modules(6), settings={"sigmas": "stratified"}
    )
    return load(folder)


def test_a_run_tells_which_blocks_the_loss_needs(ablated: Run) -> None:
    result = ablated.ablation()
    assert (result.needed, result.hardly) == ((3,), (5,)) and (result.samples, result.images) == (300, 100)
    assert result is ablated.ablation() and result.reading == "last" and ablated.ablation(reading="mean") is not result
    np.testing.assert_allclose(result.loss.value_L, ablated.levels(), rtol=1e-9)
    taken_N = np.isfinite(ablated.distances("block", "ablation")).all(axis=1)
    angle_NL = ablated.distances("image")[taken_N].astype(float)
    bin_N = np.floor(ablated.sigma[taken_N] * 10)
    expected = np.mean([angle_NL[bin_N == t].mean(axis=0) for t in range(10)], axis=0)
    np.testing.assert_allclose(result.angle["image"].value_L, expected, rtol=1e-6)
    assert result.text is not None and 0.25 < result.text.share.value < 0.35
    halves = ablated.parted_images()
    assert agreement(*(ablated.levels(images=half) for half in halves)).correlation > 0.5
    assert ablated.levels("ablation_text", images=halves[0]).shape == (5,)


def test_the_update_norm_is_a_baseline_where_it_was_recorded(tmp_path: Path) -> None:
    random, sigma_N = np.random.default_rng(3), np.random.default_rng(4).random(300)
    what = manifest(
        {"image": BLOCKS["image"]}, readings=("last", "mean", "update_norm_last", "update_norm_mean", "ablation")
    )
    level_L = random.random(6)
    names = {("image", "last"): level_L, ("image", "mean"): level_L, ("block", "ablation"): level_L}
    names |= {("image", "update_norm_last"): level_L, ("image", "update_norm_mean"): 1 - level_L}
    values = {key: (value_L + 1e-3 * random.random((300, 6))).astype(np.float32) for key, value_L in names.items()}
    values["block", "ablation"][::2] = np.nan
    values["image", "update_norm_mean"][::2] = 99  # of samples without ablation
    write_rows(tmp_path / "run", what, rows(sigma_N, values, {"image": np.arange(300) % 40 + 1}))
    run = load(tmp_path / "run")
    for reading, value in (("last", 1), ("mean", -1)):
        told = run.ablation(reading=reading).told["image"]
        assert told.baselines["update norm"].blocks.value == pytest.approx(value)
        assert told.angle.blocks.value == pytest.approx(1)
    assert "the relative update norm to -1.00" in run.findings("mean")[-1].text


def test_findings_of_an_ablated_run_show_both(ablated: Run) -> None:
    shown = ablated.findings()
    assert [part.kind for part in shown][-5:] == ["needed", "hardly", "told", "told", "told"]
    assert {part.kind for part in shown} > {"critical", "caption length"}
    kinds = ["needed", "hardly", "gradients", "two-ended", "told", "told", "told"]
    alone = ablated.findings("ablation")
    assert [part.kind for part in alone] == kinds and all(part.stream == "block" for part in alone[:4])
    assert ablated.findings("ablation", tokens="mean") != alone
    assert [part.kind for part in ablated.findings("ablation_text")] == kinds[:4]
    assert not {part.kind for part in load(ablated.path).findings("ablation_change")} & {"needed", "hardly", "told"}


def test_the_commands_tell_it_in_words(layerprobe: Callable[..., Result], ablated: Run) -> None:
    result = layerprobe("findings", ablated.path)
    assert (result.code, result.err) == (0, "")
    assert "\nBlocks the loss needs\n  block 3 is missed " in result.out
    assert "\nBlocks whose leaving out hardly hurts\n  block 5 is missed " in result.out
    assert (
        "needs, image stream\n  the image angle tells this order to " in result.out and "depth alone to " in result.out
    )
    assert "needs, text update alone\n  leaving out only the text update raises the loss by " in result.out
    assert "note: the relative update norm was not recorded (layerprobe_residual)" in result.out
    result = layerprobe("findings", ablated.path, "--reading", "ablation", "--tokens", "mean", "--json")
    assert result.code == 0 and '"kind": "told"' in result.out and "NaN" not in result.out
    assert layerprobe("findings", ablated.path, "--reading", "ablation_text").code == 0
    assert "\nablation    300 of 900 samples, 100 images\n" in layerprobe("status", ablated.path).out
    for command in (("report", ablated.path), ("export", ablated.path, ablated.path.parent / "run.csv")):
        assert layerprobe(*command).code == 0


def test_each_ablation_is_drawn(layerprobe: Callable[..., Result], ablated: Run, tmp_path: Path) -> None:
    for reading in ABLATIONS:
        shown = layerprobe("heatmap", ablated.path, "--out", tmp_path, "--reading", reading)
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.splitlines() == [str(tmp_path / f"{reading}.png"), str(tmp_path / f"{reading}.npz")]
    with np.load(tmp_path / "ablation.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["block_mean"], ablated.heatmap("block", "ablation").values_TL)
    with fails("has no reading 'ablation' of image"):
        ablated.heatmap("image", "ablation")


def test_ablations_compare_without_factors(ablated: Run) -> None:
    compared = compare(ablated, ablated, reading="ablation")
    assert compared.factors is None and not compared.streams["block"].levels.significant.any()


def test_a_run_without_ablation_says_so_and_nothing_else(
    layerprobe: Callable[..., Result], tmp_path: Path, run: Run
) -> None:
    assert not {part.kind for part in load(write_run(tmp_path / "run", BLOCKS, 20).path).findings()} & {
        "needed",
        "told",
    }
    for command in (("findings",), ("heatmap", "--out", tmp_path / "out")):
        result = layerprobe(command[0], run.path, *command[1:], "--reading", "ablation")
        assert_one_line(result, 1, "was recorded without ablation (layerprobe_ablation)")
    assert "ablation" not in layerprobe("status", run.path).out
    with fails("recorded without ablation"):
        run.ablation()


def test_what_is_too_little_is_said_in_every_place(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    """None of the samples has been ablated yet; then a few."""
    for name, ablated, said in (("none", slice(0, 0), "no sample"), ("few", slice(0, 40), "no sigma bin has 10")):
        path = write_ablated_run(tmp_path / name, {"image": BLOCKS["image"]}, 200, NEEDED, ablated=ablated).path
        shown = layerprobe("findings", path)
        assert shown.code == 0 and said in shown.out
        assert layerprobe("report", path).code == 0 and said in (path / "report.html").read_text().lower()
        assert "\nablation    " in layerprobe("status", path).out
