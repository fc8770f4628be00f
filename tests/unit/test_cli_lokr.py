"""`layerprobe lokr` and `check-config`: recipes, budgets, ranks, what is written and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, Result, assert_one_line, snapshot
from failing import fails
from safetensors.numpy import save_file
from synthetic_run import SD35_LARGE, manifest, records, rows, sd3_modules, write_ablated_run, write_rows, write_run

import simpletuner_layerprobe as layerprobe_api
from simpletuner_layerprobe.lokr.plan import Plan
from simpletuner_layerprobe.run.load import RunData

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning"),
    pytest.mark.usefixtures("diffusers_classes"),
]

Command = Callable[..., Result]

ARTICLE = ("--preset", "article")


def built(config: Path | dict[str, Any], run: Path) -> int:
    """The trainable parameters that LyCORIS makes of a config on a run's model."""
    check = layerprobe_api.check_config(config, layerprobe_api.load(run))
    check.require()
    return check.parameters


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the form that the article published: whole blocks by class name, then the names."""
    config["apply_preset"]["target_module"] = ["JointTransformerBlock"]
    return config


def factors_in(path: Path) -> list[int]:
    """The factor of each block's feed-forward in a written config, in the order of the blocks."""
    patterns = json.loads(path.read_text())["apply_preset"]["name_algo_map"]
    return [settings["factor"] for pattern, settings in patterns.items() if pattern.endswith(".ff*")]


# The article's recipe


def notebook_factors(run: RunData, critical: tuple[int, ...]) -> list[int]:
    """The article's notebook, line by line: records to factors."""
    sums: dict[str, Any] = {"encoder_hidden_states": np.zeros((10, 37)), "hidden_states": np.zeros((10, 38))}
    counts = np.zeros(10)
    for one in records(run, "last"):
        t = min(int(one["timestep"] * 10), 9)
        counts[t] += 1
        for key, table in sums.items():
            table[t] += one[key]
    text, image = (
        np.minimum(table / counts[:, None], np.percentile(table / counts[:, None], 90)) for table in sums.values()
    )
    combined = ((text * (1 / 3) + image[:, :37] * (2 / 3)) / 2).mean(axis=0)
    inverted = 1 - (combined - combined.min()) / (combined.max() - combined.min())
    factors = np.clip(np.round(inverted * 11 + 1), 1, 12).astype(int).tolist()
    return [1 if i in critical else factors[min(i, 36)] for i in range(38)]


def test_the_articles_factors_are_written(layerprobe: Command, tmp_path: Path) -> None:
    peaks = [("image", 0), ("text", 0), ("text", 31), ("image", 35)]
    run = write_run(tmp_path / "run", SD35_LARGE, 300, peaks=peaks, modules=sd3_modules(38))
    expected = notebook_factors(run, (0, 31, 35))
    for critical in ("0,31,35", "auto"):
        out = tmp_path / f"{critical}.json"
        shown = layerprobe("lokr", run.path, "--preset", "article", "--critical", critical, "--out", out)
        assert (shown.code, shown.err) == (0, "")
        assert factors_in(out) == expected
        table = [line.split() for line in shown.out.splitlines()[1:39]]
        assert [int(row[0]) for row in table] == list(range(38))
        assert [int(row[6]) for row in table] == expected
    assert shown.out.splitlines()[32].endswith("critical (text)")
    assert shown.out.splitlines()[1].endswith("critical (image, text)")
    assert "contribution of the nearest block" in shown.out.splitlines()[38]
    assert layerprobe("lokr", run.path, *ARTICLE, "--critical", "none", "--json").json["blocks"][0]["critical"] is False


def test_the_parameters_are_those_that_lycoris_makes(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", tiny_run, *ARTICLE, "--contrast", "1", "--out", out)
    assert (shown.code, shown.err) == (0, "")

    # Factor 1 is a full matrix and one number; attention has factor 2: 2 x 2 and 32 x 32.
    def block(norm: int, feed_forward: int) -> int:
        return sum(rows * 64 * 64 + 1 for rows in (6, norm, *[4] * feed_forward)) + 2 * (4 + 32 * 32)

    expected = [block(6, 3)] * 5 + [block(2, 2)]
    lines = shown.out.splitlines()
    assert [int(line.split()[8].replace(",", "")) for line in lines[1:7]] == expected
    assert f"{sum(expected):,}" in lines[7] and lines[7].endswith("MB in bf16")
    assert lines[8] == "by       angle of the last token; 400 samples of 40 images"
    assert "feed-forward and modulation get the factor, attention twice the factor" in lines[9]
    assert "settled for images like these 40" in lines[10]
    assert "verified: LyCORIS" in lines[11] and "all 41 modules" in lines[11]
    assert lines[-2] == f"written: {out}"
    assert lines[-1].startswith(f'next: set "lycoris_config": "{out}"')


def test_json_is_all_that_is_printed(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "lycoris_config.json"
    for arguments in (("--params", "60k", "--per-stream"), ("--preset", "article")):
        told = layerprobe("lokr", tiny_run, *arguments, "--json", "--out", out, "--force").json
        assert told["config"] == json.loads(out.read_text())
        assert told["written"] == [str(out)]
        assert (told["samples"], told["images"]) == (400, 40)
        assert told["parameters"] == built(told["config"], tiny_run)
        assert [block["number"] for block in told["blocks"]] == list(range(6))
        assert sum(block["parameters"] for block in told["blocks"]) == told["parameters"]
        for block in told["blocks"]:
            low, high = block["interval"]
            assert 0 <= low <= block["contribution"] <= high <= 1
            assert block["settled"] == (min(block["agreement"].values()) >= 0.95)
    assert told["budget"] is None and told["preset"] == "article"
    assert told["blocks"][3]["factors"] == {"at_factor": 1, "at_double": 2}
    told = layerprobe("lokr", tiny_run, "--params", "60k", "--per-stream", "--json").json
    assert told["budget"]["reached"] == told["parameters"] == 60_000 + told["budget"]["gap"]
    kinds = "image feed-forward, image attention, image modulation, text feed-forward, text modulation"
    assert set(told["blocks"][0]["factors"]) == set(kinds.split(", "))


# What is written, and what is not


def test_an_environment_is_written_and_never_overwritten_unasked(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    shown = layerprobe("lokr", tiny_run, *ARTICLE, "--critical", "none")
    assert shown.code == 0 and shown.out.splitlines()[-1].startswith("nothing written: add --env NAME")
    assert snapshot(tmp_path) == before
    shown = layerprobe("lokr", tiny_run, *ARTICLE, "--env", "weighted")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[-1] == "next: simpletuner train env=weighted"
    folder = tmp_path / "config" / "weighted"
    assert sorted(os.listdir(folder)) == ["config.json", "lycoris_config.json"]
    options = json.loads((folder / "config.json").read_text())
    assert "layerprobe" not in options and options["seed"] == 7 and options["lora_type"] == "lycoris"
    before = snapshot(tmp_path)
    for target in (("--out", folder / "lycoris_config.json"), ("--env", "weighted")):
        other = ("lokr", tiny_run, *ARTICLE, *target, "--contrast", "3")
        assert_one_line(layerprobe(*other), 1, "exists already", "--force")
        assert snapshot(tmp_path) == before
    assert layerprobe(*other, "--force").code == 0
    assert max(factors_in(folder / "lycoris_config.json")) == 3


def test_what_cannot_be_written_is_said_before_the_proof(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "config" / "taken").mkdir(parents=True)
    (tmp_path / "config" / "taken" / "config.toml").write_text("seed = 1")
    code = (
        "import sys; from simpletuner_layerprobe.cli import main\n"
        "for target in (['--out', 'mine.json'], ['--env', 'taken'], ['--env', 'a.b']):\n"
        "    print(main(['lokr', sys.argv[1], '--preset', 'article', *target]), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_run)]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "1 False\n" * 3 and shown.stderr.count("\n") == 3, shown


def test_a_config_that_lycoris_builds_otherwise_is_an_error_and_not_a_file(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    right = Plan.config
    monkeypatch.setattr(Plan, "config", lambda plan: as_published(right(plan)))
    before = snapshot(tmp_path)
    for target in (("--out", tmp_path / "out.json"), ("--env", "x")):
        assert_one_line(layerprobe("lokr", tiny_run, *ARTICLE, *target), 1, "modules otherwise than meant")
    assert snapshot(tmp_path) == before


def test_a_run_that_does_not_know_its_model_cannot_be_planned(layerprobe: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TINY, 100, modules=(), images=20).path
    before = snapshot(tmp_path)
    for arguments in (ARTICLE, ("--params", "1M")):
        assert_one_line(
            layerprobe("lokr", run, *arguments, "--out", tmp_path / "out.json"), 1, "no module table", "--model"
        )
    assert snapshot(tmp_path) == before
    shown = layerprobe("lokr", run, *ARTICLE)
    lines = shown.out.splitlines()
    factors = layerprobe_api.load(run).confidence(preset="article").factor_K.tolist()
    assert (shown.code, shown.err) == (0, "")
    assert [line.split()[6] for line in lines[1:7]] == [str(factor) for factor in factors]
    assert lines[-1].startswith("not verified, parameters unknown: the run has no module table;")
    for arguments in (
        (*ARTICLE, "--json"),
        (*ARTICLE, "--freeze", "1"),
        (*ARTICLE, "--algo", "loha"),
        ("--params", "1M"),
    ):
        assert_one_line(layerprobe("lokr", run, *arguments), 1, "no module table", "--model")
    known = write_run(tmp_path / "known", TINY, 100, modules=sd3_modules(6)).path
    assert_one_line(layerprobe("lokr", known, *ARTICLE, "--env", "weighted"), 1, "config.json does not exist", "--out")


# A budget


def test_a_plan_far_from_the_budget_is_written_only_if_it_is_asked_for(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lycoris.json"
    before = snapshot(tmp_path)
    for params in ("1", "1KiB", "1B"):
        shown = layerprobe("lokr", tiny_run, "--params", params, "--out", path)
        assert_one_line(shown, 1, "nothing is written: the budget is", "plan of this kind has", "--closest")
        assert_one_line(layerprobe("lokr", tiny_run, "--params", params, "--env", "new"), 1, "--closest")
    assert snapshot(tmp_path) == before
    shown = layerprobe("lokr", tiny_run, "--params", "1")
    assert shown.code == 0 and shown.err.startswith("layerprobe: warning: the config has 10,688 parameters")
    assert layerprobe("lokr", tiny_run, "--params", "1", "--closest", "--out", path).code == 0
    assert built(path, tiny_run) == 10_688


def test_keys_written_twice_in_the_config_of_a_budget_are_said(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", path).code == 0
    path.write_text(path.read_text().replace('"algo": "lokr"', '"algo": "loha", "algo": "lokr"'))
    shown = layerprobe("lokr", tiny_run, "--params", path)
    assert "algo is written more than once; the last counts" in shown.err


def test_a_budget_is_kept_and_the_config_is_what_was_counted(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    configs = []
    for budget in ("60k", "0.06M", "120kB"):
        out = tmp_path / f"{budget}.json"
        shown = layerprobe("lokr", tiny_run, "--params", budget, "--out", out)
        assert (shown.code, shown.err) == (0, "")
        configs.append(out.read_bytes())
    reached = built(out, tiny_run)
    assert 60_000 * 0.999 <= reached <= 60_000
    assert "budget   60,000 parameters" in shown.out and f"{reached:,}  " in shown.out
    assert "bound    reached within 0.1%" in shown.out
    assert "verified: LyCORIS" in shown.out and f"written: {out}" in shown.out
    assert len(set(configs)) == 1


def test_as_many_as_another_config_in_every_direction(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    like = tmp_path / "like.json"
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", like).code == 0
    parameters = built(like, tiny_run)
    configs = []
    for direction in ("more-change-more-capacity", "more-change-less-capacity", "uniform"):
        out = tmp_path / f"{direction}.json"
        assert layerprobe("lokr", tiny_run, "--params", like, "--direction", direction, "--out", out).code == 0
        configs.append(out.read_bytes())
        assert parameters * 0.999 <= built(out, tiny_run) <= parameters
    assert len(set(configs)) == 3
    like.write_text(like.read_text().replace("transformer_blocks", "other"))
    assert_one_line(layerprobe("lokr", tiny_run, "--params", like), 1, str(like), "no budget to match")


def test_a_budget_is_split_equally_unless_something_weighs(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    """docs/study-weighting.md: nothing measured beats equal factors."""

    def made(*options: str) -> tuple[bytes, str]:
        out = tmp_path / "config.json"
        shown = layerprobe("lokr", tiny_run, "--params", "60k", "--out", out, "--force", *options)
        assert shown.code == 0, shown.err
        (split,) = [line for line in shown.out.splitlines() if line.startswith("split ")]
        return out.read_bytes(), split

    equal, weighted = made("--direction", "uniform"), made("--direction", "more-change-more-capacity")
    said = [layerprobe("lokr", tiny_run, "--params", "60k", *more).out for more in ((), ("--contrast", "12"))]
    assert [("settled for" in out, "\nby " in out, "95% interval" in out) for out in said] == [
        (False,) * 3,
        (True,) * 3,
    ]
    assert made() == equal != weighted
    assert "no weighting of blocks was seen to beat them" in equal[1] and "layerprobe trial" in weighted[1]
    assert made("--contrast", "12") == made("--tokens", "mean") == weighted
    assert made("--per-stream")[1] == weighted[1]
    run = layerprobe_api.load(tiny_run)
    plans = [layerprobe_api.plan(run, params=60_000, **asked) for asked in ({}, {"direction": "uniform"})]
    assert plans[0].config() == plans[1].config()
    # Whether a run is enough is asked of the weighted plan: equal factors never need any samples.
    assert run.confidence(params=60_000).settled and not run.confidence(params=60_000, contrast=12).settled
    status = layerprobe("status", tiny_run, "--preset", "60k").out
    assert run.confidence(params=60_000, contrast=12).text() in status


def test_blocks_that_are_frozen_and_blocks_that_are_full(layerprobe: Command, tiny_run: Path) -> None:
    options = ("--params", "200k", "--freeze", "0,4-5", "--critical", "1", "--contrast", "2")
    told = json.loads(layerprobe("lokr", tiny_run, *options, "--json").out)
    factors = [set(block["factors"].values()) for block in told["blocks"]]
    assert factors[0] == factors[4] == factors[5] == set() and factors[1] == {1}
    assert [block["settled"] for block in told["blocks"]][:2] == [None, True]
    names = told["config"]["apply_preset"]["name_algo_map"]
    assert {name.split(".")[1] for name in names} == {"1", "2", "3"}
    table = layerprobe("lokr", tiny_run, "--params", "60k", "--freeze", "2").out.splitlines()
    assert table[3].endswith("frozen") and table[3].split()[3:6] == ["-"] * 3


def test_the_runs_own_preset_is_planned_unless_another_is_named(layerprobe: Command, tiny_run: Path) -> None:
    (tiny_run / "config.json").write_text(json.dumps({"--layerprobe_preset": "60k"}))
    assert layerprobe("lokr", tiny_run, "--json").json["budget"]["parameters"] == 60_000
    assert layerprobe("lokr", tiny_run, "--preset", "article", "--json").json["preset"] == "article"
    shown = layerprobe("lokr", tiny_run, "--params", "1B")
    assert shown.code == 0
    assert "the budget is 1,000,000,000: the largest plan of this kind has" in shown.err


# By ablation, and the least needed blocks

NEEDED = (0.3, 0.0, 0.1, 0.002, 0.25, 0.05)
TURNED = (0.05, 0.3, 0.1, 0.2, 0.1, 0.25)


@pytest.fixture
def ablated_run(tmp_path: Path) -> Path:
    """Blocks 0 and 4 are needed most, 1 and 3 idle; the angle says otherwise."""
    return write_ablated_run(
        tmp_path / "ablated", TINY, 900, NEEDED, angles=TURNED, modules=sd3_modules(6), text_share=-1.0
    ).path


def ablation_reference(run: RunData) -> Any:
    """Contributions from the recorded loss increases, sample by sample: negative cells 0, clip, mean, min-max."""
    change_NL = run.distances("block", "ablation").astype(np.float64)
    taken_N = np.isfinite(change_NL[:, 0])
    t_N = np.minimum((run.sigma[taken_N] * 10).astype(int), 9)
    mean_TL = np.stack([change_NL[taken_N][t_N == t].mean(axis=0) for t in range(10)])
    mean_TL[mean_TL < 0] = 0
    average_L = np.minimum(mean_TL, np.percentile(mean_TL, 90)).mean(axis=0)
    return (average_L - average_L.min()) / (average_L.max() - average_L.min())


def test_by_ablation_the_needed_blocks_get_most(layerprobe: Command, ablated_run: Path, tmp_path: Path) -> None:
    reference_L = ablation_reference(layerprobe_api.load(ablated_run).data)
    for goal in (("--preset", "article"), ("--params", "60k"), ("--params", "200k", "--critical", "2")):
        out = tmp_path / "config.json"
        told = layerprobe("lokr", ablated_run, "--by", "ablation", *goal, "--json", "--out", out, "--force").json
        value_L = np.array([block["contribution"] for block in told["blocks"]])
        np.testing.assert_allclose(value_L, reference_L, atol=1e-12)
        parameters = [block["parameters"] for block in told["blocks"]][:5]  # the last block has less to adapt
        assert {0, 4} <= {*np.argsort(parameters)[-3:].tolist()} and {*np.argsort(parameters)[:2].tolist()} == {1, 3}
        assert built(out, ablated_run) == told["parameters"] and told["by"] == "ablation"
        assert all(block["measured"] for block in told["blocks"])
    turned = layerprobe("lokr", ablated_run, "--params", "60k", "--direction", "more-change-less-capacity")
    assert turned.out != layerprobe("lokr", ablated_run, "--params", "60k", "--by", "ablation").out
    plan = layerprobe_api.plan(layerprobe_api.load(ablated_run), reading="ablation", preset="article")
    assert plan.block_factors[0] == 1 and plan.block_factors[1] == 12
    shown = layerprobe("lokr", ablated_run, *ARTICLE, "--by", "ablation").out
    line = "by       ablation, the loss increase with a block left out (a negative one counts as 0); 300 samples of 20"
    assert f"\n{line} images\n" in shown and "settled for images like these 20" in shown


def test_by_angle_is_the_default_and_says_so(layerprobe: Command, ablated_run: Path, tiny_run: Path) -> None:
    for options, said in (((), "angle of the last token"), (("--tokens", "mean"), "angle, mean over the tokens")):
        plain = layerprobe("lokr", ablated_run, *ARTICLE, *options)
        assert f"\nby       {said}; 900 samples of 20 images\n" in plain.out
        assert layerprobe("lokr", ablated_run, *ARTICLE, "--by", "angle", *options).out == plain.out
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--json").json["by"] == "angle"


@pytest.mark.parametrize("algo", ["lokr", "loha", "lora"])
def test_the_least_needed_blocks_are_frozen(layerprobe: Command, ablated_run: Path, tmp_path: Path, algo: str) -> None:
    of = ("lokr", ablated_run, *ARTICLE, "--by", "ablation", "--algo", algo)
    whole, told = layerprobe(*of, "--json").json, layerprobe(*of, "--freeze", "least:2", "--json").json
    assert [block["number"] for block in told["blocks"] if not block["parameters"]] == [1, 3]
    assert told["frozen"] == {
        "blocks": [1, 3],
        "least": [1, 3],
        "least_agreement": 1.0,
        "modules": 14,
        "parameters_without_freezing": whole["parameters"],
    }
    assert whole["frozen"] is None
    gone = sum(whole["blocks"][number]["parameters"] for number in (1, 3))
    assert told["parameters"] == whole["parameters"] - gone
    shown = layerprobe(*of, "--freeze", "least:2").out
    assert (
        f"\nfrozen   blocks 1 and 3: 14 modules without an adapter; {gone:,} parameters fewer than without "
        f"({whole['parameters']:,}); what it saves in time is not measured\n"
        "least    blocks 1 and 3 contribute least; 100% of the replicates name the same\n"
    ) in shown
    assert "gives all 27 modules" in shown
    if algo != "lora":
        out = tmp_path / "config.json"
        assert layerprobe(*of, "--freeze", "least:2", "--out", out).code == 0
        assert built(out, ablated_run) == told["parameters"]
        assert not any(
            name.split(".")[1] in "13" for name in json.loads(out.read_text())["apply_preset"]["name_algo_map"]
        )


def test_least_beside_numbers_with_a_budget_and_by_angle(layerprobe: Command, ablated_run: Path) -> None:
    options = ("--by", "ablation", "--params", "60k", "--freeze", "least:1, 0-1")
    told = layerprobe("lokr", ablated_run, *options, "--json").json
    assert (told["frozen"]["blocks"], told["frozen"]["least"]) == ([0, 1], [1])
    assert abs(told["parameters"] - 60_000) <= 60
    shown = layerprobe("lokr", ablated_run, *options).out
    assert "blocks 0 and 1: 14 modules without an adapter, and the budget goes to the other blocks; " in shown
    assert "\nleast    block 1 contributes least; 100% of" in shown
    assert layerprobe("lokr", ablated_run, *ARTICLE, "--freeze", "least:1", "--json").json["frozen"]["blocks"] == [0]
    by_number = layerprobe("lokr", ablated_run, *ARTICLE, "--freeze", "2").out
    assert "\nfrozen   block 2: 7 modules" in by_number and "\nleast " not in by_number
    of = ("lokr", "--model", "sd35-medium", "--params", "50M", "--freeze", "0")
    told = layerprobe(*of, "--json").json
    assert told["by"] is told["frozen"]["least_agreement"] is None and told["frozen"]["modules"] > 0


def test_a_block_that_cannot_be_adapted_saves_nothing_that_is_known(layerprobe: Command, tmp_path: Path) -> None:
    modules = [module for module in sd3_modules(6) if ".2." not in module.name]
    run = write_run(tmp_path / "run", TINY, 400, modules=modules, images=40).path
    assert_one_line(layerprobe("lokr", run, *ARTICLE), 1, "no linear or conv layer that can be adapted in block")
    assert (
        "\nfrozen   block 2; what it saves in time is not measured\n"
        in layerprobe("lokr", run, *ARTICLE, "--freeze", "2").out
    )


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ("--freeze", "least:0"), "--freeze: 'least:0': expected least:N once, with a whole number from 1"),
        (2, ("--freeze", "least:x"), "--freeze: 'least:x': expected least:N once"),
        (2, ("--freeze", "least"), "--freeze: 'least': expected least:N once"),
        (2, ("--freeze", "least:-1"), "--freeze: 'least:-1': expected least:N once"),
        (2, ("--freeze", "least:1,0,least:2"), "expected least:N once"),
        (2, ("--freeze", "least:1,3-1"), "'3-1' is not a list of block numbers"),
        (2, ("--freeze", "least:1,"), "'' is not a list of block numbers"),
        (2, ("--tokens", "mean"), "--tokens chooses between readings of the angle"),
        (2, ("--by", "loss"), "--by: invalid choice: 'loss'"),
        (1, ("--freeze", "least:99"), "the 99 blocks that contribute least are asked for; there are 6 blocks"),
        (1, ("--freeze", "least:6"), "all blocks are frozen"),
        (1, ("--freeze", "0,2,4-5,least:2"), "all blocks are frozen"),
        (1, ("--freeze", "least:2", "--critical", "0,3"), "block 3 is frozen and critical"),
        (1, ("--params", "60k", "--per-stream"), "plans per stream go by the angle"),
    ],
)
def test_what_least_and_ablation_cannot_do_is_one_line(
    layerprobe: Command, ablated_run: Path, tmp_path: Path, code: int, arguments: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    size = () if "--params" in arguments else ARTICLE
    assert_one_line(layerprobe("lokr", ablated_run, "--by", "ablation", *size, *arguments), code, said)
    assert snapshot(tmp_path) == before


def test_a_run_without_ablation_is_one_line(
    layerprobe: Command, tiny_run: Path, ablated_run: Path, tmp_path: Path
) -> None:
    article = tmp_path / "records.jsonl"
    assert layerprobe("export", tiny_run, article).code == 0
    only_text = write_rows(
        tmp_path / "text",
        manifest(TINY, readings=("last", "ablation_text"), modules=sd3_modules(6)),
        rows(
            [0.5],
            {(name, "last"): np.ones((1, len(blocks))) for name, blocks in TINY.items()}
            | {("text", "ablation_text"): np.ones((1, 5))},
        ),
    ).path
    for run in (tiny_run, article, only_text):
        said = (
            f"{run} was recorded without ablation of whole blocks; record it with layerprobe_ablation: blocks, or use"
        )
        for options in (ARTICLE, ("--params", "60k", "--per-stream"), (*ARTICLE, "--freeze", "least:2")):
            shown = layerprobe("lokr", run, "--by", "ablation", *options)
            assert_one_line(shown, 1, f"{said} --by angle")
    for options in (("--by", "ablation"), ("--freeze", "least:2")):
        shown = layerprobe("lokr", "--model", "sd35-medium", "--params", "1M", *options)
        assert_one_line(shown, 2, "go by what was measured: give RUN")
    with fails("ablation_text is of the text stream alone; a plan is of whole blocks"):
        layerprobe_api.plan(layerprobe_api.load(ablated_run), reading="ablation_text")


# Ranks, and plans without a run


@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_a_config_by_ranks(layerprobe: Command, tiny_run: Path, tmp_path: Path, algo: str) -> None:
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", tiny_run, *ARTICLE, "--algo", algo, "--rank", 8, "--critical", "1", "--out", out)
    assert shown.code == 0 and "modules the rank meant" in shown.out, shown.err
    names = json.loads(out.read_text())["apply_preset"]["name_algo_map"]
    assert names["transformer_blocks.1.ff*"] == {"dim": 8, "alpha": 8}
    assert names["transformer_blocks.1.*"] == {"dim": 4, "alpha": 4}
    proof = layerprobe("check-config", out, "--run", tiny_run, "--differences")
    assert proof.code == 0 and "0 of" in proof.out
    told = json.loads(layerprobe("lokr", tiny_run, "--algo", algo, "--params", "60k", "--json").out)
    assert 50_000 < told["parameters"] <= 60_060 and all(block["ranks"] for block in told["blocks"])


def test_a_plan_without_a_run(layerprobe: Command, tmp_path: Path) -> None:
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", "--model", "sd35-medium", "--params", "50M", "--out", out)
    assert shown.code == 0 and "budget   50,000,000" in shown.out and "settled" not in shown.out, shown.err
    proof = layerprobe("check-config", out, "--model", "sd35-medium", "--differences")
    assert proof.code == 0 and "0 of" in proof.out
    told = layerprobe("lokr", "--model", "sd35-medium", "--algo", "loha", "--rank", 4, "--json").json
    assert {tuple(block["ranks"].values()) for block in told["blocks"]} == {(4, 2)}
    assert {block["contribution"] for block in told["blocks"]} == {None}


def test_records_and_a_model_are_enough(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    """From a file of records to a proved config, with and without a run folder."""
    model, source = tmp_path / "transformer" / "config.json", tmp_path / "records.jsonl"
    model.parent.mkdir()
    config = {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
    config |= {"caption_projection_dim": 64, "pooled_projection_dim": 64, "sample_size": 16, "pos_embed_max_size": 16}
    model.write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **config}))
    assert layerprobe("export", tiny_run, source).code == 0
    run = tmp_path / "run"
    assert layerprobe("import", source, run, "--model", tmp_path).code == 0
    known = layerprobe_api.load(run).manifest
    assert (known.family, known.model_class, bool(known.targets)) == ("sd3", "SD3Transformer2DModel", True)
    configs = []
    for number, arguments in enumerate(((run,), (source, "--model", model))):
        shown = layerprobe("lokr", *arguments, *ARTICLE, "--out", tmp_path / f"{number}.json")
        assert (shown.code, shown.err) == (0, "")
        assert "verified: LyCORIS" in shown.out and "settled for these images" in shown.out
        configs.append((tmp_path / f"{number}.json").read_bytes())
    assert configs[0] == configs[1]
    for where in (("--run", run), ("--model", model)):
        assert layerprobe("check-config", tmp_path / "0.json", *where, "--differences").code == 0
    assert_one_line(layerprobe("lokr", run, "--model", model), 1, "is a run folder")
    assert_one_line(layerprobe("lokr", source, "--model", "sd35-medium"), 1, "6 image distances; the model has 24")
    assert_one_line(layerprobe("import", source, tmp_path / "other", "--model", "sd35-medium"), 1, "the model has 2")
    assert_one_line(layerprobe("import", source, tmp_path / "other", "--model", "sd99"), 1, "sd99", "sd35-large")
    assert not (tmp_path / "other").exists()


# Wrong usage, and runs that cannot be planned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "flux-dev", "--params", "1M", "--env", "x"), "--env takes the options of a probe run"),
        (("RUN", "--algo", "lora", "--out", "x"), "use --env, not --out"),
        (("RUN", "--critical", "some"), "--critical: 'some' is not a list of block numbers"),
        (("RUN", "--freeze", "3-1"), "--freeze: '3-1' is not a list of block numbers"),
        (("RUN", "--params", "0"), "--params: '0' is neither a number of parameters such as 400M, nor"),
        (("RUN", "--out", "x", "--env", "x"), "--env: not allowed with argument --out"),
        (("RUN", "--params", "1M", "--preset", "article"), "--preset: not allowed with argument --params"),
        (("RUN", "--contrast", "0.5"), "--contrast: '0.5' is not a number from 1 to 30"),
        (("RUN", "--contrast", "nan"), "--contrast: 'nan'"),
        (("RUN", "--rank", "0"), "--rank: '0' is not a whole number from 1"),
    ],
)
def test_wrong_usage_is_one_line(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    result = layerprobe("lokr", *(str(tiny_run) if part == "RUN" else part for part in arguments))
    assert_one_line(result, 2, said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("RUN", *ARTICLE, "--freeze", "6"), "block 6 does not exist; the blocks are 0 to 5"),
        (("RUN", "--algo", "loha", "--rank", "4", "--params", "1M"), "a rank is for loha, locon and lora without"),
        (("RUN", "--algo", "loha", "--rank", "4"), "a rank is the largest by the article's recipe; ask for that too"),
        (("RUN",), "the run's own config trains is not known: it trains the whole model; give --params N, the path of"),
        (("--model", "sd35-medium"), "a plan without a run needs a budget"),
        (("--model", "sd35-medium", "--params", "1M", "--per-stream"), "no contributions are known"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    options = (str(tiny_run) if part == "RUN" else part for part in arguments)
    assert_one_line(layerprobe("lokr", *options, "--out", tmp_path / "out.json"), 1, said)
    assert snapshot(tmp_path) == before


def test_a_stream_without_finite_samples_is_left_out(layerprobe: Command, tmp_path: Path) -> None:
    what = manifest({**TINY, "audio": TINY["image"]}, readings=("last",), modules=sd3_modules(6))
    random = np.random.default_rng(0)
    distances = {(name, "last"): 0.1 + 0.3 * random.random((200, len(blocks))) for name, blocks in TINY.items()}
    distances["audio", "last"] = np.full((200, 6), np.nan)
    run = write_rows(tmp_path / "run", what, rows(random.random(200), distances)).path
    for options in (ARTICLE, ("--params", "60k", "--per-stream"), (*ARTICLE, "--algo", "loha")):
        shown = layerprobe("lokr", run, *options, "--json")
        assert shown.code == 0
        assert "the audio stream has no sample with finite distances; it is left out" in shown.err
        assert len(json.loads(shown.out)["blocks"]) == 6
    assert "of 6 factors" in layerprobe("status", run).out
    image = manifest({"image": TINY["image"]}, readings=("last",), modules=sd3_modules(6))
    run = write_rows(tmp_path / "none", image, rows([0.5], {("image", "last"): np.full((1, 6), np.nan)})).path
    assert_one_line(layerprobe("lokr", run, *ARTICLE), 1, "no stream (image) has a sample with finite distances")


# check-config


def test_check_config_proves_ours_and_shows_the_leak_of_the_articles_form(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", good).code == 0
    shown = layerprobe("check-config", good, "--run", tiny_run)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len([line for line in lines if line.split()[:1] == ["ok"]]) == 41
    assert "0 of 41 modules wrong" in lines[-1]
    split = [line for line in lines if line.startswith("split  ")]
    assert split[0].startswith("split  factor 1 of ") and split[-1].endswith("a larger factor is fewer parameters")
    bad.write_text(json.dumps(as_published(json.loads(good.read_text()))))
    shown = layerprobe("check-config", bad, "--run", tiny_run, "--differences")
    assert_one_line(shown, 1, "of 41 modules otherwise than meant")
    lines = shown.out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG  transformer_blocks.")]
    assert wrong and all("meant lokr factor" in line and ", gets lokr" in line for line in wrong)
    assert not any(line.startswith("ok") for line in lines)
    assert f"{len(wrong)} of 41 modules wrong" in lines[-1]
    assert any(line.startswith("note   ") and "target_module" in line for line in lines)


def test_a_config_that_is_none_or_of_another_model_is_one_line(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"algo": "lokr"}')
    assert_one_line(layerprobe("check-config", path, "--run", tiny_run), 1, str(path), "has no multiplier")
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", path, "--force").code == 0
    path.write_text(path.read_text().replace("transformer_blocks", "other"))
    shown = layerprobe("check-config", path, "--run", tiny_run)
    assert_one_line(shown, 1, "gives no module of this model an adapter")
    assert "note   nothing in the model matches other.0.ff*" in shown.out


def test_what_a_config_does_not_reach_and_what_it_nearly_says(
    layerprobe: Command, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    config = {"algo": "lokr", "multiplier": 1, "linear_dim": 100, "linear_alpha": 1, "facter": 4}
    names = {"transformer_blocks.0.ff*": {"facter": 2}, "transformer_blocks.1.ff*": {"dimm": 2}}
    path.write_text(
        json.dumps(config | {"apply_preset": {"target_module": [], "name_algo_map": names, "use_fnmatch": True}})
    )
    shown = layerprobe("check-config", path, "--run", tiny_run)
    assert shown.code == 0
    assert "note   facter has no effect: LyCORIS does not read it; did you mean factor?" in shown.out
    assert "facter has no effect with lokr (given for transformer_blocks.0.ff*); did you mean factor?" in shown.out
    assert "dimm has no effect with lokr (given for transformer_blocks.1.ff*); did you mean dim?" in shown.out
    said = "reach  6 of the model's 43 linear and convolutional layers; 37 get no adapter, first context_embedder"
    assert said in shown.out.splitlines()
    for changed, near in (
        ({"linear_dimm": 1}, "linear_dim"),
        ({"apply_preset": {"target_modul": []}}, "target_module"),
    ):
        wrong = {key: value for key, value in config.items() if key != "linear_dim"} | changed
        path.write_text(json.dumps(wrong if near == "linear_dim" else config | changed))
        said = "did you mean linear_dimm?" if near == "linear_dim" else "did you mean target_module?"
        assert_one_line(layerprobe("check-config", path, "--run", tiny_run), 1, said)


@pytest.mark.parametrize("use_fnmatch", [True, False])
def test_more_names_than_anybody_waits_for_are_refused(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, use_fnmatch: bool
) -> None:
    path = tmp_path / "many.json"
    config = {"algo": "lokr", "multiplier": 1, "linear_dim": 100, "linear_alpha": 1, "full_matrix": True}

    def write(count: int) -> None:
        names = {f"other_blocks.{number}.ff": {"factor": 4} for number in range(count)}
        preset = {"target_module": [], "name_algo_map": names, "use_fnmatch": use_fnmatch}
        path.write_text(json.dumps(config | {"apply_preset": preset}))

    write(50_000)
    for command in (("check-config", path, "--run"), ("lokr", "--params", path)):
        assert_one_line(layerprobe(*command, tiny_run), 1, "has 50,000 names, and each is compared with each of the")
    started = time.process_time()
    write(2_000)
    assert_one_line(layerprobe("check-config", path, "--run", tiny_run), 1, "no module of this model an adapter")
    assert time.process_time() - started < 10  # patterns beyond 512 were compiled anew for each module: a minute


def test_what_learns_nothing_stops(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "lycoris.json"
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", path).code == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"multiplier": 0.8, "rank": 16}))
    shown = layerprobe("check-config", path, "--run", tiny_run, "--differences")
    assert_one_line(shown, 1, "multiplier 0.8 is cut to 0 by SimpleTuner, so nothing learns; write 1")
    assert "note   rank has no effect: LyCORIS reads linear_dim there" in shown.out
    path.write_bytes(path.read_text().encode("utf-16"))
    shown = layerprobe("check-config", path, "--run", tiny_run)
    assert_one_line(shown, 1, str(path), "starts with a byte order mark, at which SimpleTuner stops")


def test_whether_an_adapter_comes_from_a_config(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    config, file = tmp_path / "lycoris.json", tmp_path / "pytorch_lora_weights.safetensors"
    assert layerprobe("lokr", tiny_run, *ARTICLE, "--out", config).code == 0
    check = layerprobe_api.check_config(config, layerprobe_api.load(tiny_run))
    tensors = {
        f"lycoris_{row.name.replace('.', '_')}.{name}": np.zeros(shape, np.float32)
        for row in check.rows
        for name, shape in (*row.got.tensors, ("alpha", ()))
    }
    save_file(tensors, file)
    shown = layerprobe("check-config", config, "--run", tiny_run, "--adapter", file)
    assert (shown.code, shown.err) == (0, "") and "41 of 41 modules the same: 0 missing" in shown.out
    first = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, file)
    shown = layerprobe("check-config", config, "--run", tiny_run, "--adapter", file, "--differences")
    assert_one_line(shown, 1, f"{file} does not come from {config}")
    assert shown.out.startswith(f"WRONG  {check.rows[0].name}: alpha, lokr_w1 ")
    assert "40 of 41 modules the same" in shown.out


def test_the_layers_of_a_run_are_as_they_were_recorded(layerprobe: Command, tiny_run: Path) -> None:
    for name in ("check-config", "lokr", "classes"):
        run = () if name == "classes" else (tiny_run,)
        where = () if name == "lokr" else ("--run", tiny_run)
        result = layerprobe(name, *run, *where, "--precision", "int8-quanto")
        assert_one_line(result, 2, "--precision goes with --model: a run has the layers that it was recorded with")


# classes


def test_classes_lists_what_a_config_can_aim_at(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    shown = layerprobe("classes", "--run", tiny_run)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0].split() == ["class", "modules", "weights"] and "name (use_fnmatch)" in lines
    assert max(map(len, lines)) <= 80
    told = layerprobe("classes", "--run", tiny_run, "--json").json
    row = next(row for row in told["names"] if row["name"] == "transformer_blocks.*.attn.to_q")
    assert row["modules"] == 6 and row["weights"] > 0
    assert {"class": "Linear", "modules": 43, "weights": sum(row["weights"] for row in told["names"])} in told[
        "classes"
    ]
    by_model = layerprobe("classes", "--model", "sd35-medium", "--json").json
    assert next(row["modules"] for row in by_model["classes"] if row["class"] == "JointTransformerBlock") == 385
    assert_one_line(layerprobe("classes", "--model", tmp_path), 1, "there is no architecture", "sd35-large")
    assert_one_line(layerprobe("classes"), 2, "--model --run is required")
