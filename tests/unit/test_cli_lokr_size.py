"""`layerprobe lokr` without a size: that of what the run's own config trains, and what is said of a plan's size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, Result, assert_one_line
from failing import fails
from synthetic_run import FLUX_DEV, SD35_LARGE, manifest, rows, sd3_modules, write_ablated_run, write_rows, write_run

import simpletuner_layerprobe as layerprobe_api
from simpletuner_layerprobe.lokr.own import Own
from simpletuner_layerprobe.lokr.size import STATES, training_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning"),
    pytest.mark.usefixtures("diffusers_classes"),
]

Command = Callable[..., Result]

SIMPLETUNERS: dict[str, Any] = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}
"""The LoKr config of SimpleTuner's documentation."""
BY_NAME: dict[str, Any] = SIMPLETUNERS | {
    "apply_preset": {"target_module": [], "use_fnmatch": True, "name_algo_map": {"transformer_blocks.*": {"factor": 5}}}
}


def trains(run: Path, **training: object) -> Path:
    """The run with what its own config trains beside it, as it is recorded."""
    own = {"model_type": "lora", "lora_type": "lycoris", "optimizer": "adamw_bf16", "mixed_precision": "bf16"}
    (run / "training.json").write_text(json.dumps(own | training))
    return run


@pytest.fixture
def own_run(tiny_run: Path) -> Path:
    return trains(tiny_run, lycoris_config=BY_NAME)


def built(config: Any, run: Path) -> int:
    return layerprobe_api.check_config(config, layerprobe_api.load(run)).parameters


def test_without_a_size_a_plan_has_that_of_the_runs_own_config(layerprobe: Command, own_run: Path) -> None:
    own = built(BY_NAME, own_run)
    told = layerprobe("lokr", own_run, "--json").json
    assert told["budget"]["parameters"] == own and told["budget"]["direction"] == "uniform"
    assert told["own"] == {"parameters": own, "problem": None}
    assert told["times_own"] == pytest.approx(told["parameters"] / own)
    run = layerprobe_api.load(own_run)
    plan = layerprobe_api.plan(run)
    assert plan.config() == told["config"] and plan.times == told["times_own"] and run.own.parameters == own
    assert plan.memory is not None and told["training_bytes"] == {
        "weights": 2 * plan.parameters,
        "gradients": 2 * plan.parameters,
        "optimizer": "adamw_bf16",
        "states": 6 * plan.parameters,
    }
    weighted = layerprobe("lokr", own_run, "--direction", "more-change-more-capacity", "--json").json
    assert weighted["budget"]["parameters"] == own and weighted["config"] != told["config"]
    shown = layerprobe("lokr", own_run)
    assert shown.err == "" or "the budget is" in shown.err
    assert f"\nsize     yours now {own:,} (" in shown.out and "\nmemory   " in shown.out


def test_a_plan_of_many_times_the_size_is_warned_of_with_the_command_that_keeps_it(
    layerprobe: Command, own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = built(BY_NAME, own_run)
    shown = layerprobe("lokr", own_run, "--preset", "article", "--critical", "0", "--env", "x")
    times = layerprobe_api.plan(layerprobe_api.load(own_run), preset="article", critical=(0,)).times
    assert times is not None and times > 3
    assert f"the config has {times:.1f} times the parameters that your own config trains; at its size: " in shown.err
    command = f"layerprobe lokr {own_run} --direction more-change-more-capacity --env x"
    assert shown.err.rstrip().endswith(command)
    again = layerprobe(*command.split()[1:-2], "--json")
    assert again.json["budget"]["parameters"] == own and "times the parameters" not in again.err
    assert "times the parameters" not in layerprobe("lokr", own_run, "--params", 2 * own).err


def test_the_heaviest_blocks_are_named(layerprobe: Command, own_run: Path) -> None:
    plan = layerprobe_api.plan(layerprobe_api.load(own_run), params=200_000, critical=(1,), contrast=30)
    share = plan.block_parameters(1) / plan.parameters
    assert plan.heaviest() == (1,) and share > 2 / 6
    shown = layerprobe("lokr", own_run, "--params", "200k", "--critical", "1", "--contrast", "30").out
    assert f"; block 1 holds {share:.0%}\n" in shown
    assert layerprobe_api.plan(layerprobe_api.load(own_run), params=60_000).heaviest() == ()


def test_a_lora_counts_by_rank_and_targets(layerprobe: Command, tiny_run: Path) -> None:
    """PEFT takes what a target is the end of; tests/torch holds the number to PEFT."""
    trains(tiny_run, lora_type="standard", lora_rank=4, lora_target_modules=["to_q", "to_out.0", "ff.net.2"])
    expected = 6 * 4 * (2 * (64 + 64) + (64 + 256))
    assert layerprobe("lokr", tiny_run, "--json").json["own"]["parameters"] == expected


@pytest.mark.parametrize(("recorded", "used"), [(1234, True), (0, False), (-1, False), (True, False), ("9", False)])
def test_what_the_probe_has_counted_is_not_counted_again(tiny_run: Path, recorded: object, used: bool) -> None:
    own = layerprobe_api.load(trains(tiny_run, lycoris_config=BY_NAME, parameters=recorded)).own
    assert own.parameters == (recorded if used else built(BY_NAME, tiny_run))


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"model_type": "full"}, "it trains the whole model"),
        ({"lora_type": "standard", "lora_rank": 4}, "its LoRA's target modules are the model's defaults"),
        (
            {"lora_type": "standard", "lora_rank": 4, "lora_target_modules": ["nothing"]},
            "gives no module of this model",
        ),
        ({"lora_type": "standard", "lora_rank": "x", "lora_target_modules": ["to_q"]}, "gives no module of this model"),
        ({}, "it names no lycoris_config"),
        ({"lycoris_config": BY_NAME, "init_lora": "x.safetensors"}, "it goes on from the adapter in init_lora"),
        ({"lycoris_config": {"algo": "lokr"}}, "its lycoris_config has no multiplier"),
        ({"lycoris_config": BY_NAME | {"apply_preset": {"target_module": []}}}, "gives no module of this model"),
    ],
)
def test_a_size_that_is_not_known_is_one_line_with_what_to_give(
    layerprobe: Command, tiny_run: Path, training: dict[str, Any], said: str
) -> None:
    trains(tiny_run, **training)
    shown = layerprobe("lokr", tiny_run)
    assert_one_line(
        shown, 1, "own config trains is not known: ", said, "; give --params N, the path of a LyCORIS config"
    )
    told = layerprobe("lokr", tiny_run, "--params", "60k", "--json").json
    assert told["own"]["parameters"] is told["times_own"] is None and said in told["own"]["problem"]
    assert "size     this " in layerprobe("lokr", tiny_run, "--params", "60k").out


def test_a_run_from_before_finds_its_config_by_its_options(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working folder: the path is meant from a folder above the run."""
    options = {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": "config/mine/lycoris_config.json"}
    (tiny_run / "config.json").write_text(json.dumps({f"--{name}": value for name, value in options.items()}))
    assert_one_line(layerprobe("lokr", tiny_run), 1, "there is no file config/mine/lycoris_config.json")
    (tmp_path / "config" / "mine").mkdir(parents=True)
    os.mkfifo(tmp_path / "config" / "mine" / "lycoris_config.json")
    assert_one_line(layerprobe("lokr", tiny_run), 1, "there is no file config/mine/lycoris_config.json")
    (tmp_path / "config" / "mine" / "lycoris_config.json").unlink()
    (tmp_path / "config" / "mine" / "lycoris_config.json").write_text(json.dumps(BY_NAME))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert layerprobe("lokr", tiny_run, "--json").json["own"]["parameters"] == built(BY_NAME, tiny_run)
    imported = write_run(tmp_path / "imported", TINY, 100, modules=sd3_modules(6), images=20).path
    assert_one_line(layerprobe("lokr", imported), 1, "has no SimpleTuner config beside it (an imported run has none)")


def test_an_amount_in_the_runs_own_preset_is_its_size(layerprobe: Command, own_run: Path) -> None:
    """`article`, which the WebUI writes unasked, decides what is judged and not what is planned."""
    for preset, parameters in (("60k", 60_000), ("article", built(BY_NAME, own_run))):
        (own_run / "config.json").write_text(json.dumps({"layerprobe_preset": preset}))
        assert layerprobe("lokr", own_run, "--json").json["budget"]["parameters"] == parameters


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp16", 2), ("no", 4)])
def test_memory_goes_by_optimizer_and_precision(precision: str, size: int) -> None:
    for optimizer, kept in STATES.items():
        memory = training_memory(1000, {"optimizer": optimizer, "mixed_precision": precision})
        assert (memory.weights, memory.gradients, memory.optimizer) == (1000 * size, 1000 * size, optimizer)
        assert memory.states == 1000 * kept[size == 4] and memory.total == 2000 * size + memory.states
    unknown = training_memory(1000, {"optimizer": "soap", "mixed_precision": precision})
    assert unknown.states is None and unknown.total == 2000 * size


def test_an_optimizer_that_is_not_known_is_said(layerprobe: Command, tiny_run: Path) -> None:
    trains(tiny_run, lycoris_config=BY_NAME, optimizer="soap")
    shown = layerprobe("lokr", tiny_run, "--params", "60k").out
    assert "gradients 120 kB; what soap keeps is not known\n" in shown


# The reading, blocks of one stream, and critical blocks outside the article's recipe


def test_outside_the_article_plans_go_by_the_mean(layerprobe: Command, own_run: Path) -> None:
    run = layerprobe_api.load(own_run)
    mean, last = run.contribution("mean", by_own=True), run.contribution("last")
    for options, expected in (((), mean), (("--contrast", "6"), mean), (("--preset", "article"), last)):
        told = json.loads(layerprobe("lokr", own_run, *options, "--json").out)
        assert [block["contribution"] for block in told["blocks"]] == expected.value_L.tolist()
    assert (
        run.reading == "last" and run.plan_reading(params=1) == "mean" and run.plan_reading(preset="article") == "last"
    )


def test_every_table_says_what_the_other_reading_would_decide(layerprobe: Command, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    level = {"last": [0.9, 0.5, 0.2, 0.4, 0.3, 0.1], "mean": [0.1, 0.5, 0.2, 0.4, 0.3, 0.9]}
    what = manifest({"image": TINY["image"]}, modules=sd3_modules(6))
    values = {("image", name): np.array(each) * (1 + 0.01 * random.random((400, 6))) for name, each in level.items()}
    images = {"image": np.arange(400) % 40 + 1}
    run = write_rows(tmp_path / "run", what, rows(random.random(400), values, images)).path
    for options in (("--preset", "article"), ("--params", "200k", "--contrast", "12")):
        told = layerprobe("lokr", run, *options, "--json").json["other_reading"]
        own, other = ("last", "mean") if "article" in options else ("mean", "last")
        assert told["reading"] == other and told["weighted"] is True
        here = layerprobe("lokr", run, *options, "--tokens", own, "--json").json["blocks"]
        there = layerprobe("lokr", run, *options, "--tokens", other, "--json").json["blocks"]
        pairs = {n: [a["parameters"], b["parameters"]] for n, (a, b) in enumerate(zip(here, there, strict=True))}
        differing = {block["number"]: block["parameters"] for block in told["blocks"]}
        assert {0, 5} <= differing.keys()
        if "article" in options:
            assert differing == {n: pair for n, pair in pairs.items() if pair[0] != pair[1]} and len(differing) == 2
            said = "by the mean over the tokens blocks 0 and 5 would get others, most block "
            assert f"\nreading  {said}" in layerprobe("lokr", run, *options).out
    shown = layerprobe("lokr", run, "--params", "200k").out
    assert "\nreading  equal factors go by none; weighted, by the last token " in shown
    only = write_run(tmp_path / "only", TINY, 100, readings=("last",), modules=sd3_modules(6), images=20).path
    assert layerprobe("lokr", only, "--params", "60k", "--json").json["other_reading"] is None
    ablated = write_ablated_run(tmp_path / "ablated", TINY, 300, level["last"], modules=sd3_modules(6)).path
    assert layerprobe("lokr", ablated, "--params", "60k", "--by", "ablation", "--json").json["other_reading"] is None
    assert layerprobe("lokr", "--model", "sd35-medium", "--params", "50M", "--json").json["other_reading"] is None


def test_a_block_that_one_stream_has_goes_by_that_stream(own_run: Path) -> None:
    run = layerprobe_api.load(own_run)
    neighbour, own = run.contribution("mean"), run.contribution("mean", by_own=True)
    heatmaps = run.heatmaps("mean")
    average_L = np.minimum(heatmaps["image"].values_TL, np.percentile(heatmaps["image"].values_TL, 90)).mean(axis=0)
    alone_L = (average_L - average_L.min()) / (average_L.max() - average_L.min())
    assert neighbour.value_L[5] == neighbour.value_L[4] and not neighbour.covered_L[5]
    assert own.value_L[5] == pytest.approx(alone_L[5]) and own.covered_L.all()
    assert own.value_L[:5].tolist() == neighbour.value_L[:5].tolist()
    sure = run.confidence(params=60_000, contrast=12)
    assert sure.low_L[5] <= own.value_L[5] <= sure.high_L[5]


def test_with_a_budget_a_critical_block_is_raised_in_its_stream_alone(layerprobe: Command, tmp_path: Path) -> None:
    blocks = {"image": tuple(f"transformer_blocks.{n}" for n in range(12))}
    blocks["text"] = blocks["image"][:-1]
    run = write_run(tmp_path / "run", blocks, 400, peaks=[("text", 3)], modules=sd3_modules(12), images=40).path
    told = layerprobe("lokr", run, "--params", "400k", "--critical", "auto", "--json").json
    assert [block["number"] for block in told["blocks"] if block["critical"]] == [3]
    factors = told["blocks"][3]["factors"]
    assert {name: factor == 1 for name, factor in factors.items()} == {
        name: name.startswith("text ") for name in factors
    }
    assert len(factors) == 5 and built(told["config"], run) == told["parameters"]
    whole = layerprobe("lokr", run, "--params", "400k", "--critical", "3", "--json").json["blocks"][3]
    assert set(whole["factors"].values()) == {1}
    none = layerprobe("lokr", run, "--params", "400k", "--json").json["blocks"][3]
    assert 1 not in none["factors"].values() and not none["critical"]
    article = layerprobe("lokr", run, "--preset", "article", "--json").json["blocks"][3]
    assert article["factors"] == {"at_factor": 1, "at_double": 2}


# What the issue wants to see


@pytest.mark.parametrize(
    ("name", "blocks", "own"), [("sd35-large", SD35_LARGE, 62_537_280), ("flux-dev", FLUX_DEV, 44_831_488)]
)
def test_the_default_is_as_large_as_simpletuners_documented_config(
    tmp_path: Path, name: str, blocks: dict[str, tuple[str, ...]], own: int
) -> None:
    """By diffusers' classes; FLUX.1 dev's attention has another name in SimpleTuner, where it counts 54,705,408."""
    from simpletuner_layerprobe.models import architecture

    model = architecture(name)
    run = write_run(tmp_path / "run", blocks, 400, images=40, modules=model.modules, targets=model.targets).path
    plan = layerprobe_api.plan(layerprobe_api.load(trains(run, lycoris_config=SIMPLETUNERS)))
    assert plan.own is not None and plan.own.parameters == own
    assert plan.times == pytest.approx(1, abs=0.001)
    assert plan.memory is not None and plan.memory.total == 10 * plan.parameters
    article = layerprobe_api.plan(layerprobe_api.load(run), preset="article").times
    assert article is not None and article > 20


def test_what_is_known_of_no_run() -> None:
    with fails("nothing is known"):
        assert Own(layerprobe_api.load, problem="nothing is known").parameters  # type: ignore[arg-type]
