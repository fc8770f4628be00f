"""The further readings from a run folder to heatmaps, figures and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Result, assert_one_line
from failing import fails
from synthetic_run import write_extra_run, write_run

from simpletuner_layerprobe import Run, load

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
