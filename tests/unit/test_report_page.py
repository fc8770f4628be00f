from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
from kept_files import artefact
from synthetic_run import FLUX_DEV, SD35_LARGE, manifest, rows, sd3_modules, write_rows, write_run

from simpletuner_layerprobe import Run, load
from simpletuner_layerprobe.api.pages import report
from simpletuner_layerprobe.run.manifest import Target

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&'\"{{data}}"
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
    write_run(folder, SD35_LARGE, 3000, peaks=peaks, modules=sd3_modules(38), images=60)
    return load(folder)


@pytest.fixture(scope="module")
def text(large: Run) -> str:
    return report(large)


def test_the_numbers_in_the_page_are_those_of_the_api(large: Run, text: str) -> None:
    told = data(text)
    maps = {one["id"]: one for one in told["maps"]}  # type: ignore[attr-defined]
    assert set(maps) == {f"{name}{behind}" for name in ("image", "text", "combined") for behind in ("", "-mean")}
    for reading, behind in (("last", ""), ("mean", "-mean")):
        for name, heatmap in large.heatmaps(reading).items():
            np.testing.assert_allclose(maps[name + behind]["mean"], heatmap.values_TL, rtol=1e-4)
            np.testing.assert_allclose(maps[name + behind]["error"], heatmap.standard_errors_TL, rtol=1e-4)
            assert maps[name + behind]["count"] == heatmap.counts_T.tolist()
    contributions, sure = large.contributions(), large.contributions().confidence
    shown = text.partition("<div class='of-last'><p>")[2].partition("<div class='of-mean'>")[0]
    rows = re.findall(r"<th scope='row'>(transformer_blocks\.\d+)</th>(.*?)</tr>", shown)
    assert [block for block, _ in rows] == list(contributions.blocks)
    for i, (_, cells) in enumerate(rows):
        assert f">{contributions.values[i]:.3f}<" in cells
        assert f">{contributions.low[i]:.3f} to {contributions.high[i]:.3f}<" in cells
        kind = "hot" if i in contributions.critical else "pale" if i == 37 else ""
        assert f"<span class='bar {kind}' style='width:{100 * contributions.values[i]:.2f}%'>" in cells
        assert ("NOT settled" in cells) == (not sure.settled_K[i])
    assert sure.text() in text
    assert "3,000 samples of 60 images" in text


def test_a_plan_for_a_budget_has_its_own_columns(large: Run) -> None:
    text = report(large, preset="2M")
    for kind in ("feed-forward", "attention", "modulation"):
        assert f">{kind} (agree)</th>" in text
    total = re.search(r" ([\d,]+) trainable parameters", text)
    assert total and 1_990_000 < int(total[1].replace(",", "")) <= 2_000_000
    assert "--params 2000000 " in text and "attention twice" not in text


def test_nothing_in_the_page_asks_a_network(text: str) -> None:
    for tag, attributes in tags(text):
        assert tag not in ("iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,"
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert "{{" not in text.partition("<script type")[0]
    assert len(text.encode()) < 2_000_000


def nasty_run(folder: Path, number: int = 1) -> Run:
    """A run whose every string wants to be HTML."""
    what = manifest(
        {"image": (NASTY, *(f"b.{i}" for i in range(9)))},
        readings=("last",),
        family=NASTY,
        flavour=NASTY,
        model_class=f"{NASTY}{number}",
        versions={NASTY: f"{NASTY}{number}"},
        settings={NASTY: [NASTY, number]},
    )
    random = np.random.default_rng(number)
    distance_NL = (number + random.random((400, 10))).astype(np.float32) / 10
    distance_NL[:, 0] = 0.001 * distance_NL[:, 0]
    distances = {("image", "last"): distance_NL}
    write_rows(folder, what, rows(random.random(400), distances, {"backend": [NASTY] * 400}))
    return load(folder)


def assert_escaped(text: str, plain: str) -> None:
    assert [tag for tag, _ in tags(text)].count("script") == [tag for tag, _ in tags(plain)].count("script") == 2
    assert "img" not in [tag for tag, _ in tags(text)]
    assert not any(name.startswith("on") for _, attributes in tags(text) for name in attributes)
    assert data(text)["blocks"][0] == NASTY  # type: ignore[index]


def test_every_string_of_a_run_is_escaped(tmp_path: Path, text: str) -> None:
    assert_escaped(report(nasty_run(tmp_path / "run")), text)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (("image",), "the image stream clipped at percentile 90 of its cells, averaged over sigma"),
        (("image", "text"), "image weighted 2/3 and text 1/3"),
        (("image", "audio", "text"), "image and audio weighted 2/3 and text 1/3"),
        (("image", "audio"), "image and audio weighted 2/3, averaged"),
    ],
)
def test_the_page_names_the_weights_that_were_used(streams: tuple[str, ...], said: str, tmp_path: Path) -> None:
    blocks = {name: tuple(f"b.{i}" for i in range(10)) for name in streams}
    write_run(tmp_path / "run", blocks, 400)
    assert said in report(load(tmp_path / "run"))


def test_a_command_stands_only_where_it_would_work(tmp_path: Path, text: str) -> None:
    weighs = "--direction more-change-more-capacity --tokens last "
    for name, options in (("equal", ""), ("weighted", weighs)):
        assert re.search(rf"--params \d+ {options}--out {name}.json</pre>", text)
    blocks = {"image": tuple(f"transformer_blocks.{i}" for i in range(6))}
    without = report(load(write_run(tmp_path / "without", blocks, 50).path))
    assert "The run has no module table" in without and "class='command'" not in without
    assert without.count(">unknown</td>") == 2 * 6
    known = write_run(tmp_path / "known", blocks, 50, modules=sd3_modules(6)).path
    (known / "config.json").write_text("{}")
    assert "--direction more-change-less-capacity --tokens last --env reversed</pre>" in report(load(known))
    assert "more-capacity --env weighted</pre>" in report(load(known), "mean")


def test_a_run_of_one_or_two_samples_still_gives_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "one", SD35_LARGE, 1, files=1)
    text = report(load(tmp_path / "one"))
    assert "of the image and text streams, seen in 1 sample." in text
    assert text.count("<summary>Nothing of: ") == 1 and text.count(", every stream: ") >= 5
    what = manifest({"image": ("b.0", "b.1")}, readings=("last",))
    write_rows(tmp_path / "two", what, rows([0.5, 0.6], {("image", "last"): np.full((2, 2), 0.1, np.float32)}))
    text = report(load(tmp_path / "two"))
    assert "not enough samples" in text and "same contribution" in text and "class='command'" not in text


# In the browser


@pytest.fixture
def file(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(text)
    return path


def assert_clean(tab: chromium.Page) -> None:
    assert not tab.problems
    assert all(url.startswith(("file:", "data:")) for url in tab.asked), tab.asked


def assert_fits(tab: chromium.Page, file: Path, width: int, dark: bool, picture: Path) -> None:
    """The page is no wider than the window, and no error is told."""
    tab.open(file, width=width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll,.wide,.said') && "
    assert tab.value(outside + "e.getBoundingClientRect().right > innerWidth + 1).length") == 0
    assert tab.picture(picture).stat().st_size > 20_000
    assert_clean(tab)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(tab: chromium.Page, file: Path, width: int, dark: bool) -> None:
    name = f"report-{'desktop' if width > 600 else 'phone'}{'-dark' if dark else ''}.png"
    assert_fits(tab, file, width, dark, artefact(name))


def pointed_at(tab: chromium.Page, stream: str, block: int) -> str:
    """What the page says when the pointer is on this one of 38 blocks, in the noisiest part of sigma."""
    canvas = f"document.querySelector('#map-{stream} canvas[tabindex]')"
    tab.value(canvas + ".scrollIntoView({block: 'center'})")
    left, top, width = tab.value(
        f"(() => {{const r = {canvas}.getBoundingClientRect(); return [r.left, r.top, r.width];}})()"
    )
    tab.point(left + width * (block + 0.5) / 38, top + 11)
    said: str = tab.value("document.getElementById('tip').innerText")
    return said


@needs_browser
def test_hover_keys_and_links_name_the_cell(tab: chromium.Page, file: Path, large: Run) -> None:
    tab.open(file)
    said, heatmap = pointed_at(tab, "image", 5), large.heatmap("image")
    assert "5: transformer_blocks.5" in said and "sigma 0.900 to 1.00" in said and "95% interval" in said
    assert f"mean {heatmap.values_TL[9, 5]:.3g}" in said and f"{heatmap.counts_T[9]:,} samples" in said
    tab.value("document.querySelector('#map-text canvas[tabindex]').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        tab.press(key)
    heard = tab.value("document.getElementById('said-text').textContent")
    assert "1: transformer_blocks.1, sigma 0.100 to 0.200" in heard
    tab.value("document.querySelector('a[data-map=text][data-first=\"31\"]').click()")
    assert tab.value("document.activeElement.closest('figure').id") == "map-text"
    assert_clean(tab)


@needs_browser
def test_strings_of_a_run_stay_strings(tab: chromium.Page, tmp_path: Path) -> None:
    path = tmp_path / "nasty.html"
    path.write_text(report(nasty_run(tmp_path / "run")))
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
    for _ in range(20):
        tab.press("Tab")
        outline = "getComputedStyle(e.closest('label') || e).outlineStyle"
        reached.append(
            tab.value(f"(() => {{const e = document.activeElement; return [e.tagName, e.name || '', {outline}];}})()")
        )
    assert "scale" in [name for _, name, _ in reached]
    canvases = [outline for tag, _, outline in reached if tag == "CANVAS"]
    assert "reading" in [name for _, name, _ in reached]
    assert len(canvases) == 3 and all(outline != "none" for _, _, outline in reached), reached
    assert_clean(tab)


@needs_browser
def test_a_thousand_blocks_stay_usable(tab: chromium.Page, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"image": tuple(f"b.{i}" for i in range(1000))}, 300, readings=("last",))
    path = tmp_path / "report.html"
    path.write_text(report(load(tmp_path / "run")))
    tab.open(path, width=380)
    assert tab.value("document.documentElement.scrollWidth") <= 380
    assert tab.value("document.querySelector('#map-image canvas[tabindex]').clientWidth / 1000") >= 4
    assert_clean(tab)


@needs_browser
def test_the_other_reading_is_a_click_away_and_a_link_comes_back(tab: chromium.Page, file: Path, large: Run) -> None:
    tab.open(file)
    shown = "[...document.querySelectorAll('.of-last, .of-mean')].filter(e => e.offsetHeight).map(e => e.className)"
    assert set(tab.value(shown)) == {"of-last"}
    tab.value("document.querySelector('input[name=reading][value=mean]').click()")
    assert set(tab.value(shown)) == {"of-mean"}
    said = pointed_at(tab, "image-mean", 5)
    assert f"mean {large.heatmap('image', 'mean').values_TL[9, 5]:.3g}" in said
    tab.value("document.querySelector('a[data-map=text][data-first=\"31\"]').click()")
    assert set(tab.value(shown)) == {"of-last"}
    assert tab.value("document.activeElement.closest('figure').id") == "map-text"
    assert_clean(tab)


@needs_browser
@pytest.mark.parametrize("width", [1280, 380])
def test_nothing_is_cut_and_all_blocks_of_flux_are_there(tab: chromium.Page, tmp_path: Path, width: int) -> None:
    modules = sd3_modules(57)
    renamed = [
        replace(module, name=module.name.replace(f"transformer_blocks.{i}.", f"single_transformer_blocks.{i - 19}."))
        for module in modules
        for i in range(19, 57)
        if module.name.startswith(f"transformer_blocks.{i}.")
    ]
    kept = [
        module for module in modules if module.name.startswith(tuple(f"transformer_blocks.{i}." for i in range(19)))
    ]
    targets = tuple(
        Target(f"{name}.*", ("ff*", "norm*"), ("*",)) for name in ("transformer_blocks", "single_transformer_blocks")
    )
    write_run(tmp_path / "run", FLUX_DEV, 600, modules=[*kept, *renamed], images=60, targets=targets)
    path = tmp_path / "report.html"
    path.write_text(report(load(tmp_path / "run")))
    tab.open(path, width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    cut = "e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != 'visible'"
    cut += " || e.scrollHeight > e.clientHeight + 1 && getComputedStyle(e).overflowY == 'auto'"
    assert tab.value(f"[...document.querySelectorAll('main *:not(.said), nav *')].filter(e => {cut}).length") == 0
    assert tab.value("document.querySelectorAll('.of-last .bars > div').length") == 57
    assert tab.value("[...document.querySelectorAll('.of-last tbody tr')].filter(e => e.offsetHeight > 9).length") == 57
    right = tab.value("document.querySelector('.of-last .bars > div:last-child').getBoundingClientRect().right")
    assert right <= width and tab.picture(artefact(f"report-flux-{width}.png")).stat().st_size > 20_000
    assert_clean(tab)
