from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest

from simpletuner_layerprobe.analyse.heatmap import Heatmap, PairHeatmap, combined
from simpletuner_layerprobe.show import figures, files
from simpletuner_layerprobe.show.figures import factor_figure

YELLOW, DARK = (253, 231, 37), (68, 1, 84)  # the two ends of viridis
VERMILLION = (213, 94, 0)
HEIGHTS = (100_000, 900, 2_000, 11_000, 800, 800)


def heatmap(stream: str, L: int, T: int = 10, *, empty: tuple[int, ...] = (), lists: int = 1) -> Heatmap:
    random = np.random.default_rng(L)
    mean_TL = 0.05 + 0.1 * random.random((T, L))
    count_T = np.full(T, 5, dtype=np.int64)
    mean_TL[list(empty)], count_T[list(empty)] = 0, 0
    paths = [f"single_blocks.{i}" if i * lists >= L and lists > 1 else f"blocks.{i}" for i in range(L)]
    return of(mean_TL, count_T, stream=stream, blocks=tuple(paths))


def of(
    mean_TL: Any,
    count_T: Any,
    *,
    stream: str = "image",
    reading: str = "last",
    blocks: tuple[str, ...] = (),
    nonfinite: int = 0,
) -> Heatmap:
    """A heatmap of these values; blocks: numbers if none are given."""
    blocks = blocks or tuple(map(str, range(mean_TL.shape[1])))
    return Heatmap(stream, reading, blocks, mean_TL, np.asarray(count_T), np.full(mean_TL.shape, 0.01), nonfinite)


def streams_figure(streams: dict[str, Heatmap], **look: Any) -> bytes:
    return figures.heatmap_figure(tuple(streams.values()), **look)


def combination_figure(both: Heatmap, **look: Any) -> bytes:
    return figures.heatmap_figure((both,), title=figures.COMBINED_TITLE, **look)


def pixels(png: bytes) -> Any:
    """(height, width, 3) uint8."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(np.uint8)


def where(image: Any, colour: tuple[int, int, int]) -> tuple[Any, Any]:
    """(rows, columns) of the pixels of exactly this colour."""
    return np.nonzero((image == colour).all(axis=-1))


def words(svg: bytes) -> set[str]:
    """The texts in the figure: matplotlib names each one in a comment beside its outlines."""
    return {text.strip() for text in re.findall(r"<!--(.*?)-->", svg.decode(), re.DOTALL)}


def test_figure_1_has_both_streams_in_three_views_with_units() -> None:
    streams = {"image": heatmap("image", 38), "text": heatmap("text", 37)}
    svg = streams_figure(streams, model="sd3 large", samples="50 samples of 5 images", file_format="svg")
    found = words(svg)
    for stream in ("image", "text"):
        for view in ("linear", "log1p", "clipped at the 95th percentile"):
            assert f"{stream} stream, {view}" in found
    assert {"angular distance (fraction of π)", "ln(1 + angular distance)", "block number"} <= found
    assert "sigma bin  (0 clean, 1 noise)" in found
    assert "not in the text stream" in found
    assert "not in the image stream" not in found
    assert "sd3 large   ·   50 samples of 5 images   ·   last token" in found
    assert {"0", "1", "0.1", "0.9", "36"} <= found
    found = words(combination_figure(combined(streams), file_format="svg"))
    assert "mean of the streams, linear" in found
    assert "36" in found and "not in the image stream" not in found


def test_the_noisy_end_is_at_the_top_and_block_0_at_the_left() -> None:
    mean_TL = np.full((10, 6), 0.1)
    mean_TL[9, 0] = 0.9
    one = of(mean_TL, [1] * 10)
    image = pixels(streams_figure({"image": one}))
    height, width, _ = image.shape
    first_panel = image[: height // 3, : int(width * 0.75)]
    hot_rows, hot_columns = where(first_panel, YELLOW)
    cold_rows, cold_columns = where(first_panel, DARK)
    assert hot_rows.size and cold_rows.size
    assert hot_rows.max() < np.median(cold_rows)
    assert hot_columns.max() < np.median(cold_columns)


def test_the_clipped_view_stops_at_the_95th_percentile_of_the_filled_cells() -> None:
    mean_TL = np.tile(np.linspace(0.2, 0.1, 40), (10, 1))
    mean_TL[:, 0] = 0.9
    mean_TL[0] = 0
    one = of(mean_TL, [0] + [3] * 9)
    image = pixels(streams_figure({"image": one}))
    height, width, _ = image.shape
    hot = [
        np.unique(where(image[int(a * height) : int(b * height), : int(width * 0.85)], YELLOW)[1]).size
        for a, b in ((0.07, 0.37), (0.70, 1.0))
    ]
    assert hot[1] > 1.8 * hot[0]  # linear: block 0 is at the top of the scale; clipped: block 1 too


def test_title_and_facts_end_before_the_edge_of_a_narrow_figure() -> None:
    for model in ("", "a model with a name that is longer than a figure of two blocks is wide, and then some more"):
        image = pixels(combination_figure(heatmap("combined", 2), model=model))
        head = image[:90]
        assert (head != 255).any() and (head[:, -15:] == 255).all()


def test_cells_without_samples_are_marked_and_said_so() -> None:
    holes = streams_figure({"image": heatmap("image", 6, empty=(0, 4))}, file_format="svg")
    assert b"<pattern" not in holes  # some viewers paint patterns black
    assert any("grey: no samples" in text for text in words(holes))
    grey = [
        where(pixels(streams_figure({"image": heatmap("image", 6, empty=empty)})), (217, 217, 217))[0].size
        for empty in ((), (4,), (0, 4))
    ]
    few = grey[0]  # of the smoothed edges of letters
    assert grey[1] > 20 * few
    assert grey[2] - few > 1.8 * (grey[1] - few)


def test_model_samples_and_what_was_left_out_are_said_as_they_are() -> None:
    one = of(np.array([[0.1, 0.2]]), [1], reading="mean", nonfinite=3)
    found = words(streams_figure({"image": one}, model="a_$x$", samples="1 sample", file_format="svg"))
    assert "a_$x$   ·   1 sample   ·   mean over tokens   ·   3 left out (not finite)" in found


@pytest.mark.parametrize(("L", "T", "lists"), [(1, 1, 1), (80, 10, 2), (12, 200, 1)])
def test_every_size_can_be_drawn(L: int, T: int, lists: int) -> None:
    streams = {"image": heatmap("image", L, T, lists=lists), "text": heatmap("text", L, T, lists=lists)}
    assert streams_figure(streams).startswith(b"\x89PNG")
    assert factor_figure(streams["image"].blocks, [3] * L, [90] * L).startswith(b"\x89PNG")
    nothing = of(np.zeros((T, L)), [0] * T)
    assert streams_figure({"image": nothing}).startswith(b"\x89PNG")


def test_block_lists_are_named_where_there_are_several() -> None:
    found = words(streams_figure({"image": heatmap("image", 57, lists=3)}, file_format="svg"))
    assert {"blocks", "single_blocks"} <= found
    assert "blocks" not in words(streams_figure({"image": heatmap("image", 57)}, file_format="svg"))


def test_figure_3_shows_every_factor_and_marks_critical_and_repeated_blocks() -> None:
    blocks = [f"transformer_blocks.{i}" for i in range(6)]
    svg = factor_figure(
        blocks, [1, 11, 7, 3, 12, 12], HEIGHTS, critical=(0,), repeated=(5,), model="sd3 tiny", file_format="svg"
    )
    found = words(svg)
    assert {
        "11",
        "7",
        "3",
        "12",
        "trainable parameters",
        "100,000",
        "critical: 1",
        "repeats the nearest block",
    } <= found
    assert (
        "above a bar: its factor, smaller for more parameters   ·   attention gets twice the factor   ·   sd3 tiny"
        in found
    )
    image = pixels(factor_figure(blocks, [1, 11, 7, 3, 12, 12], HEIGHTS, critical=(0,), repeated=(5,)))
    half = image[: int(image.shape[0] * 0.85)]
    assert where(half, VERMILLION)[1].max() < image.shape[1] * 0.3
    assert len(set(where(half, VERMILLION)[0])) > 0.6 * half.shape[0]  # the smallest factor has the tallest bar
    plain = words(factor_figure(blocks, [5] * 6, [0.5] * 6, unit="contribution", file_format="svg"))
    assert "critical: 1" not in plain and "repeats the nearest block" not in plain


@pytest.mark.parametrize("file_format", ["png", "svg"])
def test_the_same_input_gives_the_same_bytes_whatever_the_users_style(file_format: str) -> None:
    import matplotlib

    streams = {"image": heatmap("image", 6, empty=(2,))}
    first = streams_figure(streams, file_format=file_format)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert streams_figure(streams, file_format=file_format) == first
        assert dict(matplotlib.rcParams) == before
    assert b"Date" not in first and b"date" not in first


def test_the_arrays_are_named_and_have_their_errors() -> None:
    streams = {"image": heatmap("image", 38, empty=(3,)), "text": heatmap("text", 37)}
    arrays = files.heatmap_arrays({**streams, "combined": combined(streams)})
    names = {f"{s}_{a}" for s in (*streams, "combined") for a in ("mean", "error", "count", "blocks", "nonfinite")}
    assert set(arrays) == names | {"bin_edges", "reading"}
    assert arrays["bin_edges"].tolist() == [i / 10 for i in range(11)]
    assert str(arrays["reading"]) == "last"
    assert np.array_equal(arrays["image_mean"], streams["image"].values_TL)
    assert np.array_equal(arrays["image_error"], streams["image"].standard_errors_TL)
    assert arrays["image_count"].tolist() == [5, 5, 5, 0, 5, 5, 5, 5, 5, 5]
    assert tuple(arrays["text_blocks"]) == streams["text"].blocks
    assert arrays["combined_mean"].shape == (10, 37)


def test_readings_of_updates_and_of_pairs() -> None:
    value_TL = np.random.default_rng(0).random((10, 6)) - 0.7
    value_TL[:, 1] = np.nan
    updates = {"image": of(value_TL, [3] * 10, reading="update_cosine_last")}
    assert "image stream, cosine" in words(streams_figure(updates, file_format="svg"))
    pairs = PairHeatmap("image", "mean", tuple("abcdef"), value_TL[:4], 30)
    found = words(figures.pairs_figure((pairs,), file_format="svg"))
    assert {"image stream, linear", "image stream, each row rescaled", "blocks in a row"} <= found
    scaled = figures._rescaled_rows(np.array([[1.0, 3.0, 2.0], [4.0, 4.0, np.nan], [np.nan] * 3]))
    np.testing.assert_array_equal(scaled, [[0, 1, 0.5], [0, 0, np.nan], [np.nan] * 3])


def test_a_loss_increase_copes_with_a_block_far_above_and_with_less_than_nothing() -> None:
    value_TL = np.full((10, 12), 0.01)
    value_TL[:, 3], value_TL[:, 7] = 1.0, -0.01
    losses = {"block": of(value_TL, [3] * 10, stream="block", reading="ablation")}
    svg = words(streams_figure(losses, samples="ablation of 30 of 90 samples", file_format="svg"))
    views = {"linear", "logarithm on both sides of 0", "clipped at the 95th percentile"}
    assert {f"whole block, {view}" for view in views} | {"loss increase"} <= svg
    assert {"-1", "-0.01", "0", "0.01", "1"} <= {text.replace("\N{MINUS SIGN}", "-") for text in svg}
    assert "How much the loss rises when a block is left out" in svg and "ablation of 30 of 90 samples" in svg
    image = pixels(streams_figure(losses)).astype(int)
    middle = image[int(image.shape[0] * 0.42) : int(image.shape[0] * 0.6), : int(image.shape[1] * 0.8)]
    coloured = middle[np.ptp(middle, axis=-1) > 30]
    orange, purple = coloured[:, 0] > coloured[:, 2], coloured[:, 0] < coloured[:, 2]
    assert 6 < purple.sum() / orange.sum() < 16  # one of twelve blocks is below 0
    changes = {"text": of(np.abs(value_TL), [3] * 10, stream="text", reading="ablation_text_change")}
    assert "text update alone, logarithm" in words(streams_figure(changes, file_format="svg"))
    for nothing in (np.zeros((10, 12)), np.full((10, 12), -0.01)):
        assert streams_figure({"block": of(nothing, [1] * 10, stream="block", reading="ablation")})


def test_an_svg_is_one_xml_file_with_its_texts_and_nothing_from_outside() -> None:
    from xml.etree import ElementTree

    streams = {"image": heatmap("image", 38), "text": heatmap("text", 37, empty=(2,))}
    svg = streams_figure(streams, model="a <b> & 'c'", file_format="svg")
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        # Texts are outlines: a paper shows them alike whatever fonts there are.
        assert element.tag.rpartition("}")[2] not in ("text", "script", "foreignObject")
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith(("#", "data:image/png;base64,"))  # the colour bars
            assert "url(" not in value or "url(#" in value
    assert {"image stream, linear", "text stream, log1p", "block number"} <= words(svg)
    assert root.attrib["width"].endswith("pt") and float(root.attrib["width"][:-2]) > 500
