from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from failing import fails
from hypothesis import given
from hypothesis import strategies as st

from simpletuner_layerprobe.lokr.config import (
    article_config,
    article_plan,
    check_environment_name,
    config_bytes,
    environment,
    layer_kind,
    programs,
    read_config,
    read_options,
    write_config,
)
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.families import Target
from simpletuner_layerprobe.run.manifest import Module

SD3 = families.family("sd3").targets
FLUX = families.family("flux").targets


def linear(name: str, out_dimension: int = 8, in_dimension: int = 8) -> Module:
    return Module(name, "Linear", (out_dimension, in_dimension))


# The config


def test_the_file_of_one_block():
    config = article_config(["transformer_blocks.7"], [3], SD3)
    assert config_bytes(config).decode() == (
        """{
  "algo": "lokr",
  "multiplier": 1.0,
  "linear_dim": 1000000,
  "linear_alpha": 1,
  "full_matrix": true,
  "factor": 1,
  "apply_preset": {
    "use_fnmatch": true,
    "target_module": [],
    "name_algo_map": {
      "transformer_blocks.7.norm1*": {
        "factor": 3
      },
      "transformer_blocks.7.norm1_context*": {
        "factor": 3
      },
      "transformer_blocks.7.ff*": {
        "factor": 3
      },
      "transformer_blocks.7.*": {
        "factor": 6
      }
    }
  }
}
"""
    )


def test_the_same_input_gives_the_same_bytes():
    blocks = [f"transformer_blocks.{n}" for n in range(19)]
    blocks += [f"single_transformer_blocks.{n}" for n in range(38)]
    factors = [1 + n % 12 for n in range(57)]
    first = config_bytes(article_config(blocks, factors, FLUX))
    assert first == config_bytes(article_config(tuple(blocks), tuple(factors), FLUX))
    assert json.loads(first) == article_config(blocks, factors, FLUX)


def test_blocks_and_rules_are_in_the_order_of_the_model():
    config = article_config(["single_transformer_blocks.0", "single_transformer_blocks.1"], [2, 1], FLUX)
    names = config["apply_preset"]["name_algo_map"]
    assert {name: settings["factor"] for name, settings in names.items()} == {
        "single_transformer_blocks.0.norm*": 2,
        "single_transformer_blocks.0.proj_mlp*": 2,
        "single_transformer_blocks.0.proj_out*": 2,
        "single_transformer_blocks.0.*": 4,
        "single_transformer_blocks.1.norm*": 1,
        "single_transformer_blocks.1.proj_mlp*": 1,
        "single_transformer_blocks.1.proj_out*": 1,
        "single_transformer_blocks.1.*": 2,
    }
    assert list(names)[3] == "single_transformer_blocks.0.*"


def test_the_plan_gives_feed_forward_and_modulation_the_factor_and_attention_its_double():
    inside = {"norm1.linear": 5, "norm1_context.linear": 5, "ff.net.0.proj": 5, "ff_context.net.2": 5}
    inside |= {"attn.to_q": 10, "attn.to_out.0": 10, "attn.to_add_out": 10, "attn2.to_k": 10}
    modules = [Module("transformer_blocks.1", "JointTransformerBlock", ())]
    modules += [linear(f"transformer_blocks.1.{name}") for name in inside]
    modules += [Module("transformer_blocks.1.attn.norm_q", "RMSNorm", (8,)), linear("proj_out")]
    modules += [linear("transformer_blocks.10.attn.to_q"), linear("other.transformer_blocks.1.attn.to_q")]
    plan = article_plan(["transformer_blocks.1"], [5], SD3, modules)
    assert {planned.name: planned.factor for planned in plan} == {
        f"transformer_blocks.1.{name}": factor for name, factor in inside.items()
    }
    assert {planned.shape for planned in plan} == {(8, 8)}


def test_a_target_without_a_rule_for_everything_leaves_modules_out():
    targets = [Target("blocks.*", ("ff*",), ("attn*",))]
    modules = [linear("blocks.0.ff"), linear("blocks.0.attn"), linear("blocks.0.rest")]
    plan = article_plan(["blocks.0"], [2], targets, modules)
    assert [(planned.name, planned.factor) for planned in plan] == [("blocks.0.ff", 2), ("blocks.0.attn", 4)]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (linear("a"), "linear"),
        (Module("a", "Linear4bit", (8, 8)), "linear"),
        (Module("a", "QLinear", (8, 8)), "linear"),
        (Module("a", "Fp8Linear", (8, 8)), "linear"),
        (Module("a", "CPUBouncingLinear", (8, 8)), "weight"),
        (Module("a", "Linear", ()), ""),
        (Module("a", "Conv1d", (8, 8, 3)), "conv"),
        (Module("a", "QConv2d", (8, 8, 3, 3)), "conv"),
        (Module("a", "Conv3d", (8, 8, 3, 3, 3)), "conv"),
        (Module("a", "Conv2d", (8, 8)), "weight"),
        (Module("a", "ConvTranspose2d", (8, 8, 3, 3)), "weight"),
        (Module("a", "RMSNorm", (8,)), "weight"),
        (Module("a", "Embedding", (8, 8)), "weight"),
        (Module("a", "SiLU", ()), ""),
    ],
)
def test_what_lycoris_sees_in_a_module(module, kind):
    assert layer_kind(module) == kind


BAD_BLOCKS = {
    "2 blocks and 1 factors": (["transformer_blocks.0", "transformer_blocks.1"], [1]),
    "the factor of block 'transformer_blocks.0' is 0": (["transformer_blocks.0"], [0]),
    "block 'transformer_blocks.0' is named twice": (["transformer_blocks.0"] * 2, [1, 1]),
    "block 'blocks.0' lies in none of the block lists": (["blocks.0"], [1]),
    "block '0' lies in none of the block lists": (["0"], [1]),
}


@pytest.mark.parametrize("text", BAD_BLOCKS)
def test_blocks_that_do_not_fit(text):
    blocks, factors = BAD_BLOCKS[text]
    with fails(text):
        article_config(blocks, factors, SD3)
    with fails(text):
        article_plan(blocks, factors, SD3, [linear("transformer_blocks.0.attn.to_q")])


def test_a_block_that_nothing_can_be_put_on():
    modules = [
        linear("transformer_blocks.0.ff"),
        Module("transformer_blocks.1.ff", "CPUBouncingLinear", (8, 8)),
    ]
    with fails("can adapt in block 'transformer_blocks.1'"):
        article_plan(["transformer_blocks.0", "transformer_blocks.1"], [1, 1], SD3, modules)


# Files


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "lycoris_config.json"
    config = article_config(["transformer_blocks.0"], [1], SD3)
    write_config(path, config)
    assert read_config(path) == config
    assert path.read_bytes() == config_bytes(config)
    assert os.listdir(path.parent) == [path.name]


def test_write_does_not_overwrite(tmp_path):
    path = tmp_path / "lycoris_config.json"
    path.write_text("mine")
    with fails("exists already; it is not overwritten without --force"):
        write_config(path, {})
    assert path.read_text() == "mine"
    write_config(path, {}, force=True)
    assert read_config(path) == {}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "holds a JSON list"), (b"", "is not JSON")],
)
def test_a_config_that_is_no_config(tmp_path, content, text):
    path = tmp_path / "lycoris_config.json"
    path.write_bytes(content)
    with fails(text):
        read_config(path)


def test_a_config_that_cannot_be_read(tmp_path):
    with fails("No such file"):
        read_config(tmp_path / "absent.json")
    with fails("cannot read"):
        read_config(tmp_path)


def test_a_run_without_options(tmp_path):
    with fails("an imported run has none"):
        read_options(tmp_path)
    (tmp_path / "config.json").write_text('{"--seed": 1}')
    assert read_options(tmp_path) == {"--seed": 1}


# The environment

LYCORIS = {"algo": "lokr"}
OPTIONS = {
    "--model_type": "full",
    "--model_family": "sd3",
    "--output_dir": "output/sd35-probe",
    "--layerprobe": True,
    "--layerprobe_samples": 100,
    "layerprobe_dir": "somewhere",
    "--lycoris_config": "config/sd35-probe/old.json",
    "--seed": 42,
    "--validation_prompt": None,
}


def make(tmp_path: Path, name: str = "sd35-weighted", options: dict = OPTIONS, **more: bool) -> dict:
    made = environment(name, options, LYCORIS, config_dir=tmp_path / "config", **more)
    assert made.options.parent == tmp_path / "config" / name
    assert sorted(os.listdir(made.options.parent)) == ["config.json", "lycoris_config.json"]
    assert read_config(made.lycoris_config) == LYCORIS
    return read_config(made.options)


def test_the_follow_up_of_a_probe_run(tmp_path):
    written = make(tmp_path)
    assert written == {
        "--model_type": "lora",
        "--model_family": "sd3",
        "--output_dir": "output/sd35-weighted",
        "--lycoris_config": (tmp_path / "config" / "sd35-weighted" / "lycoris_config.json").as_posix(),
        "--seed": 42,
        "--validation_prompt": None,
        "--lora_type": "lycoris",
    }
    assert list(written)[:3] == ["--model_type", "--model_family", "--output_dir"]


def test_options_without_dashes_and_paths_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = environment("next", {"seed": 1, "layerprobe": True, "output_dir": "/data/runs/probe/"}, LYCORIS)
    assert read_config(made.options) == {
        "seed": 1,
        "output_dir": "/data/runs/next",
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "config/next/lycoris_config.json",
    }
    assert made.output_dir == "/data/runs/next"


def test_an_option_given_in_two_spellings_is_written_once(tmp_path):
    options = {"--model_type": "full", "model_type": "lora", "-layerprobe": True, " --layerprobe_dir": "x"}
    written = make(tmp_path, options=options)
    assert written["--model_type"] == "lora"
    assert not {"model_type", "-layerprobe", " --layerprobe_dir"} & set(written)


@pytest.mark.parametrize("options", [{}, {"output_dir": "results"}, {"--output_dir": None}])
def test_an_output_dir_without_a_parent(tmp_path, options):
    made = environment("next", options, LYCORIS, config_dir=tmp_path)
    assert made.output_dir == "output/next"


def test_the_output_dir_is_not_the_probes(tmp_path):
    with fails("the probe run's own output_dir; choose another name"):
        make(tmp_path, name="sd35-probe")
    assert not (tmp_path / "config").exists()


option_names = st.text(st.characters(codec="ascii", categories=("Ll", "Nd")), min_size=1, max_size=12)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
OWN = {"model_type", "lora_type", "lycoris_config", "output_dir"}


@given(st.dictionaries(option_names.filter(lambda name: name not in OWN), values), st.booleans())
def test_every_other_option_stays(tmp_path_factory, options, dashes):
    prefix = "--" if dashes else ""
    given_options = {prefix + name: value for name, value in options.items()}
    folder = tmp_path_factory.mktemp("config")
    written = read_config(environment("next", given_options, LYCORIS, config_dir=folder).options)
    own = {key for key in written if key.lstrip("-") in OWN}
    assert len(own) == 4
    kept = {key: value for key, value in given_options.items() if not key.lstrip("-").startswith("layerprobe")}
    assert {key: written[key] for key in written if key not in own} == kept


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", "../up", "/abs", ".hidden", "sd3.5", "-x", "a b", "a\n", "default", "~"],
)
def test_a_name_that_simpletuner_does_not_find(tmp_path, name):
    with fails("cannot name a SimpleTuner environment"):
        make(tmp_path, name=name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["sd35-weighted", "a", "run_2", "x+y", "größer"])
def test_a_plain_name(name):
    check_environment_name(name)


@pytest.mark.parametrize("existing", ["config.json", "lycoris_config.json", "config.toml", "config.env"])
def test_an_environment_is_not_overwritten(tmp_path, existing):
    path = tmp_path / "config" / "mine" / existing
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with fails(f"{existing} exists already"):
        make(tmp_path, name="mine")
    assert os.listdir(path.parent) == [existing]
    assert path.read_text() == "mine"
    made = environment("mine", OPTIONS, LYCORIS, config_dir=tmp_path / "config", force=True)
    assert read_config(made.options)["--lora_type"] == "lycoris"


def test_an_environment_beside_other_files(tmp_path):
    folder = tmp_path / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "multidatabackend.json").write_text("[]")
    environment("mine", OPTIONS, LYCORIS, config_dir=tmp_path / "config")
    assert sorted(os.listdir(folder)) == ["config.json", "lycoris_config.json", "multidatabackend.json"]


@pytest.fixture
def second_rename_fails(monkeypatch):
    """The disk gives out between the two files."""
    rename, renamed = os.replace, []

    def once(source, target):
        if renamed:
            raise OSError(28, "No space left on device", str(source), None, str(target))
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", once)


@pytest.mark.usefixtures("second_rename_fails")
def test_both_files_or_neither(tmp_path):
    with fails("config.json: No space left on device"):
        make(tmp_path)
    assert os.listdir(tmp_path / "config") == []


@pytest.mark.usefixtures("second_rename_fails")
def test_both_files_or_those_before(tmp_path):
    folder = tmp_path / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    with fails("No space left on device"):
        make(tmp_path, name="mine", force=True)
    assert os.listdir(folder) == ["config.json"]
    assert (folder / "config.json").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "config").write_text("a file")
    with fails("cannot write"):
        make(tmp_path)
    assert os.listdir(tmp_path) == ["config"]


@pytest.mark.parametrize("prefix", ["", "--"])
def test_options_that_start_programs_are_left_out(tmp_path, prefix):
    given_options = {prefix + "post_checkpoint_script": "rm -rf {local_checkpoint_path}", prefix + "seed": 7}
    assert programs(given_options) == ["post_checkpoint_script"]
    written = read_config(environment("next", given_options, LYCORIS, config_dir=tmp_path).options)
    assert written[prefix + "seed"] == 7
    assert not any("script" in name for name in written)
    assert programs({prefix + "post_checkpoint_script": None}) == []
