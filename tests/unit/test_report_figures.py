from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from simpletuner_layerprobe.analyse.heatmap import Heatmap, combined
from simpletuner_layerprobe.show.figures import (
    combination_figure,
    factor_figure,
    heatmap_npz,
    streams_figure,
)

YELLOW, DARK = (253, 231, 37), (68, 1, 84)  # the two ends of viridis
VERMILLION = (213, 94, 0)


def heatmap(stream: str, L: int, T: int = 10, *, empty: tuple[int, ...] = (), lists: int = 1) -> Heatmap:
    random = np.random.default_rng(L)
    mean_TL = 0.05 + 0.1 * random.random((T, L))
    count_T = np.full(T, 5, dtype=np.int64)
    mean_TL[list(empty)], count_T[list(empty)] = 0, 0
    paths = [f"single_blocks.{i}" if i * lists >= L and lists > 1 else f"blocks.{i}" for i in range(L)]
    return Heatmap(stream, "last", tuple(paths), mean_TL, count_T, 0, T)


def pixels(png: bytes) -> Any:
    """(height, width, 3) uint8."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(np.uint8)


def where(image: Any, colour: tuple[int, int, int]) -> tuple[Any, Any]:
    """(rows, columns) of the pixels of exactly this colour."""
    return np.nonzero((image == colour).all(axis=-1))


def words(svg: bytes) -> set[str]:
    """The texts in the figure: matplotlib names each one in a comment beside its outlines."""
    import re

    return {text.strip() for text in re.findall(r"<!--(.*?)-->", svg.decode(), re.DOTALL)}


def test_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, simpletuner_layerprobe.show.figures; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_figure_1_has_both_streams_in_three_views_with_units() -> None:
    streams = {"image": heatmap("image", 38), "text": heatmap("text", 37)}
    svg = streams_figure(streams, model="sd3 large", file_format="svg")
    found = words(svg)
    for stream in ("image", "text"):
        for view in ("linear", "log1p", "clipped at the 95th percentile"):
            assert f"{stream} stream, {view}" in found
    assert {"angular distance (fraction of π)", "ln(1 + angular distance)", "block number"} <= found
    assert "sigma bin  (0 clean, 1 noise)" in found
    assert "not in the text stream" in found
    assert "not in the image stream" not in found
    assert "sd3 large   ·   50 samples   ·   last token" in found
    assert {"0", "1", "0.1", "0.9", "36"} <= found


def test_figure_2_is_the_combination() -> None:
    combination = combined({"image": heatmap("image", 38), "text": heatmap("text", 37)})
    found = words(combination_figure(combination, file_format="svg"))
    assert "mean of the streams, linear" in found
    assert "36" in found and "not in the image stream" not in found


def test_the_noisy_end_is_at_the_top_and_block_0_at_the_left() -> None:
    mean_TL = np.full((10, 6), 0.1)
    mean_TL[9, 0] = 0.9
    one = Heatmap("image", "last", tuple("abcdef"), mean_TL, np.ones(10, dtype=np.int64), 0, 10)
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
    one = Heatmap("image", "last", tuple(map(str, range(40))), mean_TL, np.array([0] + [3] * 9), 0, 10)
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
    plain = streams_figure({"image": heatmap("image", 6)}, file_format="svg")
    holes = streams_figure({"image": heatmap("image", 6, empty=(0, 4))}, file_format="svg")
    assert b"<pattern" not in holes  # some viewers paint patterns black
    assert any("grey with a stroke: no samples" in text for text in words(holes))
    assert not any("no samples" in text for text in words(plain))
    grey = [
        where(pixels(streams_figure({"image": heatmap("image", 6, empty=empty)})), (242, 242, 242))[0].size
        for empty in ((), (4,), (0, 4))
    ]
    few = grey[0]  # of the smoothed edges of letters
    assert grey[1] > 20 * few
    assert grey[2] - few > 1.8 * (grey[1] - few)


def test_a_dollar_sign_in_a_name_is_a_dollar_sign() -> None:
    found = words(streams_figure({"image": heatmap("image", 2)}, model="a_$x$", file_format="svg"))
    assert "a_$x$   ·   50 samples   ·   last token" in found


def test_samples_that_were_left_out_are_said() -> None:
    one = Heatmap("image", "mean", tuple("ab"), np.array([[0.1, 0.2]]), np.array([1]), 3, 1)
    found = words(streams_figure({"image": one}, file_format="svg"))
    assert "1 sample   ·   mean over tokens   ·   3 left out (not finite)" in found


@pytest.mark.parametrize(("L", "T", "lists"), [(1, 1, 1), (80, 10, 2), (12, 200, 1)])
def test_every_size_can_be_drawn(L: int, T: int, lists: int) -> None:
    streams = {"image": heatmap("image", L, T, lists=lists), "text": heatmap("text", L, T, lists=lists)}
    assert streams_figure(streams).startswith(b"\x89PNG")
    assert factor_figure(streams["image"].blocks, [3] * L).startswith(b"\x89PNG")


def test_equal_cells_and_no_cells_at_all_can_be_drawn() -> None:
    for value, count in ((0.2, 1), (0.0, 0)):
        one = Heatmap("image", "last", tuple("ab"), np.full((2, 2), value), np.full(2, count), 0, 2)
        assert streams_figure({"image": one}).startswith(b"\x89PNG")


def test_block_lists_are_named_where_there_are_several() -> None:
    found = words(streams_figure({"image": heatmap("image", 57, lists=3)}, file_format="svg"))
    assert {"blocks", "single_blocks"} <= found
    assert "blocks" not in words(streams_figure({"image": heatmap("image", 57)}, file_format="svg"))


def test_figure_3_shows_every_factor_and_marks_critical_and_repeated_blocks() -> None:
    blocks = [f"transformer_blocks.{i}" for i in range(6)]
    svg = factor_figure(
        blocks, [1, 11, 7, 3, 12, 12], critical=(0,), repeated=(5,), model="sd3 tiny", file_format="svg"
    )
    found = words(svg)
    assert {"11", "7", "3", "12", "LoKr factor", "critical: 1", "repeats the nearest block"} <= found
    assert "smaller factor, more parameters   ·   attention gets twice the factor   ·   sd3 tiny" in found
    image = pixels(factor_figure(blocks, [1, 11, 7, 3, 12, 12], critical=(0,), repeated=(5,)))
    half = image[: int(image.shape[0] * 0.85)]
    assert where(half, VERMILLION)[1].max() < image.shape[1] * 0.25
    plain = words(factor_figure(blocks, [5] * 6, file_format="svg"))
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


def test_the_arrays_are_named_and_need_no_pickle() -> None:
    streams = {"image": heatmap("image", 38, empty=(3,)), "text": heatmap("text", 37)}
    data = heatmap_npz({**streams, "combined": combined(streams)})
    assert data == heatmap_npz({**streams, "combined": combined(streams)})
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        names = {f"{s}_{a}" for s in (*streams, "combined") for a in ("mean", "count", "blocks", "nonfinite")}
        assert set(arrays) == names | {"bin_edges", "tokens"}
        assert arrays["bin_edges"].tolist() == [i / 10 for i in range(11)]
        assert str(arrays["tokens"]) == "last"
        assert np.array_equal(arrays["image_mean"], streams["image"].mean_TL)
        assert arrays["image_count"].tolist() == [5, 5, 5, 0, 5, 5, 5, 5, 5, 5]
        assert tuple(arrays["text_blocks"]) == streams["text"].blocks
        assert arrays["combined_mean"].shape == (10, 37)


def test_an_svg_is_one_xml_file_with_its_texts_and_nothing_from_outside() -> None:
    from xml.etree import ElementTree

    streams = {"image": heatmap("image", 38), "text": heatmap("text", 37, empty=(2,))}
    svg = streams_figure(streams, model="a <b> & 'c'", file_format="svg")
    assert svg == streams_figure(streams, model="a <b> & 'c'", file_format="svg")
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
