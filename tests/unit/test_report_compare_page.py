from __future__ import annotations

from pathlib import Path

import chromium
import numpy as np
import pytest
from synthetic_run import SD35_LARGE, manifest, rows, write_rows, write_run
from test_report_page import assert_clean, assert_escaped, assert_fits, data, nasty_run, needs_browser, pointed_at

from simpletuner_layerprobe import Run, compare, load
from simpletuner_layerprobe.api.changes import Comparison
from simpletuner_layerprobe.api.pages import comparison_page


def page(a: Run, b: Run, comparison: Comparison) -> str:
    return comparison_page(a, b, comparison, a.decided(preset="article") if comparison.factors else ())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Comparison]:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", SD35_LARGE, 2000, peaks=[("image", 35)], images=50)
    write_run(folder / "b", SD35_LARGE, 2000, seed=1, peaks=[("image", 35), ("text", 10)], images=50)
    a, b = load(folder / "a"), load(folder / "b")
    return a, b, compare(a, b)


def test_the_cells_in_the_page_are_those_of_the_comparison(pair: tuple[Run, Run, Comparison]) -> None:
    text = page(*pair)
    maps = {one["id"]: one for one in data(text)["maps"]}  # type: ignore[attr-defined]
    for name, stream in pair[2].streams.items():
        np.testing.assert_allclose(maps[name]["mean"], stream.cells.difference, rtol=1e-4)
        assert np.array_equal(np.array(maps[name]["sure"], bool), stream.cells.significant)
        assert maps[name]["counts"] == [stream.counts_a_T.tolist(), stream.counts_b_T.tolist()]
    assert "1 of 37 blocks of the text stream changed" in text and "<strong>changed</strong>" in text
    assert len(text.encode()) < 2_000_000


def test_every_string_of_a_run_is_escaped(tmp_path: Path, pair: tuple[Run, Run, Comparison]) -> None:
    a, b = (nasty_run(tmp_path / f"<img src=x onerror=alert({number})>", number) for number in (1, 2))
    assert_escaped(page(a, b, compare(a, b)), page(*pair))


def test_too_few_samples_and_no_factors_still_give_a_page(tmp_path: Path) -> None:
    what = manifest({"image": ("b.0", "b.1")}, readings=("last",))
    nothing_NL = np.full((2, 2), np.nan, np.float32)
    write_rows(tmp_path / "run", what, rows([0.5, 0.6], {("image", "last"): nothing_NL}))
    run = load(tmp_path / "run")
    text = page(run, run, compare(run, run))
    assert "Not enough samples: no sigma bin has 20" in text and "no stream (image) has a sample with finite" in text


# In the browser


@pytest.fixture
def file(pair: tuple[Run, Run, Comparison], tmp_path: Path) -> Path:
    path = tmp_path / "compare.html"
    path.write_text(page(*pair))
    return path


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(tab: chromium.Page, file: Path, width: int, dark: bool) -> None:
    assert_fits(tab, file, width, dark, file.with_suffix(".png"))


@needs_browser
def test_hover_names_the_change(tab: chromium.Page, file: Path, pair: tuple[Run, Run, Comparison]) -> None:
    tab.open(file)
    said, cells = pointed_at(tab, "text", 10), pair[2].streams["text"].cells
    for part in (
        "10: transformer_blocks.10",
        "sigma 0.900 to 1.00",
        f"change {cells.difference[9, 10]:.3g}",
        "beyond chance",
        f"A {cells.a[9, 10]:#.3g}, B {cells.b[9, 10]:#.3g}",
        "p < 1e-6",
    ):
        assert part in said
    assert "not beyond chance" in pointed_at(tab, "image", 1)
    assert_clean(tab)


@needs_browser
def test_a_rise_is_red_a_fall_is_blue_and_a_square_marks_it(tab: chromium.Page, tmp_path: Path) -> None:
    sigma_N = (np.arange(1000) + 0.5) / 1000
    runs = []
    for name, factors in (("a", [1, 1, 1, 1]), ("b", [1, 2, 0.2, 1])):
        what = manifest({"image": tuple(f"b.{i}" for i in range(4))}, readings=("last",))
        distance_NL = 0.1 * np.array(factors) + np.random.default_rng(0).random((1000, 4)) * 0.01
        write_rows(tmp_path / name, what, rows(sigma_N, {("image", "last"): distance_NL.astype(np.float32)}))
        runs.append(load(tmp_path / name))
    path = tmp_path / "page.html"
    path.write_text(page(runs[0], runs[1], compare(runs[0], runs[1])))
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
