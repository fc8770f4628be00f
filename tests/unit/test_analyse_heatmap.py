from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st

from simpletuner_layerprobe.analyse.heatmap import (
    Heatmap,
    bin_edges,
    bin_index,
    columns,
    combined,
    common_blocks,
    heatmaps,
    pair_heatmaps,
)
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import all_blocks, parse_reading

IMAGE, TEXT = tuple(f"transformer_blocks.{i}" for i in range(38)), tuple(f"transformer_blocks.{i}" for i in range(37))
SD35_LARGE = {"image": IMAGE, "text": TEXT}
FLUX_DEV = tuple([f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)])


def samples(sigmas: Any, image: Any, text: Any = None, reading: str = "last") -> Samples:
    """One sample per sigma, images not known. image, text: (N, C)."""
    distances = {"image": np.asarray(image, dtype=np.float32)}
    if text is not None:
        distances["text"] = np.asarray(text, dtype=np.float32)
    span = parse_reading(reading).span
    blocks = {name: tuple(f"b.{i}" for i in range(part.shape[1] + span - 1)) for name, part in distances.items()}
    return Samples(np.asarray(sigmas, dtype=np.float64), np.zeros(len(sigmas), np.uint64), blocks, distances, reading)


def large(count: int) -> Samples:
    random = np.random.default_rng(count)
    return samples(random.random(count), 0.2 * random.random((count, 38)), 0.3 * random.random((count, 37)))


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


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_cells_are_the_means_of_their_samples(bins: int) -> None:
    given_samples = large(300)
    maps = heatmaps(given_samples, bins)
    assert list(maps) == ["image", "text"]
    for name, heatmap in maps.items():
        assert heatmap.values_TL.shape == (bins, len(SD35_LARGE[name])) and heatmap.values_TL.dtype == np.float64
        assert heatmap.bins == bins
        for t in range(bins):
            inside = [i for i, sigma in enumerate(given_samples.sigma_N) if min(int(sigma * bins), bins - 1) == t]
            assert heatmap.counts_T[t] == len(inside)
            for block in range(0, 37, 9):
                column = [float(given_samples.distances[name][i, block]) for i in inside]
                assert heatmap.values_TL[t, block] == pytest.approx(math.fsum(column) / len(column), rel=1e-13)


def test_a_bin_without_samples_is_zero_and_named() -> None:
    image = heatmaps(samples([0.05, 0.95, 1.0], [[0.1, 0.2], [0.3, 0.5], [0.5, 0.7]]))["image"]
    assert image.empty_bins() == tuple(range(1, 9))
    assert not image.values_TL[1:9].any() and np.isnan(image.standard_errors_TL[:9]).all()
    assert image.values_TL[9] == pytest.approx([0.4, 0.6]) and image.standard_errors_TL[9] == pytest.approx([0.1, 0.1])
    assert image.counts_T.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_left_out_of_its_stream_and_counted(bad: float) -> None:
    maps = heatmaps(samples([0.1, 0.1, 0.9], [[0.1, bad], [0.2, 0.4], [0.6, 0.8]], [[0.5], [0.7], [0.9]]), 2)
    assert maps["image"].nonfinite == 1
    assert maps["image"].counts_T.tolist() == [1, 1]
    np.testing.assert_allclose(maps["image"].values_TL, [[0.2, 0.4], [0.6, 0.8]], rtol=1e-6)
    assert maps["text"].nonfinite == 0
    np.testing.assert_allclose(maps["text"].values_TL, [[0.6], [0.9]], rtol=1e-6)


def test_of_a_reading_that_may_lack_numbers_only_those_are_left_out() -> None:
    """The cosine of an update of zero is NaN: that block's cell has a sample less, the others have not."""
    nan = math.nan
    image = heatmaps(samples([0.1, 0.2, 0.9], [[0.1, nan], [0.3, 0.5], [0.7, nan]], reading="update_cosine_last"), 3)
    np.testing.assert_allclose(image["image"].values_TL, [[0.2, 0.5], [0, 0], [0.7, nan]], rtol=1e-6)
    assert image["image"].counts_T.tolist() == [2, 0, 1] and image["image"].nonfinite == 0


def test_without_samples_there_is_no_heatmap() -> None:
    with fails("there are no samples yet"):
        heatmaps(samples([], np.zeros((0, 2))))


# Several blocks in a row


def test_pairs_are_means_over_the_bins_that_have_any() -> None:
    sigmas, nan = [0.1, 0.3, 0.9], math.nan
    single = samples(sigmas, [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.5, 0.5, 0.5]])
    double = samples(sigmas, [[0.2, nan], [0.4, nan], [0.5, nan]], reading="pair2_last")
    made = pair_heatmaps([single, double], 2)["image"]
    np.testing.assert_allclose(made.values_PL, [[0.35, 0.35, 0.35], [0.4, nan, nan]], rtol=1e-6)
    assert (made.reading, made.samples, made.blocks) == ("last", 3, ("b.0", "b.1", "b.2"))


def test_pairs_that_were_not_recorded_are_refused_and_have_no_heatmap_of_single_blocks() -> None:
    with fails("has no distances over several blocks; a probe run records them with layerprobe_block_pairs"):
        pair_heatmaps([samples([0.5], [[0.1, 0.2]])])
    with fails("pair2_last is over 2 blocks in a row"):
        heatmaps(samples([0.5], [[0.1]], reading="pair2_last"))


# Streams together


def test_all_blocks_keeps_the_models_order() -> None:
    assert all_blocks([("a", "b", "c"), ("a", "b")]) == ("a", "b", "c")
    assert all_blocks([("a", "b"), ("a", "b", "c")]) == ("a", "b", "c")
    split = [("i.0", "j.0", "j.1"), ("t.0", "t.1", "j.0", "j.1")]
    assert all_blocks(split) == ("t.0", "t.1", "i.0", "j.0", "j.1")
    assert all_blocks([FLUX_DEV, FLUX_DEV]) == FLUX_DEV


def test_common_blocks_are_those_of_every_stream() -> None:
    assert common_blocks([IMAGE, TEXT]) == TEXT
    with pytest.raises(ProbeError, match="share no block"):
        common_blocks([("a",), ("b",)])


def test_the_combination_is_the_articles_mean() -> None:
    maps = heatmaps(large(200))
    combination = combined(maps)
    assert np.array_equal(combination.values_TL, np.add(maps["text"].values_TL, maps["image"].values_TL[:, :-1]) / 2.0)
    assert combination.blocks == maps["text"].blocks
    largest_TL = np.maximum(maps["text"].standard_errors_TL, maps["image"].standard_errors_TL[:, :-1])
    assert (combination.standard_errors_TL <= largest_TL).all()


def test_a_cell_of_the_combination_is_empty_where_a_stream_has_no_sample() -> None:
    image = Heatmap("image", "last", ("a",), np.ones((2, 1)), np.array([3, 2]), np.ones((2, 1)), 0)
    text = Heatmap("text", "last", ("a",), np.array([[1.0], [0.0]]), np.array([3, 0]), np.ones((2, 1)), 2)
    assert combined({"image": image, "text": text}).empty_bins() == (1,)
    assert combined({"image": image, "text": text}).nonfinite == 2


def test_columns_follow_the_names_not_the_positions() -> None:
    assert columns(np.array([[1.0, 2.0, 3.0]]), ("a", "b", "c"), ("c", "a")).tolist() == [[3.0, 1.0]]
