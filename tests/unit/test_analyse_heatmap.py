from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import FLUX_DEV, SD35_LARGE, manifest, records, rows, write_run

from simpletuner_layerprobe.analyse.heatmap import (
    Heatmap,
    all_blocks,
    bin_edges,
    bin_index,
    columns,
    combined,
    common_blocks,
    heatmaps,
)
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.records import Run, ShardWriter, create_run, open_run

SMALL = {"image": ("blocks.0", "blocks.1"), "text": ("blocks.0",)}


def small_run(folder: Path, sigmas: list[float], image: list[list[float]], text: list[list[float]]) -> Run:
    what = manifest(SMALL, tokens=("last",))
    create_run(folder, what)
    ShardWriter(folder, what, rank=0).write(
        rows(
            sigmas,
            {
                ("image", "last"): np.array(image, dtype=np.float32),
                ("text", "last"): np.array(text, dtype=np.float32),
            },
        )
    )
    return open_run(folder)


def test_a_sigma_of_one_belongs_to_the_last_bin_and_an_edge_to_the_bin_above() -> None:
    assert bin_index(np.array([0.0, 0.0999, 0.1, 0.5, 0.999, 1.0]), 10).tolist() == [0, 0, 1, 5, 9, 9]


@given(st.lists(st.floats(0, 1), max_size=50), st.integers(1, 100))
def test_every_sigma_lies_between_the_edges_of_its_bin(sigmas: list[float], bins: int) -> None:
    index_N = bin_index(np.array(sigmas), bins)
    assert index_N.dtype == np.int64
    for sigma, index in zip(sigmas, index_N, strict=True):
        assert 0 <= index < bins
        assert index / bins <= sigma + 1e-15
        assert sigma <= (index + 1) / bins + 1e-15


def test_no_bins_are_refused() -> None:
    with pytest.raises(ProbeError, match="number of sigma bins is 0, at least 1"):
        bin_index(np.array([0.5]), 0)


def test_edges_are_equal_over_zero_to_one() -> None:
    assert bin_edges(4).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("tokens", ["last", "mean"])
@pytest.mark.parametrize("bins", [1, 7, 10])
def test_cells_are_the_means_of_their_samples(tmp_path: Path, tokens: str, bins: int) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 300, shards=4)
    found = heatmaps(run, tokens=tokens, bins=bins)
    assert list(found) == ["image", "text"]
    for name, key in (("image", "hidden_states"), ("text", "encoder_hidden_states")):
        cells: dict[int, list[list[float]]] = {}
        for record in records(run, tokens):
            cells.setdefault(min(int(record["timestep"] * bins), bins - 1), []).append(record[key])
        heatmap = found[name]
        assert heatmap.mean_TL.shape == (bins, len(SD35_LARGE[name]))
        assert heatmap.mean_TL.dtype == np.float64
        for t in range(bins):
            assert heatmap.count_T[t] == len(cells.get(t, []))
            for i in range(len(SD35_LARGE[name])):
                column = [values[i] for values in cells[t]]
                assert heatmap.mean_TL[t, i] == pytest.approx(math.fsum(column) / len(column), rel=1e-13)


def test_a_bin_without_samples_is_zero_and_named(tmp_path: Path) -> None:
    run = small_run(tmp_path, [0.05, 0.95, 1.0], [[0.1, 0.2], [0.3, 0.5], [0.5, 0.7]], [[0.2], [0.4], [0.6]])
    image = heatmaps(run, bins=10)["image"]
    assert image.empty_bins() == tuple(range(1, 9))
    assert not image.mean_TL[1:9].any()
    assert image.mean_TL[9] == pytest.approx([0.4, 0.6])
    assert image.count_T.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_left_out_of_its_stream_and_counted(tmp_path: Path, bad: float) -> None:
    run = small_run(tmp_path, [0.1, 0.1, 0.9], [[0.1, bad], [0.2, 0.4], [0.6, 0.8]], [[0.5], [0.7], [0.9]])
    found = heatmaps(run, bins=2)
    assert found["image"].nonfinite == 1
    assert found["image"].count_T.tolist() == [1, 1]
    np.testing.assert_allclose(found["image"].mean_TL, [[0.2, 0.4], [0.6, 0.8]], rtol=1e-6)
    assert found["text"].nonfinite == 0
    np.testing.assert_allclose(found["text"].mean_TL, [[0.6], [0.9]], rtol=1e-6)


def test_the_image_stream_comes_first_whatever_the_manifest_says(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"text": SD35_LARGE["text"], "image": SD35_LARGE["image"]}, 20)
    assert list(heatmaps(run)) == ["image", "text"]


def test_a_reading_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SMALL, 5, tokens=("last",))
    with pytest.raises(ProbeError, match="no reading 'mean'; it has: last"):
        heatmaps(run, tokens="mean")


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="has no samples"):
        heatmaps(create_run(tmp_path, manifest(SMALL)))


def test_memory_is_bounded_by_a_shard_not_by_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 20_000, shards=20, tokens=("last",))
    tracemalloc.start()
    heatmaps(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < run.size_bytes() / 2


def test_all_blocks_keeps_the_models_order() -> None:
    assert all_blocks([("a", "b", "c"), ("a", "b")]) == ("a", "b", "c")
    assert all_blocks([("a", "b"), ("a", "b", "c")]) == ("a", "b", "c")
    assert all_blocks([("i.0", "j.0", "j.1"), ("t.0", "t.1", "j.0", "j.1")]) == (
        "t.0",
        "t.1",
        "i.0",
        "j.0",
        "j.1",
    )
    assert all_blocks([FLUX_DEV["image"], FLUX_DEV["text"]]) == FLUX_DEV["image"]


def test_common_blocks_are_those_of_every_stream() -> None:
    assert common_blocks([SD35_LARGE["image"], SD35_LARGE["text"]]) == SD35_LARGE["text"]
    with pytest.raises(ProbeError, match="share no block"):
        common_blocks([("a",), ("b",)])


def test_the_combination_is_the_articles_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 200)
    found = heatmaps(run)
    combination = combined(found)
    expected_TL = np.add(found["text"].mean_TL, found["image"].mean_TL[:, :-1]) / 2.0
    assert np.array_equal(combination.mean_TL, expected_TL)
    assert combination.blocks == SD35_LARGE["text"]


def test_a_cell_of_the_combination_is_empty_where_a_stream_has_no_sample() -> None:
    image = Heatmap("image", "last", ("a",), np.ones((2, 1)), np.array([3, 2]), 0, 2)
    text = Heatmap("text", "last", ("a",), np.array([[1.0], [0.0]]), np.array([3, 0]), 2, 2)
    assert combined({"image": image, "text": text}).empty_bins() == (1,)
    assert combined({"image": image, "text": text}).nonfinite == 2


def test_columns_follow_the_names_not_the_positions() -> None:
    heatmap = Heatmap("image", "last", ("a", "b", "c"), np.array([[1.0, 2.0, 3.0]]), np.array([1]), 0, 1)
    assert columns(heatmap, ("c", "a")).tolist() == [[3.0, 1.0]]
