"""`layerprobe lokr` with a budget."""

# ruff: noqa: F401, F811  (fixtures are imported and then named as arguments)
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import manifest, rows, sd3_modules, write_run
from test_cli import TINY, Result, assert_one_line, layerprobe, snapshot, tiny

from simpletuner_layerprobe.analyse.bootstrap import tally
from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap
from simpletuner_layerprobe.lokr.config import read_config
from simpletuner_layerprobe.lokr.factors import achieved_factor
from simpletuner_layerprobe.lokr.plan import module_groups, plan
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.probe.families import family
from simpletuner_layerprobe.run.manifest import read_manifest
from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run

Command = Callable[..., Result]


def built(config: Any, run: Path) -> int:
    """The trainable parameters that LyCORIS makes of a config on a run's model."""
    manifest = read_manifest(run)
    check = check_config(config, manifest.modules, model_class=manifest.model_class)
    check.require()
    return check.parameters


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [(("--params", "60k"), 60_000), (("--params", "0.06M"), 60_000), (("--size", "120kB"), 60_000)],
)
def test_a_budget_is_kept_and_the_config_is_what_was_counted(
    layerprobe: Command,
    tiny: Path,
    tmp_path: Path,
    budget: tuple[str, str],
    parameters: int,
) -> None:
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", tiny, *budget, "--out", out)
    assert (shown.code, shown.err) == (0, "")
    reached = built(read_config(out), tiny)
    assert parameters * 0.999 <= reached <= parameters
    assert f"budget   {parameters:,} parameters" in shown.out
    assert f"reached  {reached:,} parameters" in shown.out
    assert "no assignment of this kind that keeps to the budget has a " in shown.out
    assert "verified: LyCORIS" in shown.out and f"written: {out}" in shown.out


def test_the_same_run_gives_the_same_bytes(layerprobe: Command, tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert layerprobe("lokr", tiny, "--params", "60k", "--per-stream", "--out", tmp_path / name).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_like_another_config_in_every_direction(layerprobe: Command, tiny: Path, tmp_path: Path) -> None:
    like = tmp_path / "like.json"
    assert layerprobe("lokr", tiny, "--out", like).code == 0
    parameters = built(read_config(like), tiny)
    configs = []
    for direction in ("more-change-more-capacity", "more-change-less-capacity", "uniform"):
        out = tmp_path / f"{direction}.json"
        assert layerprobe("lokr", tiny, "--like", like, "--direction", direction, "--out", out).code == 0
        configs.append(out.read_bytes())
        assert parameters * 0.999 <= built(read_config(out), tiny) <= parameters
    assert len(set(configs)) == 3


def test_frozen_full_and_limits(layerprobe: Command, tiny: Path, tmp_path: Path) -> None:
    options = ("--freeze", "0,4-5", "--full", "1", "--min-factor", "2", "--max-factor", "4", "--ratio-attention", "1")
    shown = layerprobe("lokr", tiny, "--params", "200k", *options, "--json")
    result = json.loads(shown.out)
    factors = [set(block["factors"].values()) for block in result["blocks"]]
    assert factors[0] == factors[4] == factors[5] == set()
    assert factors[1] == {1}
    assert factors[2] | factors[3] <= {2, 3, 4} and factors[2] and factors[3]
    names = result["config"]["apply_preset"]["name_algo_map"]
    assert {name.split(".")[1] for name in names} == {"1", "2", "3"}


def test_json_is_all_that_is_printed(layerprobe: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "lycoris_config.json"
    for arguments in (("--params", "60k", "--per-stream"), ()):
        shown = layerprobe("lokr", tiny, *arguments, "--json", "--out", out, "--force")
        result = json.loads(shown.out)
        assert result["config"] == read_config(out)
        assert result["written"] == [str(out)]
        assert result["parameters"] == built(result["config"], tiny)
        assert [block["number"] for block in result["blocks"]] == list(range(6))
        assert sum(block["parameters"] for block in result["blocks"]) == result["parameters"]
    assert result["budget"] is None and result["preset"] == "article"
    shown = layerprobe("lokr", tiny, "--params", "60k", "--per-stream", "--json")
    result = json.loads(shown.out)
    assert result["budget"]["reached"] == result["parameters"] == 60_000 + result["budget"]["gap"]
    assert set(result["blocks"][0]["factors"]) == {
        f"{stream} {kind}"
        for stream, kind in (
            *(("image", kind) for kind in ("feed-forward", "attention", "modulation")),
            ("text", "feed-forward"),
            ("text", "modulation"),
        )
    }


@pytest.mark.parametrize("budget", [("--params", "60k"), ()])
def test_a_dry_run_shows_the_config_and_writes_nothing(
    layerprobe: Command,
    tiny: Path,
    tmp_path: Path,
    budget: tuple[str, ...],
) -> None:
    before = snapshot(tmp_path)
    shown = layerprobe("lokr", tiny, *budget, "--dry-run", "--out", tmp_path / "out.json")
    assert shown.code == 0 and snapshot(tmp_path) == before
    config, end = json.JSONDecoder().raw_decode(shown.out)
    assert built(config, tiny) > 0
    assert "transformer_blocks.0" in shown.out[end:] and "nothing written: --dry-run" in shown.out[end:]


def test_a_budget_out_of_reach_is_warned_of(layerprobe: Command, tiny: Path) -> None:
    shown = layerprobe("lokr", tiny, "--params", "1B")
    assert shown.code == 0
    assert "the budget is 1,000,000,000: the largest assignment of this kind has" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--params", "0"), "--params: '0' is not a number of parameters such as 400M"),
        (("--params", "400MB"), "--params: '400MB'"),
        (("--params", "1e9"), "--params: '1e9'"),
        (("--params", "-5"), "--params"),
        (("--params", "9" * 40), "--params"),
        (("--size", "800M"), "--size: '800M' is not a size such as 800MB"),
        (("--params", "1M", "--size", "1MB"), "--size: not allowed with argument --params"),
        (("--direction", "uniform"), "--direction needs a budget: --params, --size or --like"),
        (("--per-stream",), "--per-stream needs a budget"),
        (("--full", "1"), "--full needs a budget"),
        (("--params", "1M", "--preset", "article"), "--preset is for the article's recipe"),
        (("--params", "1M", "--critical", "none"), "--critical is for the article's recipe"),
        (("--params", "1M", "--ratio-attention", "0"), "--ratio-attention: '0' is not a number above 0"),
        (("--params", "1M", "--contrast", "0.5"), "--contrast: '0.5'"),
        (("--params", "1M", "--freeze", "3-1"), "--freeze: '3-1' is not a list of block numbers"),
        (("--params", "1M", "--freeze", "a"), "--freeze: 'a'"),
        (("--params", "1M", "--direction", "up"), "--direction: invalid choice: 'up'"),
    ],
)
def test_wrong_usage_is_one_line(layerprobe: Command, tiny: Path, arguments: tuple[str, ...], said: str) -> None:
    assert_one_line(layerprobe("lokr", tiny, *arguments), 2, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--freeze", "6"), "--freeze names block 6, which does not exist; the blocks are 0 to 5"),
        (("--full", "1-9"), "--full names block 6, which does not exist"),
        (("--freeze", "1,2", "--full", "2"), "block 2 is named by --freeze and by --full"),
        (("--freeze", "0-5"), "all blocks are frozen"),
        (("--min-factor", "4", "--max-factor", "2"), "factors from 4 to 2 are asked for"),
        (("--min-factor", "5000"), "no factor from 5000 to any makes a difference"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    layerprobe: Command,
    tiny: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    before = snapshot(tmp_path)
    assert_one_line(layerprobe("lokr", tiny, "--params", "60k", *arguments, "--out", tmp_path / "out"), 1, said)
    assert snapshot(tmp_path) == before


def test_a_run_without_modules_cannot_be_planned(layerprobe: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TINY, 20).path
    assert_one_line(layerprobe("lokr", run, "--params", "1M", "--unverified"), 1, "nothing can be planned for a budget")


def test_a_config_that_adapts_nothing_is_no_budget(layerprobe: Command, tiny: Path, tmp_path: Path) -> None:
    like = tmp_path / "like.json"
    assert layerprobe("lokr", tiny, "--out", like).code == 0
    like.write_text(like.read_text().replace("transformer_blocks", "other"))
    assert_one_line(layerprobe("lokr", tiny, "--like", like), 1, str(like), "no budget to match")
    assert_one_line(layerprobe("lokr", tiny, "--like", tmp_path / "none"), 1, "cannot read")


def test_the_tables_columns_line_up(layerprobe: Command, tiny: Path) -> None:
    lines = layerprobe("lokr", tiny, "--params", "60k", "--per-stream", "--freeze", "2").out.splitlines()
    head = lines[0]
    assert " ".join(head.split()) == (
        "block contribution 95% interval image alone text alone image ff agree text ff agree image attn agree "
        "image mod agree text mod agree parameters"
    )
    end = len(head)
    for line in lines[1:3]:
        assert re.fullmatch(r".* [\d,]+", line[:end]) and line[end:].strip()[:11] in ("", "NOT settled")
    assert lines[3].endswith("frozen") and lines[3].split()[12:22] == ["-"] * 10
    assert sd3_modules(6)[2].name in lines[1]


def test_a_plan_says_how_sure_it_is(layerprobe: Command, tiny: Path) -> None:
    """The numbers against those of the replicates planned one by one."""
    result = json.loads(layerprobe("lokr", tiny, "--params", "60k", "--bins", "3", "--json").out)
    bootstrap = tally(open_run(tiny), bins=3).bootstrap(replicates=200)
    blocks = bootstrap.names
    groups = module_groups(blocks, family("sd3").targets, read_manifest(tiny).modules)
    same = np.zeros(len(groups))
    values = []
    for r in range(200):
        streams = {
            name: Heatmap(name, "last", bootstrap.blocks[name], mean_RTL[r], bootstrap.count_T[name], 0, 3)
            for name, mean_RTL in bootstrap.replicates().items()
        }
        values.append(article_contributions(streams).value_L)
        found = plan(groups, {"joint": values[-1]}, 60_000).factors
        for place, (group, factor) in enumerate(zip(groups, found, strict=True)):
            own = result["blocks"][group.number]["factors"][group.kind]
            sizes = {size for module in group.modules for size in module.shape}
            same[place] += all(achieved_factor(size, own) == achieved_factor(size, factor) for size in sizes)
    assert result["replicates"] == 200 and 0 < (same < 190).sum() < len(groups)
    for place, group in enumerate(groups):
        assert result["blocks"][group.number]["agreement"][group.kind] == same[place] / 200
    low, high = np.quantile(values, [0.025, 0.975], axis=0, method="weibull")
    for number, block in enumerate(result["blocks"]):
        assert block["interval"] == pytest.approx([low[number], high[number]], abs=1e-9)
        mine = [place for place, group in enumerate(groups) if group.number == number]
        assert block["settled"] == bool((same[mine] >= 190).all())
    table = layerprobe("lokr", tiny, "--params", "60k", "--bins", "3").out
    assert f"NOT settled: {(same < 190).sum()} of {len(groups)} factors" in table
    assert "of the 200 bootstrap replicates (a share's standard error is at most 3.5%)" in table


def test_status_judges_the_preset_asked_for(layerprobe: Command, tiny: Path) -> None:
    def said(*options: str) -> str:
        shown = layerprobe("status", tiny, *options)
        assert (shown.code, shown.err) == (0, "")
        return next(line for line in shown.out.splitlines() if line.startswith("settled"))

    assert "of 6 factors (preset article, 95%)" in said()
    assert "of 18 factors (preset 120kB, 95%)" in said("--preset", "120kB")
    (tiny / "config.json").write_text(json.dumps({"--layerprobe_preset": "60k"}))
    assert "of 18 factors (preset 60k, 95%)" in said()
    assert "(preset article, 95%)" in said("--preset", "article")
    (tiny / "config.json").write_text(json.dumps({"layerprobe_preset": "much"}))
    assert "(preset article, 95%)" in said()
    assert_one_line(
        layerprobe("status", tiny, "--preset", "much"), 2, "--preset: the preset is 'much'; expected article"
    )


def test_a_stream_without_finite_samples_is_left_out(layerprobe: Command, tmp_path: Path) -> None:
    what = manifest({**TINY, "audio": TINY["image"]}, tokens=("last",), modules=sd3_modules(6))
    create_run(tmp_path / "run", what)
    random = np.random.default_rng(0)
    distances = {(name, "last"): 0.1 + 0.3 * random.random((200, len(blocks))) for name, blocks in TINY.items()}
    distances["audio", "last"] = np.full((200, 6), np.nan)
    ShardWriter(tmp_path / "run", what, rank=0).write(rows(random.random(200), distances))
    for options in ((), ("--params", "60k"), ("--params", "60k", "--per-stream"), ("--algo", "loha")):
        shown = layerprobe("lokr", tmp_path / "run", *options, "--json")
        assert shown.code == 0
        assert "warning: the audio stream has no sample with finite distances; it is left out" in shown.err
        assert len(json.loads(shown.out)["blocks"]) == 6
    shown = layerprobe("status", tmp_path / "run")
    assert shown.code == 0 and "of 6 factors" in shown.out


def test_a_run_without_any_finite_sample_is_one_line(layerprobe: Command, tmp_path: Path) -> None:
    what = manifest({"image": TINY["image"]}, tokens=("last",), modules=sd3_modules(6))
    create_run(tmp_path / "run", what)
    ShardWriter(tmp_path / "run", what, rank=0).write(rows([0.5], {("image", "last"): np.full((1, 6), np.nan)}))
    assert_one_line(layerprobe("lokr", tmp_path / "run"), 1, "no stream (image) has a sample with finite distances")
