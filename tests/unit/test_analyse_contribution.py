from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import FLUX_DEV, SD35_LARGE, records, write_run

from simpletuner_layerprobe.analyse.contribution import article_contributions, critical_blocks, stream_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap, heatmaps
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.factors import article_factors

CRITICAL = (0, 31, 35)


def notebook(found: list[dict[str, Any]], bins: int = 10, percentile: float = 90) -> list[float]:
    """The article's notebook, in float64 and plain Python: records -> 37 normalised contributions."""

    def grid(key: str) -> list[list[float]]:
        table = []
        for t in range(bins):
            low, high = t / bins, (t + 1) / bins
            inside = [r[key] for r in found if low <= r["timestep"] < high or (t == bins - 1 and r["timestep"] == 1.0)]
            length = len(found[0][key])
            table.append([sum(v[i] for v in inside) / len(inside) if inside else 0.0 for i in range(length)])
        return table

    def clipped(table: list[list[float]]) -> list[list[float]]:
        ranked = sorted(value for row in table for value in row)
        place = (len(ranked) - 1) * percentile / 100
        below = int(place)
        above = min(below + 1, len(ranked) - 1)
        limit = ranked[below] + (ranked[above] - ranked[below]) * (place - below)
        return [[min(value, limit) for value in row] for row in table]

    text, image = clipped(grid("encoder_hidden_states")), clipped(grid("hidden_states"))
    averages = [
        sum(((1 / 3) * text[t][i] + (2 / 3) * image[t][i]) / 2 for t in range(bins)) / bins for i in range(len(text[0]))
    ]
    spread = max(averages) - min(averages)
    return [(value - min(averages)) / spread for value in averages]


def notebook_factors(contributions: list[float], largest: int = 12) -> list[int]:
    """37 contributions -> 38 factors: the last block repeats, then the critical ones are set."""
    factors = [
        min(max(round((1 - value) * (largest - 1) + 1), 1), largest) for value in [*contributions, contributions[-1]]
    ]
    for number in CRITICAL:
        factors[number] = 1
    return factors


@pytest.mark.parametrize("seed", range(5))
def test_the_factors_are_those_of_the_articles_notebook(tmp_path: Path, seed: int) -> None:
    run = write_run(
        tmp_path / "run",
        SD35_LARGE,
        400,
        seed=seed,
        peaks=[("image", 0), ("text", 0), ("text", 31), ("image", 35)],
    )
    expected = notebook(records(run, "last"))
    found = article_contributions(heatmaps(run))
    np.testing.assert_allclose(found.value_L[:37], expected, atol=1e-12)
    assert found.value_L[37] == found.value_L[36]
    factors = article_factors(found.value_L, max_factor=12, critical=CRITICAL)
    assert factors.tolist() == notebook_factors(expected)
    assert len(set(factors.tolist())) > 5


def test_empty_bins_count_as_zeros_as_in_the_notebook(tmp_path: Path) -> None:
    sigmas = np.random.default_rng(3).uniform(0.2, 0.7, 60)
    run = write_run(tmp_path / "run", SD35_LARGE, 60, sigmas=sigmas.tolist())
    found = article_contributions(heatmaps(run), clip_percentile=60)
    expected = notebook(records(run, "last"), percentile=60)
    np.testing.assert_allclose(found.value_L[:37], expected, atol=1e-12)


def test_it_is_the_articles_code_to_the_last_bit(tmp_path: Path) -> None:
    streams = heatmaps(write_run(tmp_path / "run", SD35_LARGE, 200))
    encoder_heatmap, hidden_heatmap = streams["text"].mean_TL, streams["image"].mean_TL
    encoder = np.clip(encoder_heatmap, None, np.percentile(encoder_heatmap, 90)) * (1 / 3)
    hidden = np.clip(hidden_heatmap, None, np.percentile(hidden_heatmap, 90)) * (2 / 3)
    averages = np.mean(np.add(encoder, hidden[:, :-1]) / 2.0, axis=0)
    normalised = (averages - averages.min()) / (averages.max() - averages.min())
    assert np.array_equal(article_contributions(streams).value_L[:37], normalised)


def heatmap(stream: str, blocks: str, values: Any, counts: Any = None) -> Heatmap:
    mean_TL = np.atleast_2d(np.asarray(values, dtype=np.float64))
    T = len(mean_TL)
    return Heatmap(
        stream=stream,
        tokens="last",
        blocks=tuple(blocks),
        mean_TL=mean_TL,
        count_T=np.asarray(counts if counts is not None else [1] * T, dtype=np.int64),
        nonfinite=0,
        bins=T,
    )


def test_one_stream_decides_alone_and_its_weight_plays_no_part() -> None:
    streams = {"image": heatmap("image", "abc", [0.1, 0.3, 0.2])}
    for weight in (0.0, 2 / 3, 5.0):
        found = article_contributions(streams, clip_percentile=100, image_weight=weight)
        assert found.value_L.tolist() == pytest.approx([0, 1, 0.5])
        assert found.covered_L.all()


def test_a_block_that_a_stream_lacks_takes_the_nearest_before_it_else_the_first() -> None:
    image = heatmap("image", "abcde", [0.9, 0.1, 0.3, 0.9, 0.2])
    text = heatmap("text", "bce", [0.1, 0.3, 0.2])
    found = article_contributions({"image": image, "text": text}, clip_percentile=100)
    assert found.blocks == tuple("abcde")
    assert found.covered_L.tolist() == [False, True, True, False, True]
    assert found.value_L.tolist() == pytest.approx([0, 0, 1, 1, 0.5])


def test_weights_belong_to_their_streams() -> None:
    streams = {"image": heatmap("image", "ab", [0.1, 0.2]), "text": heatmap("text", "ab", [0.2, 0.1])}
    by_image = article_contributions(streams, text_weight=0.0, image_weight=1.0, clip_percentile=100)
    by_text = article_contributions(streams, text_weight=1.0, image_weight=0.0, clip_percentile=100)
    assert by_image.value_L.tolist() == [0, 1]
    assert by_text.value_L.tolist() == [1, 0]


@pytest.mark.parametrize("percentile", [0, -1, 100.5, float("nan")])
def test_a_percentile_outside_its_range_is_refused(percentile: float) -> None:
    with pytest.raises(ProbeError, match=r"clip percentile is .*, expected above 0 and at most 100"):
        article_contributions({"image": heatmap("image", "ab", [0.1, 0.2])}, clip_percentile=percentile)


def test_equal_contributions_are_refused() -> None:
    with pytest.raises(ProbeError, match="all 3 blocks have the same contribution"):
        article_contributions({"image": heatmap("image", "abc", [0.2, 0.2, 0.2])})


def test_a_stream_without_finite_samples_is_refused() -> None:
    streams = {"image": heatmap("image", "ab", [0.0, 0.0], counts=[0])}
    with pytest.raises(ProbeError, match=r"no stream \(image\) has a sample with finite distances"):
        article_contributions(streams)


def test_a_stream_without_finite_samples_is_left_out_beside_others() -> None:
    streams = {
        "image": heatmap("image", "abc", [0.1, 0.4, 0.2]),
        "audio": heatmap("audio", "abc", [0.0, 0.0, 0.0], counts=[0]),
    }
    found = article_contributions(streams)
    alone = article_contributions({"image": streams["image"]})
    assert found.dropped == ("audio",) and alone.dropped == ()
    assert found.value_L.tolist() == alone.value_L.tolist() and found.critical == alone.critical
    assert list(stream_contributions(streams)) == ["image"]


def test_streams_without_a_common_block_are_refused() -> None:
    streams = {"image": heatmap("image", "ab", [0.1, 0.2]), "text": heatmap("text", "cd", [0.1, 0.2])}
    with pytest.raises(ProbeError, match="share no block"):
        article_contributions(streams)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(0.001, 0.5), min_size=6, max_size=6), min_size=3, max_size=3),
    st.floats(0.5, 100),
    st.floats(0.25, 8),
)
def test_contributions_span_zero_to_one_and_ignore_the_scale(
    values: list[list[float]], percentile: float, scale: float
) -> None:
    image = heatmap("image", "abcdef", values)
    text = heatmap("text", "abcde", np.asarray(values)[:, :5][::-1])
    try:
        found = article_contributions({"image": image, "text": text}, clip_percentile=percentile)
    except ProbeError:
        return
    assert found.value_L.min() == 0 and found.value_L.max() == 1
    scaled = article_contributions(
        {"image": image, "text": text},
        clip_percentile=percentile,
        text_weight=scale / 3,
        image_weight=scale * 2 / 3,
    )
    np.testing.assert_allclose(scaled.value_L, found.value_L, atol=1e-6)


def test_critical_blocks_are_beyond_tukeys_far_out_fence() -> None:
    level = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18]
    # Q1 0.12, Q3 0.16: the fence is 0.16 + 3 * 0.04 = 0.28
    just_inside, beyond = [*level[:-1], 0.279], [*level[:-1], 0.281]
    assert critical_blocks({"image": heatmap("image", "abcdefghi", just_inside)}) == {"image": ()}
    assert critical_blocks({"image": heatmap("image", "abcdefghi", beyond)}) == {"image": (8,)}


def test_empty_bins_play_no_part_in_finding_critical_blocks() -> None:
    level = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.9]
    found = critical_blocks({"image": heatmap("image", "abcdefghi", [level, [0.0] * 9], counts=[4, 0])})
    assert found == {"image": (8,)}


def test_critical_numbers_count_all_blocks_and_the_union_is_sorted(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        SD35_LARGE,
        300,
        peaks=[("image", 35), ("text", 31), ("text", 0), ("image", 0)],
    )
    found = article_contributions(heatmaps(run))
    assert found.critical == {"image": (0, 35), "text": (0, 31)}
    assert found.critical_union() == (0, 31, 35)


def test_flux_blocks_are_one_list(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", FLUX_DEV, 100, peaks=[("image", 56), ("text", 19)])
    found = article_contributions(heatmaps(run))
    assert found.blocks == FLUX_DEV["image"]
    assert found.covered_L.all()
    assert found.critical == {"image": (56,), "text": (19,)}
