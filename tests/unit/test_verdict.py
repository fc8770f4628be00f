"""The verdict: five lines that every place says alike, held to numbers worked out by hand."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, Result
from synthetic_run import manifest, rows, sd3_modules, write_rows, write_run

from simpletuner_layerprobe import Run, load, plan
from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap
from simpletuner_layerprobe.api.verdict import verdict
from simpletuner_layerprobe.lokr.plan import make_plan

Command = Callable[..., Result]
BUDGET = 60_000


def run_of(folder: Path, level_L: list[float], images: int = 40, samples: int = 400) -> Run:
    """Blocks that turn the states by these levels, with 10% of it between images."""
    random = np.random.default_rng(5)
    image_N = np.arange(samples) % images + 1
    factor_N = 1 + 0.1 * random.standard_normal(images)[image_N - 1] + 0.1 * random.standard_normal(samples)
    noise_NL = 1 + 0.05 * random.standard_normal((samples, len(level_L)))
    distances = {("image", "mean"): factor_N[:, None] * noise_NL * np.array(level_L)}
    what = manifest({"image": TINY["image"]}, readings=("mean",), modules=sd3_modules(6))
    write_rows(folder, what, rows((np.arange(samples) + 0.5) / samples, distances, {"image": image_N}))
    return load(folder)


def test_every_place_has_the_same_lines(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    made = verdict(load(tiny_run))
    assert list(made.lines) == ["enough", "blocks", "capacity", "weighting", "now"]
    status, findings = layerprobe("status", tiny_run).out, layerprobe("findings", tiny_run).out
    assert layerprobe("report", tiny_run, "--out", tmp_path / "page.html").code == 0
    page = unescape((tmp_path / "page.html").read_text())
    for sentence in made.lines.values():
        assert f"{sentence}.\n" in status and f"{sentence}.\n" in findings
        assert f"{sentence[0].upper()}{sentence[1:]}.</dd>" in page
    for command in made.commands.values():
        assert f"{command}\n" in status and f"<pre>{command}</pre>" in page
    assert page.index("id='verdict'") < page.index("id='heatmaps'") < page.index("id='findings'")


def test_a_command_that_is_too_wide_goes_on_behind_a_backslash(
    layerprobe: Command, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = verdict(load(tiny_run)).commands
    monkeypatch.setenv("COLUMNS", "80")
    odd = tiny_run.parent / "a  --b it's"
    tiny_run.rename(odd)
    said = layerprobe("status", odd, keep_columns=True).out.partition("\n  equal     ")[2]
    assert said.count(" \\\n") >= 3
    typed = [shlex.split(line) for line in said.replace("\\\n", "").splitlines()]
    whole = [shlex.split(line) for line in commands.values()]
    assert typed[0] == [*whole[0][:2], str(odd), *whole[0][3:]]
    assert [line[1:] for line in typed[1:3]] == [[*line[:2], str(odd), *line[3:]] for line in whole[1:]]


def test_its_commands_make_three_plans_of_one_size(layerprobe: Command, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [0.1, 0.3, 0.2, 0.05, 0.4, 0.15])
    directions = set()
    for command in verdict(run, preset=str(BUDGET)).commands.values():
        told = layerprobe(*command.split()[1:-2], "--json").json
        assert told["budget"]["parameters"] == BUDGET and abs(told["budget"]["gap"]) < 0.005 * BUDGET
        directions.add(told["budget"]["direction"])
    assert directions == {"uniform", "more-change-more-capacity", "more-change-less-capacity"}


def test_the_size_is_that_of_the_runs_own_config_where_it_is_known(layerprobe: Command, tiny_run: Path) -> None:
    unknown = verdict(load(tiny_run))
    assert "the article's plan: " in unknown.lines["enough"]
    assert "what your own config trains is not known; it is the article's recipe's size" in unknown.lines["capacity"]
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    own = {"model_type": "lora", "lora_type": "standard", "lora_rank": 8, "lora_target_modules": targets}
    (tiny_run / "training.json").write_text(json.dumps(own))
    run = load(tiny_run)
    size, article = run.own.parameters, plan(run, preset="article").parameters
    made = verdict(run)
    assert "a weighted plan of your config's size: " in made.lines["enough"]
    assert made.lines["capacity"].startswith(f"plans of {size:,} parameters (")
    said = f"as many as your own config trains; the article's recipe would make {article:,}, {article / size:.3g} times"
    assert made.lines["capacity"].endswith(said)
    assert not any("--params" in command or "--tokens" in command for command in made.commands.values())
    assert made.commands["equal"] == f"layerprobe lokr {tiny_run.parent} --env equal"
    told = [layerprobe(*shlex.split(command)[1:-2], "--json").json["budget"] for command in made.commands.values()]
    assert [told["parameters"] for told in told] == [size] * 3
    assert [told["direction"] for told in told][::2] == ["uniform", "more-change-less-capacity"]
    asked_for = verdict(run, preset=str(BUDGET)).commands.values()
    assert all(f"--params {BUDGET} " in command for command in asked_for)
    asked = verdict(run, preset=str(BUDGET)).lines["capacity"]
    assert f"your own config trains {size:,}: {BUDGET / size:.3g} times" in asked
    shown = layerprobe("report", tiny_run)
    page = (tiny_run / "report.html").read_text()
    assert shown.code == 0 and "value='mean' checked" in page and "A weighted plan of your config" in page


def test_strong_and_weak_blocks_and_how_often_the_replicates_agree(tmp_path: Path) -> None:
    clear = run_of(tmp_path / "clear", [0.1, 0.3, 0.2, 0.05, 0.4, 0.15])
    assert "most by blocks 4 and 1 (100%), least by blocks 3 and 0 (100%)" in verdict(clear).lines["blocks"]
    close = run_of(tmp_path / "close", [0.4, 0.2, 0.2, 0.2, 0.1, 0.2], images=20, samples=100)
    share = re.search(r"most by blocks 0 and \d \((\d+)%\)", verdict(close).lines["blocks"])
    assert share and int(share[1]) < 95


def test_whether_a_weighting_is_another_plan_is_what_the_replicates_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bootstrap, "of", partial(Bootstrap.of, replicates=100))
    run = run_of(tmp_path / "run", [0.1, 0.3, 0.2, 0.05, 0.4, 0.19])
    equal = plan(run, params=BUDGET)
    bootstrap, sides = Bootstrap.of(run.samples_in("mean")), []
    for mean_TL in bootstrap.replicates()["image"]:
        heatmaps = {"image": Heatmap("image", "mean", TINY["image"], mean_TL, bootstrap.counts_T["image"], mean_TL, 0)}
        contribution = article_contributions(heatmaps)
        made = make_plan(run.manifest, contribution, preset=BUDGET)
        groups = zip(made.groups, made.numbers, equal.numbers, strict=True)
        value_L = contribution.value_L
        sides.append(
            [np.sign(group.parameters("lokr", own) - group.parameters("lokr", other)) for group, own, other in groups]
            + np.sign(value_L - value_L.mean()).tolist()
        )
    share_X = np.maximum((np.array(sides) > 0).mean(axis=0), (np.array(sides) < 0).mean(axis=0))
    clear = [group.number for group, share in zip(equal.groups, share_X[:-6], strict=True) if share >= 0.95]
    expected = sorted({number for number in clear if share_X[number - 6] >= 0.95})
    assert 2 <= len(expected) < 6
    assert list(run.differing(params=BUDGET)) == expected
    assert f"gives {len(expected)} of 6 blocks other factors" in verdict(run, preset=str(BUDGET)).lines["weighting"]


def test_blocks_that_are_alike_and_samples_that_are_few_are_said(tmp_path: Path) -> None:
    few = verdict(run_of(tmp_path / "few", [0.1, 0.3, 0.2, 0.05, 0.4, 0.15], samples=20)).lines
    assert few["weighting"].startswith("not known: too few samples") and "not enough" in few["enough"]
    assert "times" not in few["enough"]


def test_blocks_that_are_all_alike_do_not_differ(tmp_path: Path) -> None:
    """Though every replicate's weighting is another plan than equal factors."""
    runs = [run_of(tmp_path / str(seed), [0.2] * 6, images=10 + seed, samples=200) for seed in range(12)]
    assert sum(bool(run.differing(params=BUDGET)) for run in runs) <= 2
    lines = {verdict(run, preset=str(BUDGET)).lines["weighting"] for run in runs}
    assert (
        "the blocks differ no more than chance would have it: a weighting would only move equal factors by noise"
        in lines
    )


def test_what_cannot_be_said_has_its_reason(tmp_path: Path) -> None:
    bare = verdict(load(write_run(tmp_path / "bare", TINY, 400).path))
    assert "module table" in bare.lines["weighting"] and not bare.commands and "blocks" in bare.lines
    what = manifest({"image": ("a", "b")}, readings=("mean",))
    same = rows([i / 400 for i in range(400)], {("image", "mean"): np.full((400, 2), 0.1)})
    assert "same contribution" in verdict(load(write_rows(tmp_path / "same", what, same).path)).lines["weighting"]
    nan = rows([0.5], {("image", "mean"): np.full((1, 2), np.nan)})
    assert "no plan can be made" in verdict(load(write_rows(tmp_path / "nan", what, nan).path)).lines["enough"]
