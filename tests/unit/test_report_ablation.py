"""The report of a run with ablation: its story, maps, scatter and numbers, as text and in the browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import chromium
import numpy as np
import pytest
from kept_files import artefact
from synthetic_run import manifest, rows, write_ablated_run, write_rows, write_run
from test_report_page import NASTY, assert_clean, assert_fits, data, needs_browser, tags

from simpletuner_layerprobe import Run, load
from simpletuner_layerprobe.api.pages import report
from simpletuner_layerprobe.show.ablation import HEIGHT, MARK, WIDTH, apart, scatter, story

NEEDED = (0.02, 0.008, 0.05, 0.01, 0.012, 0.009, 0.011, 0.09, 0.01, 0.012, 0.008, 0.0005, -0.0003, 0.011)
ANGLES = (0.1, 0.05, 0.12, 0.04, 0.07, 0.05, 0.05, 0.2, 0.03, 0.06, 0.05, 0.03, 0.02, 0.08)
BLOCKS = {"image": tuple(f"b.{i}" for i in range(14)), "text": tuple(f"b.{i}" for i in range(13))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ablated") / "run"
    return load(write_ablated_run(folder, BLOCKS, 1200, NEEDED, images=100, angles=ANGLES).path)


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return report(run)


def test_the_story_is_two_sentences_with_the_numbers_of_the_api(run: Run, text: str) -> None:
    made = run.ablation()
    said = "The loss needs blocks 7 and 2 most; leaving out blocks 12 and 11 hardly hurts. The image angle tells this "
    said += (
        f"order to {made.told['image'].angle.blocks}; depth alone to {made.told['image'].baselines['depth'].blocks}."
    )
    assert story(made) == said and f"<p id='story'>{said}</p>" in text
    assert "400 of 1,200 samples, 100 images" in text
    table = text.partition("aria-label='Ablation table'")[2].partition("</table>")[0]
    for i, cells in re.findall(r"<th scope='row' class=n>(\d+)</th>(.*?)</tr>", table):
        assert f">{made.loss.value_L[int(i)]:.3g}<" in cells and f">{made.angle['image'].value_L[int(i)]:.3g}<" in cells
        kind = {7: "needed", 2: "needed", 11: "hardly needed", 12: "hardly needed"}.get(int(i), "")
        assert f"<td data-head=''>{kind}</td>" in cells


def test_a_story_without_any_block_that_stands_out(tmp_path: Path) -> None:
    alike = load(write_ablated_run(tmp_path / "run", {"image": BLOCKS["image"]}, 900, [0.01] * 14, images=90).path)
    told = story(alike.ablation())
    assert re.match(
        r"The loss needs no block clearly more than most others, block \d+ most; no block is shown to", told
    )


def test_the_maps_lie_beside_each_other(run: Run, text: str) -> None:
    maps = {one["id"]: one for one in data(text)["maps"]}  # type: ignore[attr-defined]
    assert [name for name, one in maps.items() if one.get("at") == "beside"] == ["image-beside", "block"]
    heatmap = run.heatmap("block", "ablation")
    np.testing.assert_allclose(maps["block"]["mean"], heatmap.values_TL, rtol=1e-4)
    assert maps["block"]["loss"] and maps["block"]["count"] == heatmap.counts_T.tolist()
    assert maps["image"]["mean"] == maps["image-beside"]["mean"]
    for name in ("needed", "hardly"):
        assert "data-map='block'" in text.partition("Blocks the loss needs" if name == "needed" else "hardly hurts")[2]


def test_the_scatter_has_a_mark_for_every_block_of_the_stream(run: Run) -> None:
    root = ElementTree.fromstring(scatter(run.ablation(), "text"))
    marks = [part for part in root if part.get("class", "").startswith("mark")]
    assert [mark.findtext("text") for mark in marks] == [str(i) for i in range(13)]
    assert [mark.get("class", "").split()[1:] for mark in marks].count(["hot"]) == 2
    for mark in marks:
        circle = mark.find("circle")
        assert (
            circle is not None and 0 < float(circle.get("cx", "")) < WIDTH and 0 < float(circle.get("cy", "")) < HEIGHT
        )
    heights = [float(mark.find("circle").get("cy", "")) for mark in marks]  # type: ignore[union-attr]
    assert min(heights) == heights[7] and max(heights) == heights[12]


def test_marks_do_not_hide_each_other_and_stay_near_their_points() -> None:
    points = np.array([[100.0, 100], [100, 100], [104, 101], [300, 200], [99, 97]])
    places = apart(points)
    gap = np.hypot(*np.moveaxis(places[:, None] - places[None], -1, 0)) + 99 * np.eye(5)
    assert gap.min() > 1.8 * MARK and np.hypot(*(places - points).T).max() < 3 * MARK
    np.testing.assert_allclose(places[3], points[3], atol=0.01)


def test_a_run_without_ablation_has_no_such_part(tmp_path: Path) -> None:
    plain = report(load(write_run(tmp_path / "run", BLOCKS, 100).path))
    assert "id='ablation'" not in plain and "'beside'" not in json.dumps(data(plain))


def test_strings_of_a_run_are_escaped(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    what = manifest({"image": (NASTY, *BLOCKS["image"][1:])}, readings=("last", "ablation"))
    values = {("image", "last"): random.random((400, 14)), ("block", "ablation"): random.random((400, 14))}
    facts = {"image": np.arange(400) % 50 + 1}
    write_rows(tmp_path / "run", what, rows(random.random(400), values, facts))
    text = report(load(tmp_path / "run"))
    assert [tag for tag, _ in tags(text)].count("script") == 2 and "img" not in [tag for tag, _ in tags(text)]


# In the browser


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(
    tab: chromium.Page, text: str, tmp_path: Path, width: int, dark: bool
) -> None:
    file = tmp_path / "report.html"
    file.write_text(text)
    assert_fits(tab, file, width, dark, artefact(f"report-ablation-{width}{'-dark' if dark else ''}.png"))
    tops = [
        tab.value(f"document.getElementById('map-{name}').getBoundingClientRect().top")
        for name in ("image-beside", "block")
    ]
    assert (tops[0] == tops[1]) == (width > 600)
    said = "document.getElementById('said-block').textContent"
    tab.value("document.querySelector('#map-block canvas[tabindex]').focus()")
    for _ in range(13):
        tab.press("ArrowRight")
    assert "12: b.12, sigma 0 to 0.100, loss increase -" in tab.value(said)
    tab.value("document.querySelector('a[data-map=block]').click()")
    assert tab.value("document.activeElement.closest('figure').id") == "map-block"
    size = tab.value("parseFloat(getComputedStyle(document.querySelector('.mark text')).fontSize)")
    scale = tab.value("document.querySelector('.scatter').getBoundingClientRect().width") / WIDTH
    assert size * scale >= 8
    assert_clean(tab)
