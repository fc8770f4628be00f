"""The API on runs: its arrays, its options, and what it refuses. docs/api.md is run in a test of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import TINY
from failing import fails
from synthetic_run import FLUX_DEV, manifest, rows, sd3_modules, write_ablated_run, write_rows, write_run

import simpletuner_layerprobe as layerprobe
from simpletuner_layerprobe import Run
from simpletuner_layerprobe.api.plans import Architecture
from simpletuner_layerprobe.run.manifest import Stream


@pytest.fixture
def run(tiny_run: Path) -> Run:
    return layerprobe.load(tiny_run)


def test_a_run_is_its_arrays(run: Run, tiny_run: Path) -> None:
    assert repr(run) == f"<Run {tiny_run}: sd3 medium, 400 samples of 40 images>"
    assert (run.path, run.model, run.reading, run.preset) == (tiny_run, "sd3 medium", "last", "article")
    assert run.readings == ("last", "mean") and run.streams == TINY and run.blocks == TINY["image"]
    assert len(run.files) == 3 and sum(file.samples for file in run.files) == run.samples
    assert run.facts["loss"].dtype == np.float32 and run.facts["image"].dtype == np.uint64
    assert run.distances("text", "mean").shape == (400, 5)
    table = run.to_pandas()
    np.testing.assert_array_equal(table["image.last.transformer_blocks.3"], run.distances("image")[:, 3])
    assert run.counts(4).sum() == 400 and len(run.counts(4)) == 4


def test_a_run_without_the_last_token_is_looked_at_by_its_mean(tmp_path: Path) -> None:
    run = layerprobe.load(write_run(tmp_path / "run", TINY, 50, readings=("mean",)).path)
    assert run.reading == "mean"
    np.testing.assert_array_equal(run.heatmap("image").values_TL, run.heatmap("image", "mean").values_TL)
    assert run.contributions().confidence.samples == 50


def test_heatmaps_are_means_with_the_errors_of_the_images(run: Run) -> None:
    heatmap = run.heatmap("text", bins=5)
    bin_N = np.minimum(np.floor(run.sigma * 5), 4)
    expected = [run.distances("text")[bin_N == t].astype(float).mean(axis=0) for t in range(5)]
    np.testing.assert_allclose(heatmap.values_TL, expected, rtol=1e-6)
    assert heatmap.counts_T.tolist() == run.counts(5).tolist()
    assert (heatmap.standard_errors_TL > 0).all() and heatmap.blocks == TINY["text"]
    assert run.samples_in() is run.samples_in("last")  # the same question twice costs one pass


def test_weights_of_the_recipe_can_be_others(run: Run) -> None:
    usual, other = run.contributions(), run.contributions(text_weight=1.0, image_weight=0.0)
    assert usual.values.tolist() != other.values.tolist()
    made = layerprobe.plan(run, preset="article", weighting={"text_weight": 1.0, "image_weight": 0.0})
    assert made.block_factors != layerprobe.plan(run, preset="article").block_factors


def test_contributions_need_no_modules_that_can_be_trained(tmp_path: Path) -> None:
    facts = {"modules": sd3_modules(6), "targets": (), "images": 40, "seed": 1}
    run = layerprobe.load(write_run(tmp_path / "run", TINY, 400, **facts).path)
    assert run.contributions().settled.shape == (6,)
    with fails("lies in none of the block lists"):
        layerprobe.plan(run, preset="article")


def test_what_there_is_not_is_said(run: Run, tmp_path: Path) -> None:
    with fails("no stream 'audio'"):
        run.heatmap("audio")
    with fails("params is 5 and preset 'article'; give one of them"):
        layerprobe.plan(run, params=5, preset="article")
    with pytest.raises(layerprobe.RunError):
        layerprobe.load(tmp_path / "none")
    with pytest.raises(layerprobe.ConfigError):
        layerprobe.check_config(tmp_path / "none", run)


def test_a_file_of_records_takes_the_blocks_of_its_model(run: Run, tmp_path: Path) -> None:
    from simpletuner_layerprobe.api.records import export

    file = tmp_path / "records.jsonl.bz2"
    assert export(run, file) == (400, 0)
    plain = layerprobe.load(file)
    assert (plain.model, plain.images, plain.manifest.modules) == ("", None, ())
    with fails("no module table"):
        layerprobe.plan(plain, params=60_000)
    streams = tuple(Stream(name, tuple(f"blocks.{i}" for i in range(len(paths)))) for name, paths in TINY.items())
    known = layerprobe.load(file, model=Architecture("sd3", "", "SD3Transformer2DModel", streams, (), sd3_modules(6)))
    assert known.model == "sd3" and known.blocks[0] == "blocks.0" == known.heatmap("image").blocks[0]
    np.testing.assert_array_equal(known.distances("image"), plain.distances("image"))
    with fails("does not know its blocks"):
        layerprobe.load(file, model=Architecture("", "", "UNet2DModel", (), (), ()))


def test_a_comparison_says_how_the_runs_differ(run: Run, tmp_path: Path) -> None:
    other = layerprobe.load(
        write_run(tmp_path / "other", TINY, 400, flavour="large", modules=sd3_modules(6), images=40, seed=3).path
    )
    comparison = layerprobe.compare(run, other)
    assert "flavour: 'medium' in A, 'large' in B" in comparison.notes
    assert len(comparison.factors.verdict_K) == 6  # type: ignore[union-attr]
    by_group = layerprobe.compare(run, other, preset=60_000)
    assert len(by_group.factors.verdict_K) == len(run.decided(preset=60_000)) == 18  # type: ignore[union-attr]
    with fails("A has 6, B has 57"):
        layerprobe.compare(run, layerprobe.load(write_run(tmp_path / "flux", FLUX_DEV, 30).path))


def test_a_stream_shorter_than_a_span_has_no_columns_of_it(tmp_path: Path) -> None:
    what = manifest({"image": ("a", "b", "c"), "text": ("a",)}, readings=("last", "pair2_last"))
    distances = {("image", "last"): np.full((9, 3), 0.1), ("text", "last"): np.full((9, 1), 0.1)}
    distances["image", "pair2_last"] = np.full((9, 2), 0.15)
    run = layerprobe.load(write_rows(tmp_path / "run", what, rows(np.linspace(0, 1, 9), distances)).path)
    assert run.samples_in("pair2_last").distances["text"].shape == (9, 0)
    assert run.pair_heatmaps()["image"].values_PL[1, :2] == pytest.approx([0.15, 0.15])


def test_an_ablation_is_looked_at_in_the_samples_that_have_it(tmp_path):
    run = Run(write_ablated_run(tmp_path / "run", {"text": ("b.0",), "image": ("b.0", "c.0")}, 300, (0.5, 0.1)))
    samples = run.samples_in("ablation")
    assert (samples.samples, samples.blocks) == (100, {"block": ("b.0", "c.0")})
    heatmap = run.heatmaps("ablation")["block"]
    assert heatmap.blocks == run.blocks and heatmap.counts_T.sum() == 100
    assert run.samples_in("mean").samples == 300
    assert list(run.heatmaps("ablation_text")) == ["text"]
