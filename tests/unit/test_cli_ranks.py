"""`layerprobe lokr` with ranks, and without a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from synthetic_run import sd3_modules, write_run
from test_cli import TINY, assert_one_line, layerprobe, snapshot, tiny  # noqa: F401

from simpletuner_layerprobe.lokr.config import read_config

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


@pytest.mark.parametrize("algo", ["locon", "loha"])
def test_a_config_by_ranks(layerprobe, tiny, tmp_path, algo):  # noqa: F811
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", tiny, "--algo", algo, "--rank", 8, "--critical", "1", "--out", out)
    assert shown.code == 0 and "modules the rank meant" in shown.out, shown.err
    names = read_config(out)["apply_preset"]["name_algo_map"]
    assert names["transformer_blocks.1.ff*"] == {"dim": 8, "alpha": 8}
    assert names["transformer_blocks.1.*"] == {"dim": 4, "alpha": 4}
    proof = layerprobe("check-config", out, "--run", tiny, "--differences")
    assert proof.code == 0 and "0 of" in proof.out


def test_ranks_for_a_budget(layerprobe, tiny):  # noqa: F811
    answers = {}
    for direction in ("more-change-more-capacity", "more-change-less-capacity", "uniform"):
        shown = layerprobe("lokr", tiny, "--algo", "locon", "--params", "20k", "--direction", direction, "--json")
        answers[direction] = json.loads(shown.out)
        assert answers[direction]["budget"]["reached"] == answers[direction]["parameters"]
    more, less, uniform = ([block["ranks"]["at_factor"] for block in answer["blocks"]] for answer in answers.values())
    most = max(range(6), key=lambda number: answers["uniform"]["blocks"][number]["contribution"])
    assert more[most] == max(more) and less[most] == min(less) and max(uniform) - min(uniform) <= 1
    frozen = layerprobe("lokr", tiny, "--algo", "loha", "--params", "20k", "--freeze", "0-2", "--json")
    assert [bool(block["ranks"]) for block in json.loads(frozen.out)["blocks"]] == [False] * 3 + [True] * 3


def test_a_standard_lora_is_an_environment(layerprobe, tiny, tmp_path):  # noqa: F811
    (tiny / "config.json").write_text(
        json.dumps({"layerprobe": True, "lora_type": "lycoris", "lycoris_config": "x", "output_dir": "output/p"})
    )
    config = tmp_path / "config"
    shown = layerprobe("lokr", tiny, "--algo", "lora", "--rank", 8, "--env", "weighted", "--config-dir", config)
    assert shown.code == 0 and "verified: PEFT" in shown.out, shown.err
    options = json.loads((config / "weighted" / "config.json").read_text())
    assert options["lora_type"] == "standard" and options["output_dir"] == "output/weighted"
    assert not {"layerprobe", "lycoris_config"} & options.keys()
    ranks = load_file(options["init_lora"])
    targets = json.loads(Path(options["peft_lora_target_modules"]).read_text())
    assert {f"transformer.{name}.lora_down.weight" for name in targets} == set(ranks)


def test_a_plan_without_a_run(layerprobe, tmp_path):  # noqa: F811
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", "--model", "sd35-medium", "--params", "50M", "--out", out)
    assert shown.code == 0 and "reached" in shown.out, shown.err
    proof = layerprobe("check-config", out, "--model", "sd35-medium", "--differences")
    assert proof.code == 0 and "0 of" in proof.out
    shown = layerprobe("lokr", "--model", "sd35-medium", "--algo", "loha", "--rank", 4, "--json")
    ranks = {tuple(block["ranks"].values()) for block in json.loads(shown.out)["blocks"]}
    assert ranks == {(4, 2)}


def test_ranks_say_how_sure_they_are(layerprobe, tmp_path):  # noqa: F811
    write_run(tmp_path / "noisy", TINY, 150, seed=3, modules=sd3_modules(6))
    for options, replicates in ((("--rank", "64"), 1000), (("--params", "100k", "--freeze", "2"), 200)):
        arguments = ("lokr", tmp_path / "noisy", "--algo", "locon", *options, "--bins", "3")
        result = json.loads(layerprobe(*arguments, "--json").out)
        assert result["replicates"] == replicates
        shares = [share for block in result["blocks"] for share in (block["agreement"] or {}).values()]
        assert min(shares) < 0.95 and max(shares) > 0.95
        assert all(share == round(share * replicates) / replicates for share in shares)
        for block in result["blocks"]:
            low, high = block["interval"]
            assert 0 <= low <= high <= 1
            if block["ranks"]:
                assert block["settled"] == (min(block["agreement"].values()) >= 0.95)
            else:
                assert block["settled"] is None
        table = layerprobe(*arguments).out
        assert f"of {len(shares)} ranks, agreed by fewer than 95%" in table
        assert table.count("  NOT settled\n") == sum(block["settled"] is False for block in result["blocks"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give RUN, or --model"),
        (("RUN", "--model", "flux-dev"), "give RUN, or --model"),
        (("--model", "flux-dev"), "--model needs a budget"),
        (("--model", "flux-dev", "--params", "1M", "--env", "x"), "--model knows no contributions"),
        (("RUN", "--rank", "4"), "--rank is for --algo locon, loha and lora"),
        (("RUN", "--algo", "loha", "--rank", "4", "--params", "1M"), "--rank and a budget exclude each other"),
        (("RUN", "--algo", "loha", "--params", "1M", "--full", "0"), "--full does not go with --algo loha"),
        (("RUN", "--algo", "lora", "--out", "x"), "use --env, not --out"),
        (("RUN", "--algo", "lycoris"), "--algo: invalid choice"),
    ],
)
def test_options_that_do_not_go_together(layerprobe, tiny, tmp_path, arguments, said):  # noqa: F811
    before = snapshot(tmp_path)
    result = layerprobe("lokr", *(str(tiny) if one == "RUN" else one for one in arguments))
    assert_one_line(result, 2, said)
    assert snapshot(tmp_path) == before
