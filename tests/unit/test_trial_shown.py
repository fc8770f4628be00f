"""What is shown of a trial: the page, the printed table and the JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import chromium
import numpy as np
import pytest
from test_analyse_trial import GAIN, SHUFFLES, world
from test_report_page import NASTY, assert_fits, needs_browser, tags

from simpletuner_layerprobe.api.judgement import Judgement, TrialFacts, judge, sentences, trial_page
from simpletuner_layerprobe.commands.trial_output import as_json, print_trial
from simpletuner_layerprobe.show.forest import ticks


def shown(seeds: int = 3, names: dict[str, str] | None = None, spread: float = 1.0) -> tuple[TrialFacts, Judgement]:
    """A trial in which the plan is worse and an arm diverged. names: other names of arms."""
    planted = {"plan": 0.03, "bad": 0.0, "uniform_110": -GAIN, **{f"shuffle_{i}": 0.01 * i for i in range(5)}}
    losses, image_P, sigma_P = world(seeds=seeds, **planted)
    losses["bad"][0, 0] = np.nan
    losses = {(names or {}).get(name, name): spread * loss_SP for name, loss_SP in losses.items()}
    made = judge(losses, image_P, sigma_P, shuffles=SHUFFLES)
    facts = TrialFacts(
        parameters={name: 20_000_000 + 2_000_000 * (name == "uniform-110") for name in losses},
        rate=dict.fromkeys(losses, 1e-3),
        tuning={"uniform": {5e-4: 0.61, 1e-3: 0.6, 2e-3: 0.605}, "plan": {5e-4: 0.6, 1e-3: 0.59, 2e-3: float("inf")}},
        steps=800,
        seeds=tuple(range(1, seeds + 1)),
        held_out="faces",
        model="sd3 medium",
    )
    return facts, made


def test_the_table_fits_a_narrow_terminal_and_the_words_follow(capsys: pytest.CaptureFixture[str]) -> None:
    facts, made = shown()
    print_trial(replace(facts, tuning={**facts.tuning, "bad": {1e-3: 0.5, 2e-3: 0.4}}), made)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sd3 medium: 800 steps with seeds 1, 2 and 3"
    assert lines[1] == "judged on 40 images of faces, less loss is better"
    rows = lines[3 : 4 + len(made.arms)]
    assert max(map(len, rows)) <= 80 and rows[0].split()[:2] == ["arm", "parameters"]
    assert rows[1].startswith("uniform-110") and rows[-1].split() == ["bad", "20,000,000", "0.001", "diverged"]
    said = lines[5 + len(made.arms) :]
    assert said == [
        *sentences(made),
        "bad: its best learning rate, 0.002, is the largest tried: a larger one may do better",
    ]


@pytest.mark.parametrize(
    ("spread", "name", "gone"),
    [
        (1.0, "bad", []),
        (1e-2, "bad", ["parameters"]),
        (1e-4, "an-arm-with-a-name", ["parameters", "rate"]),
        (1e-4, "an-arm-with-a-longer-name", ["parameters", "rate", "loss"]),
    ],
)
def test_wide_numbers_and_names_cost_columns_and_not_the_width(
    spread: float, name: str, gone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_trial(*shown(spread=spread, names={"bad": name}))
    rows = capsys.readouterr().out.splitlines()[3:13]
    assert max(map(len, rows)) <= 80
    assert [head for head in ("parameters", "rate", "loss", "against", "verdict") if head not in rows[0]] == gone


def test_json_has_the_numbers_and_no_nan() -> None:
    facts, made = shown()
    told = json.loads(json.dumps(as_json(facts, made), allow_nan=False))
    plan, own = told["arms"]["plan"], made.arms["plan"].difference
    assert own is not None
    assert plan["difference"] == own.mean and plan["interval"] == list(own.interval()) and plan["verdict"] == "worse"
    assert plan["tuning"] == {"0.0005": 0.6, "0.001": 0.59, "0.002": None} and plan["tuning_best"] == 1e-3
    assert len(plan["by_sigma"]["low"]) == told["bins"] == 10 and told["samples_by_sigma"] == [40] * 10
    bad = told["arms"]["bad"]
    assert bad["loss"] is bad["difference"] is bad["p"] is bad["by_sigma"] is None and bad["verdict"] == "diverged"
    assert told["place"]["of"] == 5 and told["margin"] == made.margin and told["sentences"] == sentences(made)
    alone = as_json(*shown(seeds=1))
    assert alone["arms"]["plan"]["interval"] == [None, None] and alone["margin"] is None
    json.dumps(alone, allow_nan=False)


def test_the_page_has_the_answer_the_arms_and_the_rates() -> None:
    facts, made = shown()
    text = trial_page(facts, made)
    assert "Plan trained worse than uniform" in text and "<strong>worse</strong>" in text
    assert "<strong>diverged</strong>" in text and "<strong>0.59000</strong>" in text
    assert text.count("<g><title>") == len(made.arms) - 2  # neither the reference nor what diverged has a mark
    without = trial_page(replace(facts, tuning={}, rate=dict.fromkeys(made.arms)), made)
    assert "Learning rates" not in without


def test_every_string_is_escaped() -> None:
    facts, made = shown(names={"plan": NASTY, "bad": f"{NASTY}2"})
    nasty = replace(facts, model=NASTY, held_out=NASTY, tuning={NASTY: {1e-3: 0.5, 2e-3: 0.4}})
    written = tags(trial_page(nasty, replace(made, plan=NASTY)))
    assert [tag for tag, _ in written].count("script") == 2 and "img" not in [tag for tag, _ in written]
    assert not any(name.startswith("on") for _, attributes in written for name in attributes)


@pytest.mark.parametrize("seeds", [1, 2])
def test_little_or_nothing_known_still_gives_a_page(seeds: int, capsys: pytest.CaptureFixture[str]) -> None:
    facts, made = shown(seeds=seeds)
    assert "sd3 medium" in trial_page(facts, made)
    losses, image_P, sigma_P = world(plan=0.0)
    losses["uniform"][:] = np.inf
    broken = judge(losses, image_P, sigma_P)
    text = trial_page(facts, broken)
    assert "Uniform diverged" in text and "No arm can be set beside the reference" in text
    print_trial(facts, broken)
    assert "uniform diverged: there is nothing to judge" in capsys.readouterr().out
    losses["uniform"] = losses["plan"].copy()
    assert "Whether plan trains" in trial_page(facts, judge(losses, image_P, sigma_P))


@pytest.mark.parametrize(("low", "high"), [(-0.02, 0.013), (-1e-6, 3e-6), (-7.0, 0.1)])
def test_ticks_are_round_and_hold_zero(low: float, high: float) -> None:
    made = ticks(low, high)
    assert 0 in made and 2 <= len(made) <= 7 and low <= min(made) and max(made) <= high


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False), (380, True)])
def test_nothing_overflows_and_nothing_complains(tab: chromium.Page, tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "trial.html"
    path.write_text(trial_page(*shown(names={"bad": "an-arm-with-quite-a-long-name"})))
    assert_fits(tab, path, width, dark, path.with_suffix(".png"))
