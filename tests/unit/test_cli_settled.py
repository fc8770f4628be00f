"""One answer to "is this factor settled": every command gives it for the same run, reading and plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, Result
from synthetic_run import manifest, rows, sd3_modules, write_ablated_run, write_rows, write_run

import simpletuner_layerprobe as layerprobe_api
from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap
from simpletuner_layerprobe.lokr.plan import make_plan

Command = Callable[..., Result]
SAID = re.compile(r"(\d+) of (\d+) factors? settled for (?:these images|images like these \d+)[^();.\n]*")


def settled(text: str) -> str:
    """The sentence that says how many factors are settled."""
    match = SAID.search(unescape(text))
    assert match, text
    return match[0].strip()


def replicates_of(run: layerprobe_api.Run, reading: str = "last") -> list[bool]:
    """Which factors are settled, worked out replicate by replicate with the planner itself, for the recipe."""

    def realised(heatmaps: dict[str, Heatmap]) -> list[tuple[object, ...]]:
        made = make_plan(run.manifest, article_contributions(heatmaps), preset="article")
        adapters = [(group.number, [made.intended[m.name].tensors for m in group.modules]) for group in made.groups]
        return [tuple(str(a) for number, a in adapters if number == block) for block in range(len(made.blocks))]

    bootstrap = Bootstrap.of(run.samples_in(reading), bins=10, replicates=400)
    own = realised(run.heatmaps(reading))
    agreed = np.zeros(len(own))
    for r in range(400):
        heatmaps = {
            name: Heatmap(name, reading, bootstrap.blocks[name], mean_RTL[r], bootstrap.counts_T[name], mean_RTL[r], 0)
            for name, mean_RTL in bootstrap.replicates().items()
        }
        agreed += [one == other for one, other in zip(realised(heatmaps), own, strict=True)]
    return (agreed / 400 >= 0.95).tolist()


@pytest.mark.parametrize(
    ("images", "preset", "tokens"),
    [(40, "article", "last"), (0, "article", "mean"), (40, "60k", "mean"), (0, "60k", "last")],
)
def test_every_command_says_the_same(
    layerprobe: Command, tmp_path: Path, images: int, preset: str, tokens: str
) -> None:
    path = write_run(tmp_path / "run", TINY, 400, modules=sd3_modules(6), images=images, seed=1).path
    goal = ("--preset", "article") if preset == "article" else ("--params", preset)
    told = layerprobe("lokr", path, *goal, "--tokens", tokens, "--json").json
    said = settled(told["settled"])
    assert settled(layerprobe("lokr", path, *goal, "--tokens", tokens).out) == said
    for bins in ("10", "5"):  # of what is shown; the plan has those of the recipe
        assert settled(layerprobe("status", path, "--preset", preset, "--tokens", tokens, "--bins", bins).out) == said
    compared = layerprobe("compare", path, path, "--preset", preset, "--tokens", tokens).out
    assert settled(compared.partition("\n  A: ")[2]) == settled(compared.partition("\n  B: ")[2]) == said
    page = tmp_path / "page.html"
    assert layerprobe("report", path, "--preset", preset, "--tokens", tokens, "--out", page).code == 0
    assert settled(page.read_text()) == said
    run = layerprobe_api.load(path)
    sure = run.confidence(preset=preset, reading=tokens)
    assert settled(sure.text()) == said
    # Block by block: JSON, the table, and the contributions of the API.
    unsettled = {
        number
        for (number, _), yes in zip(run.decided(preset=preset, reading=tokens), sure.settled_K, strict=True)
        if not yes
    }
    assert [block["settled"] for block in told["blocks"]] == [number not in unsettled for number in range(6)]
    assert 0 < len(unsettled) < 6 or preset != "article"
    rows_shown = layerprobe("lokr", path, *goal, "--tokens", tokens).out.splitlines()[1:7]
    assert [("NOT settled" in line) for line in rows_shown] == [number in unsettled for number in range(6)]
    if preset == "article":
        assert run.contributions(tokens).settled.tolist() == sure.settled_K.tolist()
        assert [block["interval"] for block in told["blocks"]] == np.stack([sure.low_L, sure.high_L], axis=1).tolist()


def test_it_is_what_the_plans_of_the_replicates_say(tiny_run: Path) -> None:
    run = layerprobe_api.load(tiny_run)
    expected = replicates_of(run)
    assert run.confidence(preset="article").settled_K.tolist() == expected
    assert 0 < sum(expected) < 6


def test_by_ablation_it_is_what_the_plans_of_the_replicates_say(layerprobe: Command, tmp_path: Path) -> None:
    path = write_ablated_run(
        tmp_path / "run", TINY, 600, [0.3, 0.0, 0.12, 0.01, 0.25, 0.05], spread=0.6, modules=sd3_modules(6)
    ).path
    run = layerprobe_api.load(path)
    expected = replicates_of(run, "ablation")
    assert 0 < sum(expected) < 6
    told = layerprobe("lokr", path, "--preset", "article", "--by", "ablation", "--json").json
    assert [block["settled"] for block in told["blocks"]] == expected
    assert (told["samples"], told["images"]) == (200, 20) and "images like these 20" in told["settled"]
    sure = run.contributions("ablation")
    assert sure.settled.tolist() == expected
    assert [block["interval"] for block in told["blocks"]] == np.stack([sure.low, sure.high], axis=1).tolist()
    # All else goes by the angle, as ever.
    assert run.confidence().samples == run.contributions().confidence.samples == 600
    assert run.contributions().values.tolist() != sure.values.tolist()
    assert settled(status(layerprobe, path)) == settled(run.confidence().text())


def status(layerprobe: Command, path: Path, *options: str) -> str:
    shown = layerprobe("status", path, *options)
    assert (shown.code, shown.err) == (0, "")
    (line,) = (line for line in shown.out.splitlines() if line.startswith("enough "))
    return line.split(None, 1)[1]


def test_status_judges_the_preset_asked_for_and_else_the_runs_own(layerprobe: Command, tiny_run: Path) -> None:
    articles = "all of the article's plan: "
    assert "of 6 factors settled" in status(layerprobe, tiny_run) and articles in status(layerprobe, tiny_run)
    assert "of 18 factors settled" in status(layerprobe, tiny_run, "--preset", "120kB")
    (tiny_run / "config.json").write_text(json.dumps({"--layerprobe_preset": "60k"}))
    assert "a weighted plan of 60k: " in status(layerprobe, tiny_run)
    assert articles in status(layerprobe, tiny_run, "--preset", "article")
    (tiny_run / "config.json").write_text(json.dumps({"layerprobe_preset": "much"}))
    assert articles in status(layerprobe, tiny_run)


def test_status_says_how_many_images_would_settle_all(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    assert re.search(r"; settling all would take about \d+ times the images\.$", status(layerprobe, tiny_run))
    many = write_run(tmp_path / "long", TINY, 60_000, seed=1, modules=sd3_modules(6)).path
    assert "samples, enough for the article's plan: 6 of 6 factors settled for these images: " in status(
        layerprobe, many
    )
    few = write_run(tmp_path / "short", TINY, 20).path
    assert "not enough for all of the article's plan: 0 of 6 factors settled" in status(layerprobe, few)
    what = manifest({"image": ("a", "b")}, readings=("mean",))
    alike = rows([i / 400 for i in range(400)], {("image", "mean"): np.full((400, 2), 0.1)})
    assert status(layerprobe, write_rows(tmp_path / "alike", what, alike).path).startswith(
        "400 samples, enough for the article's plan: 2 of 2"
    )
