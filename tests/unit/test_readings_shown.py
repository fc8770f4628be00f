"""The further readings from a run folder to heatmaps, figures and the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from failing import fails
from synthetic_run import write_extra_run, write_run

from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import bin_index, heatmaps, pair_heatmaps
from simpletuner_layerprobe.analyse.summary import summary
from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.article import export_jsonl
from simpletuner_layerprobe.run.records import Run, open_run
from simpletuner_layerprobe.show import figures

BLOCKS = {"image": tuple(f"a.{i}" for i in range(6)), "text": ("a.0", "a.1", "a.2")}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return write_extra_run(tmp_path_factory.mktemp("extra") / "run", BLOCKS, 200, seam=2)


def column(run: Run, stream: str, reading: str) -> tuple[np.ndarray, np.ndarray]:
    parts = list(run.rows())
    sigma_N = np.concatenate([rows.sigma_N for rows in parts])
    return np.floor(sigma_N * 5), np.concatenate([rows.distances[stream, reading] for rows in parts]).astype(float)


def test_a_streams_pairs_are_as_long_as_it(run):
    keys = {key for rows in run.rows() for key in rows.distances}
    assert ("image", "pair4_last") in keys and ("text", "pair3_last") in keys and ("text", "pair4_last") not in keys
    shapes = {key: values.shape[1] for rows in run.rows() for key, values in rows.distances.items()}
    assert (shapes["image", "pair4_mean"], shapes["text", "pair3_mean"], shapes["text", "update_norm_last"]) == (
        3,
        1,
        3,
    )


@pytest.mark.parametrize("reading", ["update_norm_last", "update_cosine_mean"])
def test_heatmaps_of_updates_are_means_over_what_there_is(run, reading):
    found = heatmaps(run, tokens=reading, bins=5)
    assert list(found) == ["image", "text"]
    for stream, heatmap in found.items():
        bin_N, value_NL = column(run, stream, reading)
        expected = [np.nanmean(value_NL[bin_N == t], axis=0) for t in range(5)]
        np.testing.assert_allclose(heatmap.mean_TL, expected, rtol=1e-12)
        assert heatmap.count_T.tolist() == np.bincount(bin_N.astype(int), minlength=5).tolist()
        assert heatmap.nonfinite == 0 and heatmap.tokens == reading


def test_pairs_weigh_bins_equally_and_end_at_the_seam(run):
    found = pair_heatmaps(run, tokens="mean", bins=5)
    assert found["image"].mean_PL.shape == (4, 6) and found["text"].mean_PL.shape == (4, 3)
    assert found["image"].samples == 200
    for stream, heatmap in found.items():
        for span in range(1, 5):
            row_L = heatmap.mean_PL[span - 1]
            columns = len(BLOCKS[stream]) - span + 1
            assert np.isnan(row_L[max(columns, 0) :]).all()
            crossing = [first for first in range(columns) if first < 2 < first + span]
            assert np.flatnonzero(np.isnan(row_L[: max(columns, 0)])).tolist() == crossing
            for first in set(range(columns)) - set(crossing):
                bin_N, value_NC = column(run, stream, "mean" if span == 1 else f"pair{span}_mean")
                expected = np.mean([value_NC[bin_N == t, first].mean() for t in range(5)])
                assert row_L[first] == pytest.approx(expected, rel=1e-12)


def test_the_rest_of_the_package_reads_the_angles_alone(run, tmp_path):
    streams = heatmaps(run)
    assert streams["image"].nonfinite == 0
    assert len(article_contributions(streams).value_L) == 6
    assert summary(run).nonfinite == {}  # a pair that does not exist is no broken sample
    assert export_jsonl(run, tmp_path / "out.jsonl") == (200, 0)
    assert set(json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])) == {
        "timestep",
        "encoder_hidden_states",
        "hidden_states",
    }


def test_a_bin_without_samples(tmp_path):
    run = write_extra_run(tmp_path / "run", {"image": ("a", "b", "c")}, 2, pairs=0)
    bins = bin_index(np.concatenate([rows.sigma_N for rows in run.rows()]), 10)
    found = heatmaps(run, tokens="update_cosine_last")["image"]
    assert [t for t in range(10) if t not in bins] == list(found.empty_bins())
    assert (found.mean_TL[list(found.empty_bins())] == 0).all()


def test_what_a_run_was_not_recorded_with_is_said(tmp_path, run):
    plain = write_run(tmp_path / "run", BLOCKS, 20)
    with fails("has no reading 'update_norm_last'; it has: last, mean"):
        heatmaps(plain, tokens="update_norm_last")
    with fails("has no reading 'pair2_last'"):
        heatmaps(run, tokens="pair2_last")
    with fails("has no distances over several blocks (last tokens); a probe run records them with layerprobe_block"):
        pair_heatmaps(plain)


@pytest.mark.parametrize("file_format", ["png", "svg"])
def test_figures(run, file_format):
    norm = heatmaps(run, tokens="update_norm_mean")
    cosine = heatmaps(run, tokens="update_cosine_mean")
    pairs = pair_heatmaps(run)
    made = [figures.reading_figure(one, file_format=file_format) for one in (norm, cosine)]
    made.append(figures.pairs_figure(pairs, model="tiny", file_format=file_format))
    assert all(one.startswith(b"\x89PNG" if file_format == "png" else b"<?xml") for one in made)
    assert made[2] == figures.pairs_figure(pairs, model="tiny", file_format=file_format)


def test_rescaled_rows():
    scaled = figures._rescaled_rows(np.array([[1.0, 3.0, 2.0], [4.0, 4.0, np.nan], [np.nan] * 3]))
    np.testing.assert_array_equal(scaled, [[0, 1, 0.5], [0, 0, np.nan], [np.nan] * 3])


def test_the_command_draws_each_reading(run, tmp_path, capsys):
    for reading in ("update_norm", "update_cosine", "pairs"):
        assert main(["heatmap", str(run.path), "--out", str(tmp_path), "--reading", reading, "--tokens", "mean"]) == 0
        output = capsys.readouterr()
        assert output.out.splitlines() == [str(tmp_path / f"{reading}.png"), str(tmp_path / f"{reading}.npz")]
        assert output.err == ""
    arrays = np.load(io.BytesIO(Path(tmp_path / "pairs.npz").read_bytes()), allow_pickle=False)
    np.testing.assert_array_equal(arrays["image_pairs"], pair_heatmaps(run, tokens="mean")["image"].mean_PL)
    assert arrays["text_blocks"].tolist() == list(BLOCKS["text"]) and arrays["tokens"] == "mean"
    norm = np.load(tmp_path / "update_norm.npz", allow_pickle=False)
    assert norm["tokens"] == "update_norm_mean" and norm["image_mean"].shape == (10, 6)
    assert main(["status", str(run.path)]) == 0
    assert "readings    last, mean, update_norm_last, update_norm_mean, " in capsys.readouterr().out


def test_the_command_names_the_option_that_records_a_reading(tmp_path, capsys):
    plain = write_run(tmp_path / "run", BLOCKS, 20)
    for reading, option in (("update_norm", "layerprobe_residual"), ("pairs", "layerprobe_block_pairs")):
        assert main(["heatmap", str(plain.path), "--out", str(tmp_path / "out"), "--reading", reading]) == 1
        assert option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_only_with_the_same_readings(run):
    from dataclasses import replace

    from simpletuner_layerprobe.run.records import ShardWriter

    here = replace(open_run(run.path).manifest, extra=("update_norm_last",))
    with fails("extra (layerprobe_residual, layerprobe_block_pairs): ('update_norm_last',) here"):
        ShardWriter(run.path, here, rank=1)
