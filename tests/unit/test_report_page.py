from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
from kept_files import artefact
from synthetic_run import SD35_LARGE, manifest, rows, sd3_modules, write_run

from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.records import Run, ShardWriter, create_run, open_run
from simpletuner_layerprobe.show.page import page

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&'\"{{data}}"
ARTICLE_SAMPLES = 174_008
needs_browser = pytest.mark.skipif(chromium.found() is None, reason="no Chromium on PATH (apt-get install chromium)")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(text)
    return parser.seen


def data(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    value: dict[str, object] = json.loads(found.group(1))
    return value


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    peaks = [("image", 0), ("text", 0), ("text", 31), ("image", 35)]
    folder = tmp_path_factory.mktemp("runs") / "large"
    return write_run(folder, SD35_LARGE, 3000, peaks=peaks, modules=sd3_modules(38))


def test_the_cells_in_the_page_are_those_of_the_heatmaps(large: Run) -> None:
    maps = {one["id"]: one for one in data(page(large))["maps"]}  # type: ignore[attr-defined]
    for name, heatmap in heatmaps(large).items():
        np.testing.assert_allclose(maps[name]["mean"], heatmap.mean_TL, rtol=1e-4)
        assert maps[name]["count"] == heatmap.count_T.tolist()
    assert set(maps) == {"image", "text", "combined"}


def test_nothing_in_the_page_asks_a_network(large: Run) -> None:
    text = page(large)
    for tag, attributes in tags(text):
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,"
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert len(text.encode()) < 2_000_000


def nasty_run(folder: Path) -> Run:
    what = replace(
        manifest({"image": (NASTY, *(f"b.{i}" for i in range(9)))}, tokens=("last",), family=NASTY, flavour=NASTY),
        model_class=NASTY,
        versions={NASTY: NASTY},
        settings={NASTY: [NASTY]},
    )
    create_run(folder, what)
    random = np.random.default_rng(0)
    distance_NL = random.random((400, 10)).astype(np.float32)
    distance_NL[:, 0] = 0.001 * distance_NL[:, 0]
    ShardWriter(folder, what, rank=0).write(rows(random.random(400), {("image", "last"): distance_NL}, (NASTY,)))
    return open_run(folder)


def test_every_string_of_a_run_is_escaped(tmp_path: Path) -> None:
    text = page(nasty_run(tmp_path / "run"))
    plain = page(write_run(tmp_path / "plain", {"image": tuple(f"b.{i}" for i in range(10))}, 400))
    assert [tag for tag, _ in tags(text)].count("script") == [tag for tag, _ in tags(plain)].count("script") == 2
    assert "img" not in [tag for tag, _ in tags(text)]
    assert not any(name.startswith("on") for _, attributes in tags(text) for name in attributes)
    assert data(text)["blocks"][0] == NASTY  # type: ignore[index]


@pytest.mark.parametrize(
    ("streams", "weighting", "said"),
    [
        (("image",), {}, "the image stream clipped at percentile 90 of its cells, averaged over sigma"),
        (("image", "text"), {}, "image weighted 2/3 and text 1/3"),
        (("image", "audio", "text"), {}, "image and audio weighted 2/3 and text 1/3"),
        (("image", "audio"), {}, "image and audio weighted 2/3, averaged"),
        (
            ("image", "text"),
            {"text_weight": 0.5, "image_weight": 0.123, "clip_percentile": 95.0},
            "each stream clipped at percentile 95 of its cells, image weighted 0.123 and text 1/2, averaged",
        ),
    ],
)
def test_the_page_names_the_weights_that_were_used(
    streams: tuple[str, ...], weighting: dict[str, float], said: str, tmp_path: Path
) -> None:
    blocks = {name: tuple(f"b.{i}" for i in range(10)) for name in streams}
    text = page(write_run(tmp_path / "run", blocks, 400), **weighting)
    assert said in text
    for name, value in weighting.items():
        assert f"--{name.replace('_', '-')} {value!r}" in text


def test_a_command_stands_only_where_it_would_work(tmp_path: Path, large: Run) -> None:
    assert "--out lycoris_config.json" in page(large) and "--unverified" not in page(large)
    run = write_run(tmp_path / "run", {"image": ("b.0", "b.1", "b.2")}, 50)
    assert "--unverified --out lycoris_config.json" in page(run)
    (run.path / "config.json").write_text("{}")
    assert "--unverified --env weighted\nsimpletuner train env=weighted" in page(run)


def test_one_sample_is_one_sample(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "run", SD35_LARGE, 1, shards=1))
    assert "of the image and text streams, seen in 1 sample." in text
    assert text.count("<h4>every stream</h4>") >= 5


def test_a_run_without_samples_or_this_reading_is_refused(tmp_path: Path, large: Run) -> None:
    what = manifest({"image": ("b.0", "b.1")}, tokens=("last",))
    with pytest.raises(ProbeError, match="has no samples"):
        page(create_run(tmp_path / "empty", what))
    with pytest.raises(ProbeError, match="no reading 'mean'"):
        page(create_run(tmp_path / "last", replace(what, family="x")), tokens="mean")


def test_two_samples_and_equal_blocks_still_give_a_page(tmp_path: Path) -> None:
    what = manifest({"image": ("b.0", "b.1")}, tokens=("last",))
    create_run(tmp_path, what)
    ShardWriter(tmp_path, what, rank=0).write(rows([0.5, 0.6], {("image", "last"): np.full((2, 2), 0.1, np.float32)}))
    text = page(open_run(tmp_path))
    assert "Not enough samples" in text and "same contribution" in text and 'id="command"' not in text


def test_the_page_of_the_articles_run_is_made_in_five_seconds(tmp_path: Path) -> None:
    what = manifest(SD35_LARGE, tokens=("last",), modules=sd3_modules(38))
    create_run(tmp_path, what)
    random = np.random.default_rng(0)
    noise_NL = random.random((ARTICLE_SAMPLES // 8, 38)).astype(np.float32)
    for _ in range(8):
        distances = {("image", "last"): noise_NL * 0.1, ("text", "last"): noise_NL[:, :37] * 0.2}
        ShardWriter(tmp_path, what, rank=0).write(rows(random.random(len(noise_NL)), distances))
    run = open_run(tmp_path)
    assert run.sample_count() == ARTICLE_SAMPLES
    start = time.process_time()
    made = page(run)
    assert time.process_time() - start < 5
    assert len(made.encode()) < 2_000_000


# In the browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def file(large: Run, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(page(large))
    return path


def assert_clean(tab: chromium.Page) -> None:
    assert not tab.problems
    assert all(url.startswith(("file:", "data:")) for url in tab.asked), tab.asked


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(tab: chromium.Page, file: Path, width: int, dark: bool) -> None:
    tab.open(file, width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll,.wide,.said') && "
    assert tab.value(outside + "e.getBoundingClientRect().right > innerWidth + 1).length") == 0
    name = f"report-{'desktop' if width > 600 else 'phone'}{'-dark' if dark else ''}.png"
    assert tab.picture(artefact(name)).stat().st_size > 20_000
    assert_clean(tab)


@needs_browser
def test_hover_keys_and_links_name_the_cell(tab: chromium.Page, file: Path, large: Run) -> None:
    tab.open(file)
    tab.value("document.querySelector('#map-image canvas[tabindex]').scrollIntoView({block: 'center'})")
    place = "(() => {const r = document.querySelector('#map-image canvas[tabindex]').getBoundingClientRect();"
    left, top, width, height = tab.value(place + "return [r.left, r.top, r.width, 220];})()")
    tab.point(left + width * 5.5 / 38, top + height * 0.05)
    said = tab.value("document.getElementById('tip').innerText")
    heatmap = heatmaps(large)["image"]
    for part in ("5: transformer_blocks.5", "sigma 0.900 to 1.00", f"mean {heatmap.mean_TL[9, 5]:.3g}", "95% interval"):
        assert part in said
    assert f"{heatmap.count_T[9]:,} samples" in said
    tab.value("document.querySelector('#map-text canvas[tabindex]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        tab.press(key)
    heard = tab.value("document.getElementById('said-text').textContent")
    assert "1: transformer_blocks.1, sigma 0.100 to 0.200" in heard
    tab.value("document.querySelector('a[data-map=text][data-first=\"31\"]').click()")
    assert tab.value("document.activeElement.closest('figure').id") == "map-text"
    assert_clean(tab)


@needs_browser
def test_strings_of_a_run_stay_strings_and_the_page_prints(tab: chromium.Page, tmp_path: Path) -> None:
    path = tmp_path / "nasty.html"
    path.write_text(page(nasty_run(tmp_path / "run")))
    tab.open(path, width=380)
    assert tab.value("document.querySelectorAll('img').length") == 0
    assert tab.value("document.querySelector('h1').textContent").startswith("</script>")
    assert tab.value("document.documentElement.scrollWidth") <= 380
    assert_clean(tab)


@needs_browser
def test_the_page_prints_with_everything_open_and_nothing_cut_off(tab: chromium.Page, file: Path) -> None:
    tab.open(file, width=1280)
    assert tab.printed(artefact("report-print.pdf")).read_bytes().startswith(b"%PDF")
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.call("Emulation.setDeviceMetricsOverride", width=740, height=1000, deviceScaleFactor=1, mobile=False)
    tab.value("dispatchEvent(new Event('beforeprint'))")
    assert tab.value("[...document.querySelectorAll('canvas')].every(c => c.getBoundingClientRect().right <= 741)")
    assert tab.value("[...document.querySelectorAll('details')].every(d => d.open)")
    assert tab.picture(artefact("report-print.png")).stat().st_size > 20_000
    tab.call("Emulation.setEmulatedMedia", media="")
    assert_clean(tab)


@needs_browser
def test_every_control_is_reached_by_tab_and_shows_its_focus(tab: chromium.Page, file: Path) -> None:
    tab.open(file)
    reached = []
    for _ in range(16):
        tab.press("Tab")
        outline = "getComputedStyle(e.closest('label') || e).outlineStyle"
        reached.append(
            tab.value(f"(() => {{const e = document.activeElement; return [e.tagName, e.name || '', {outline}];}})()")
        )
    names = [name for _, name, _ in reached]
    assert names.index("scale") < names.index("colours")
    canvases = [outline for tag, _, outline in reached if tag == "CANVAS"]
    assert len(canvases) == 3 and all(outline != "none" for _, _, outline in reached), reached
    assert_clean(tab)


@needs_browser
def test_a_thousand_blocks_stay_usable(tab: chromium.Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"image": tuple(f"b.{i}" for i in range(1000))}, 300, tokens=("last",))
    path = tmp_path / "report.html"
    path.write_text(page(run))
    tab.open(path, width=380)
    assert tab.value("document.documentElement.scrollWidth") <= 380
    cell = "document.querySelector('#map-image canvas[tabindex]').clientWidth / 1000"
    assert tab.value(cell) >= 4
    again = "(() => {const t = performance.now(); document.querySelector('input[value=log]').click();"
    assert tab.value(again + "return performance.now() - t;})()") < 2000
    assert_clean(tab)
