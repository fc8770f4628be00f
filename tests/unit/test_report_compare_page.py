from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import chromium
import numpy as np
import pytest
from synthetic_run import SD35_LARGE, manifest, rows, write_run
from test_report_page import NASTY, assert_clean, data, needs_browser, tags

from simpletuner_layerprobe.analyse.compare import Comparison, compare
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.run.records import Run, ShardWriter, create_run, open_run
from simpletuner_layerprobe.show.compare_page import compare_page


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Comparison]:
    folder = tmp_path_factory.mktemp("runs")
    a = write_run(folder / "a", SD35_LARGE, 2000, peaks=[("image", 35)])
    b = write_run(folder / "b", SD35_LARGE, 2000, seed=1, peaks=[("image", 35), ("text", 10)])
    return a, b, compare(a, b, article_factors)


def test_the_cells_in_the_page_are_those_of_the_comparison(pair: tuple[Run, Run, Comparison]) -> None:
    text = compare_page(*pair)
    maps = {one["id"]: one for one in data(text)["maps"]}  # type: ignore[attr-defined]
    for name, stream in pair[2].streams.items():
        np.testing.assert_allclose(maps[name]["mean"], stream.cells.difference, rtol=1e-4)
        assert np.array_equal(np.array(maps[name]["sure"], bool), stream.cells.significant)
        assert maps[name]["counts"] == [stream.count_a_T.tolist(), stream.count_b_T.tolist()]
    assert "1 of 37 blocks of the text stream changed" in text and "<strong>changed</strong>" in text
    assert len(text.encode()) < 2_000_000


def test_nothing_in_the_page_asks_a_network(pair: tuple[Run, Run, Comparison]) -> None:
    text = compare_page(*pair)
    for tag, attributes in tags(text):
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,"
    assert "url(" not in text and "@import" not in text and "fetch(" not in text and "{{" not in text.split("<body>")[1]


def nasty_pair(folder: Path) -> tuple[Run, Run, Comparison]:
    found = []
    for number in (1, 2):
        what = replace(
            manifest({"image": (NASTY, *(f"b.{i}" for i in range(9)))}, tokens=("last",), family=NASTY, flavour=NASTY),
            model_class=f"{NASTY}{number}",
            versions={NASTY: f"{NASTY}{number}"},
            settings={NASTY: [NASTY, number]},
        )
        path = folder / f"<img src=x onerror=alert({number})>"
        create_run(path, what)
        random = np.random.default_rng(number)
        distance_NL = (number + random.random((400, 10))).astype(np.float32) / 10
        ShardWriter(path, what, rank=0).write(rows(random.random(400), {("image", "last"): distance_NL}, (NASTY,)))
        found.append(open_run(path))
    return found[0], found[1], compare(found[0], found[1], article_factors)


def test_every_string_of_a_run_is_escaped(tmp_path: Path, pair: tuple[Run, Run, Comparison]) -> None:
    text = compare_page(*nasty_pair(tmp_path))
    assert [tag for tag, _ in tags(text)].count("script") == [tag for tag, _ in tags(compare_page(*pair))].count(
        "script"
    )
    assert "img" not in [tag for tag, _ in tags(text)]
    assert not any(name.startswith("on") for _, attributes in tags(text) for name in attributes)
    assert data(text)["blocks"][0] == NASTY  # type: ignore[index]


def test_too_few_samples_and_no_factors_still_give_a_page(tmp_path: Path) -> None:
    what = manifest({"image": ("b.0", "b.1")}, tokens=("last",))
    create_run(tmp_path, what)
    ShardWriter(tmp_path, what, rank=0).write(rows([0.5, 0.6], {("image", "last"): np.full((2, 2), 0.1, np.float32)}))
    run = open_run(tmp_path)
    text = compare_page(run, run, compare(run, run, article_factors))
    assert "Not enough samples: no sigma bin has 20" in text and "A has no contributions" in text


# In the browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def file(pair: tuple[Run, Run, Comparison], tmp_path: Path) -> Path:
    path = tmp_path / "compare.html"
    path.write_text(compare_page(*pair))
    return path


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(tab: chromium.Page, file: Path, width: int, dark: bool) -> None:
    tab.open(file, width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll,.wide,.said') && "
    assert tab.value(outside + "e.getBoundingClientRect().right > innerWidth + 1).length") == 0
    assert tab.picture(file.with_suffix(".png")).stat().st_size > 20_000
    assert_clean(tab)


@needs_browser
def test_hover_keys_and_links_name_the_change(
    tab: chromium.Page, file: Path, pair: tuple[Run, Run, Comparison]
) -> None:
    tab.open(file)
    tab.value("document.querySelector('#map-text canvas[tabindex]').scrollIntoView({block: 'center'})")
    place = "(() => {const r = document.querySelector('#map-text canvas[tabindex]').getBoundingClientRect();"
    left, top, width, height = tab.value(place + "return [r.left, r.top, r.width, 220];})()")
    tab.point(left + width * 10.5 / 38, top + height * 0.05)
    said = tab.value("document.getElementById('tip').innerText")
    cells = pair[2].streams["text"].cells
    for part in (
        "10: transformer_blocks.10",
        "sigma 0.900 to 1.00",
        f"change {cells.difference[9, 10]:.3g}",
        "beyond chance",
        f"A {cells.a[9, 10]:#.3g}, B {cells.b[9, 10]:#.3g}",
        "p < 1e-6",
    ):
        assert part in said
    tab.value("document.querySelector('#map-image canvas[tabindex]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        tab.press(key)
    heard = tab.value("document.getElementById('said-image').textContent")
    assert "1: transformer_blocks.1, sigma 0.100 to 0.200" in heard and "not beyond chance" in heard
    tab.value("document.querySelector('a[data-map=text][data-first=\"10\"]').click()")
    assert tab.value("document.activeElement.closest('figure').id") == "map-text"
    assert_clean(tab)


@needs_browser
def test_a_rise_is_red_a_fall_is_blue_and_a_square_marks_it(tab: chromium.Page, tmp_path: Path) -> None:
    sigma_N = (np.arange(1000) + 0.5) / 1000
    runs = []
    for name, factors in (("a", [1, 1, 1, 1]), ("b", [1, 2, 0.2, 1])):
        what = manifest({"image": tuple(f"b.{i}" for i in range(4))}, tokens=("last",))
        create_run(tmp_path / name, what)
        noise_NL = np.random.default_rng(0).random((1000, 4)) * 0.01
        distance_NL = 0.1 * np.array(factors) + noise_NL
        ShardWriter(tmp_path / name, what, rank=0).write(rows(sigma_N, {("image", "last"): distance_NL}))
        runs.append(open_run(tmp_path / name))
    path = tmp_path / "page.html"
    path.write_text(compare_page(runs[0], runs[1], compare(runs[0], runs[1], article_factors)))
    tab.open(path)
    read = (  # all at once: a second look at a canvas makes the browser complain
        "(() => {const c = document.querySelector('#map-image canvas[tabindex]'), w = c.width / 4, h = 22;"
        "const p = c.getContext('2d').getImageData(0, 0, c.width, 220).data;"
        "return [0, 1, 2].map(x => [.1, .5].map(at => {"
        "const i = 4 * (Math.floor(4.5 * h) * c.width + Math.floor((x + at) * w));"
        "return [...p.slice(i, i + 3)];}));})()"
    )
    (still, still_middle), (red, red_middle), (blue, blue_middle) = tab.value(read)
    assert red[0] > red[2] + 40 and blue[2] > blue[0] + 40
    assert abs(still[0] - still[2]) < 30 and still_middle == still
    assert all(middle in ([0, 0, 0], [255, 255, 255]) for middle in (red_middle, blue_middle))
    assert_clean(tab)


@needs_browser
def test_strings_of_a_run_stay_strings_and_the_page_prints(tab: chromium.Page, tmp_path: Path) -> None:
    path = tmp_path / "nasty.html"
    path.write_text(compare_page(*nasty_pair(tmp_path)))
    tab.open(path, width=380)
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert tab.value("document.documentElement.scrollWidth") <= 380
    assert tab.printed(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert_clean(tab)
