from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from failing import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.analyse.contribution import (
    article_contributions,
    article_values,
    critical_blocks,
    stream_contributions,
    stream_values,
)
from simpletuner_layerprobe.analyse.heatmap import Heatmap, heatmaps
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.errors import ProbeError

SD35_LARGE = {"image": 38, "text": 37}


def made(samples: int, *, seed: int = 0, sigmas: Any = None, peaks: Any = (), blocks: Any = SD35_LARGE) -> Samples:
    """A wavy level per block, sigma and noise on top, and `peaks` ((stream, block number) pairs) far above the rest."""
    random = np.random.default_rng(seed)
    sigma_N = random.random(samples) if sigmas is None else np.asarray(sigmas)
    distances = {}
    for name, L in blocks.items():
        level_L = 0.05 + 0.03 * np.sin(np.arange(L) / 2.3 + (name == "text"))
        level_L[[number for stream, number in peaks if stream == name]] += 0.4
        distances[name] = (level_L * (0.7 + 0.6 * sigma_N[:, None] * random.random((samples, L)))).astype(np.float32)
    paths = {name: tuple(f"transformer_blocks.{i}" for i in range(L)) for name, L in blocks.items()}
    return Samples(sigma_N, np.zeros(samples, np.uint64), paths, distances)


def records(samples: Samples) -> list[dict[str, Any]]:
    """The samples as the article's list of records."""
    return [
        {"timestep": float(sigma), "hidden_states": image.tolist(), "encoder_hidden_states": text.tolist()}
        for sigma, image, text in zip(
            samples.sigma_N, samples.distances["image"], samples.distances["text"], strict=True
        )
    ]


def notebook(given_records: list[dict[str, Any]], bins: int = 10, percentile: float = 90) -> list[float]:
    """The article's notebook, in float64 and plain Python: records -> 37 normalised contributions."""

    def grid(key: str) -> list[list[float]]:
        table = []
        for t in range(bins):
            low, high = t / bins, (t + 1) / bins
            inside = [
                r[key] for r in given_records if low <= r["timestep"] < high or (t == bins - 1 and r["timestep"] == 1.0)
            ]
            length = len(given_records[0][key])
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


@pytest.mark.parametrize("seed", range(3))
def test_the_contributions_are_those_of_the_articles_notebook(seed: int) -> None:
    samples = made(400, seed=seed, peaks=[("image", 0), ("text", 0), ("text", 31), ("image", 35)])
    contribution = article_contributions(heatmaps(samples))
    np.testing.assert_allclose(contribution.value_L[:37], notebook(records(samples)), atol=1e-12)
    assert contribution.value_L[37] == contribution.value_L[36]
    assert contribution.blocks == samples.blocks["image"]


def test_empty_bins_count_as_zeros_as_in_the_notebook() -> None:
    samples = made(60, sigmas=np.random.default_rng(3).uniform(0.2, 0.7, 60))
    contribution = article_contributions(heatmaps(samples), clip_percentile=60)
    np.testing.assert_allclose(contribution.value_L[:37], notebook(records(samples), percentile=60), atol=1e-12)


def test_it_is_the_articles_code_to_the_last_bit() -> None:
    streams = heatmaps(made(200))
    encoder_heatmap, hidden_heatmap = streams["text"].values_TL, streams["image"].values_TL
    encoder = np.clip(encoder_heatmap, None, np.percentile(encoder_heatmap, 90)) * (1 / 3)
    hidden = np.clip(hidden_heatmap, None, np.percentile(hidden_heatmap, 90)) * (2 / 3)
    averages = np.mean(np.add(encoder, hidden[:, :-1]) / 2.0, axis=0)
    normalised = (averages - averages.min()) / (averages.max() - averages.min())
    assert np.array_equal(article_contributions(streams).value_L[:37], normalised)


def test_many_sets_of_heatmaps_are_each_taken_like_one() -> None:
    sets = [heatmaps(made(200, seed=seed)) for seed in range(3)]
    mean_RTL = {name: np.stack([part[name].values_TL for part in sets]) for name in SD35_LARGE}
    blocks = {name: part.blocks for name, part in sets[0].items()}
    value_RL = article_values(mean_RTL, blocks, clip_percentile=80, text_weight=0.5)
    apart = stream_values(mean_RTL, blocks, 80)
    for r, part in enumerate(sets):
        expected = article_contributions(part, clip_percentile=80, text_weight=0.5)
        assert np.array_equal(value_RL[r], expected.value_L)
        for name, value_L in stream_contributions(part, clip_percentile=80).items():
            assert np.array_equal(apart[name][r], value_L)


def by_ablation(mean_TL: Any, percentile: float = 90) -> Any:
    """The contributions of loss increases, in plain numpy: negative ones count as 0, then the article's recipe."""
    counted_TL = np.where(np.asarray(mean_TL) > 0, mean_TL, 0.0)
    clipped_TL = np.minimum(counted_TL, np.percentile(counted_TL, percentile))
    average_L = clipped_TL.sum(axis=0) / len(clipped_TL)
    return (average_L - average_L.min()) / (average_L.max() - average_L.min())


@pytest.mark.parametrize("percentile", [90, 50, 100])
def test_a_negative_mean_counts_as_zero_before_the_percentile_and_the_average(percentile: float) -> None:
    random = np.random.default_rng(4)
    mean_RTL = random.normal(0.02, 0.1, (3, 10, 6)) + np.array([0.3, 0, -0.1, 0.2, 0, 0.05])
    assert (mean_RTL < 0).sum() > 30
    many_RL = article_values({"block": mean_RTL}, {"block": tuple("abcdef")}, clip_percentile=percentile)
    for value_L, mean_TL in zip(many_RL, mean_RTL, strict=True):
        made = article_contributions({"block": heatmap("block", "abcdef", mean_TL)}, clip_percentile=percentile)
        np.testing.assert_allclose(made.value_L, by_ablation(mean_TL, percentile), atol=1e-12)
        assert np.array_equal(made.value_L, value_L)
    with pytest.raises(ProbeError, match="all 2 blocks have the same contribution"):
        article_contributions({"block": heatmap("block", "ab", [[-0.1, -0.2], [-0.3, 0.0]])})


def test_the_least_are_those_of_the_lowest_contribution_and_then_number() -> None:
    made = article_contributions({"block": heatmap("block", "abcdef", [-0.1, 0.3, 0.1, -0.2, 0.2, 0.1])})
    assert [made.least(count) for count in range(1, 7)] == [
        (0,),
        (0, 3),
        (0, 2, 3),
        (0, 2, 3, 5),
        (0, 2, 3, 4, 5),
        (0, 1, 2, 3, 4, 5),
    ]
    for count in (0, 7):
        with pytest.raises(ProbeError, match=f"the {count} blocks that contribute least .*; there are 6 blocks"):
            made.least(count)


def heatmap(stream: str, blocks: str, values: Any, counts: Any = None) -> Heatmap:
    mean_TL = np.atleast_2d(np.asarray(values, dtype=np.float64))
    T = len(mean_TL)
    return Heatmap(
        stream=stream,
        reading="last",
        blocks=tuple(blocks),
        values_TL=mean_TL,
        counts_T=np.asarray(counts if counts is not None else [1] * T, dtype=np.int64),
        standard_errors_TL=np.zeros_like(mean_TL),
        nonfinite=0,
    )


def test_one_stream_decides_alone_and_its_weight_plays_no_part() -> None:
    streams = {"image": heatmap("image", "abc", [0.1, 0.3, 0.2])}
    for weight in (0.0, 2 / 3, 5.0):
        contribution = article_contributions(streams, clip_percentile=100, image_weight=weight)
        assert contribution.value_L.tolist() == pytest.approx([0, 1, 0.5])
        assert contribution.covered_L.all()


def test_a_block_that_a_stream_lacks_takes_the_nearest_before_it_else_the_first() -> None:
    image = heatmap("image", "abcde", [0.9, 0.1, 0.3, 0.9, 0.2])
    text = heatmap("text", "bce", [0.1, 0.3, 0.2])
    contribution = article_contributions({"image": image, "text": text}, clip_percentile=100)
    assert contribution.blocks == tuple("abcde")
    assert contribution.covered_L.tolist() == [False, True, True, False, True]
    assert contribution.value_L.tolist() == pytest.approx([0, 0, 1, 1, 0.5])


def test_weights_belong_to_their_streams() -> None:
    streams = {"image": heatmap("image", "ab", [0.1, 0.2]), "text": heatmap("text", "ab", [0.2, 0.1])}
    by_image = article_contributions(streams, text_weight=0.0, image_weight=1.0, clip_percentile=100)
    by_text = article_contributions(streams, text_weight=1.0, image_weight=0.0, clip_percentile=100)
    assert by_image.value_L.tolist() == [0, 1]
    assert by_text.value_L.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("percentile", "meant"), [(0, ""), (-1, ""), (100.5, ""), (float("nan"), ""), (0.9, ": did you mean 90?")]
)
def test_a_percentile_outside_its_range_is_refused(percentile: float, meant: str) -> None:
    with fails(f"the clip percentile is {percentile}; expected above 1 and at most 100{meant}"):
        article_contributions({"image": heatmap("image", "ab", [0.1, 0.2])}, clip_percentile=percentile)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1)])
def test_weights_that_leave_nothing_are_refused(weights: tuple[float, float]) -> None:
    text_weight, image_weight = weights
    with fails(f"text_weight is {text_weight} and image_weight {image_weight}; expected numbers of 0 or more"):
        article_contributions(
            {"image": heatmap("image", "ab", [0.1, 0.2])}, text_weight=text_weight, image_weight=image_weight
        )


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
    contribution = article_contributions(streams)
    alone = article_contributions({"image": streams["image"]})
    assert contribution.dropped == ("audio",) and alone.dropped == ()
    assert contribution.value_L.tolist() == alone.value_L.tolist() and contribution.critical == alone.critical
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
        contribution = article_contributions({"image": image, "text": text}, clip_percentile=percentile)
    except ProbeError:
        return
    assert contribution.value_L.min() == 0 and contribution.value_L.max() == 1
    scaled = article_contributions(
        {"image": image, "text": text},
        clip_percentile=percentile,
        text_weight=scale / 3,
        image_weight=scale * 2 / 3,
    )
    np.testing.assert_allclose(scaled.value_L, contribution.value_L, atol=1e-6)


def test_critical_blocks_are_beyond_tukeys_far_out_fence() -> None:
    level = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18]
    # Q1 0.12, Q3 0.16: the fence is 0.16 + 3 * 0.04 = 0.28
    just_inside, beyond = [*level[:-1], 0.279], [*level[:-1], 0.281]
    assert critical_blocks({"image": heatmap("image", "abcdefghi", just_inside)}) == {"image": ()}
    assert critical_blocks({"image": heatmap("image", "abcdefghi", beyond)}) == {"image": (8,)}


def test_empty_bins_play_no_part_in_finding_critical_blocks() -> None:
    level = [0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.9]
    made_of = critical_blocks({"image": heatmap("image", "abcdefghi", [level, [0.0] * 9], counts=[4, 0])})
    assert made_of == {"image": (8,)}


def test_a_negative_mean_counts_as_zero_for_critical_blocks() -> None:
    # Without the zeros Q1 is lower and the fence higher: 0.25 + 3 * 0.45.
    level = [-0.2, -0.2, -0.2, 0.0, 0.05, 0.1, 0.25, 0.25, 1.1]
    assert critical_blocks({"block": heatmap("block", "abcdefghi", level)}) == {"block": (8,)}


def test_critical_numbers_count_all_blocks_and_the_union_is_sorted() -> None:
    peaks = [("image", 35), ("text", 31), ("text", 0), ("image", 0)]
    contribution = article_contributions(heatmaps(made(300, peaks=peaks)))
    assert contribution.critical == {"image": (0, 35), "text": (0, 31)}
    assert contribution.critical_union() == (0, 31, 35)
