"""The SimpleTuner environment of a plan: the probe run's options, changed where they must be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from failing import fails

from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.training.environment import environment, programs, read_options

OPTIONS = {
    "--model_type": "full",
    "--model_family": "sd3",
    "--output_dir": "output/sd35-probe",
    "--layerprobe": True,
    "--layerprobe_samples": 100,
    "layerprobe_dir": "somewhere",
    "--lycoris_config": "config/sd35-probe/old.json",
    "--lora_rank": 8,
    "--seed": 42,
    "--validation_prompt": None,
}


class Lycoris:
    """What a LoKr plan gives; None takes an option away."""

    def files(self) -> dict[str, bytes]:
        return {"lycoris_config.json": b'{"algo": "lokr"}'}

    def options(self, folder: str) -> dict[str, Any]:
        config = f"{folder}/lycoris_config.json"
        return {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": config, "lora_rank": None}


def make(tmp_path: Path, options: dict, name: str = "sd35-weighted") -> dict:
    """The options written; a file that is there already stays."""
    (tmp_path / "config" / name).mkdir(parents=True)
    (tmp_path / "config" / name / "multidatabackend.json").touch()
    made = environment(name, options, Lycoris(), config_dir=tmp_path / "config")
    assert made.folder == tmp_path / "config" / name and made.name == name
    assert sorted(os.listdir(made.folder)) == ["config.json", "lycoris_config.json", "multidatabackend.json"]
    assert [path.name for path in made.written] == ["config.json", "lycoris_config.json"]
    assert read_object(made.written[1], "") == {"algo": "lokr"}
    return read_object(made.written[0], "")


def test_the_follow_up_of_a_probe_run(tmp_path):
    written = make(tmp_path, OPTIONS)
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
    options = {"seed": 1, "layerprobe": True, "layerprobe_guard": "stop", "output_dir": "/data/runs/probe/"}
    made = environment("next", options, Lycoris())
    assert read_object(made.written[0], "") == {
        "seed": 1,
        "layerprobe_guard": "stop",  # the one that is for trainings
        "output_dir": "/data/runs/next",
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "config/next/lycoris_config.json",
    }
    assert made.output_dir == "/data/runs/next"


def test_an_option_given_in_two_spellings_is_written_once(tmp_path):
    options = {"--model_type": "full", "model_type": "lora", "-layerprobe": True, " --layerprobe_dir": "x"}
    written = make(tmp_path, options)
    assert written["--model_type"] == "lora"
    assert not {"model_type", "-layerprobe", " --layerprobe_dir"} & set(written)


@pytest.mark.parametrize("options", [{}, {"output_dir": "results"}, {"--output_dir": None}])
def test_an_output_dir_without_a_parent(tmp_path, options):
    assert environment("next", options, Lycoris(), config_dir=tmp_path).output_dir == "output/next"


def test_the_output_dir_is_not_the_probes(tmp_path):
    with fails("the probe run's own output_dir; choose another name"):
        environment("sd35-probe", OPTIONS, Lycoris(), config_dir=tmp_path / "config")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["", "..", "a/b", "a\\b", "/abs", "sd3.5", "-x", "a b", "a\n", "default", "~"],
)
def test_a_name_that_simpletuner_does_not_find(tmp_path, name):
    with fails("cannot name a SimpleTuner environment"):
        environment(name, OPTIONS, Lycoris(), config_dir=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_dry_run_writes_nothing(tmp_path):
    made = environment("größer_2+x", OPTIONS, Lycoris(), config_dir=tmp_path, dry_run=True)
    assert made.folder == tmp_path / "größer_2+x" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("existing", ["config.json", "lycoris_config.json", "config.toml", "config.env"])
def test_an_environment_is_not_overwritten(tmp_path, existing, dry_run):
    path = tmp_path / "config" / "mine" / existing
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with fails(f"{existing} exists already"):
        environment("mine", OPTIONS, Lycoris(), config_dir=tmp_path / "config", dry_run=dry_run)
    assert os.listdir(path.parent) == [existing] and path.read_text() == "mine"
    made = environment("mine", OPTIONS, Lycoris(), config_dir=tmp_path / "config", force=True)
    assert read_object(made.written[0], "")["--lora_type"] == "lycoris"


def test_options_that_start_programs_are_left_out(tmp_path):
    given_options = {"--post_checkpoint_script": "rm -rf {local_checkpoint_path}", "disk_low_script": "x", "--seed": 7}
    assert programs(given_options) == ["post_checkpoint_script", "disk_low_script"]
    written = make(tmp_path, given_options)
    assert written["--seed"] == 7
    assert not any("script" in name for name in written)
    assert programs({"post_checkpoint_script": None}) == []


def test_the_options_of_a_run(tmp_path):
    with fails("an imported run has none"):
        read_options(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"--seed": 1}))
    assert read_options(tmp_path) == {"--seed": 1}
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    (tmp_path / "config.json").symlink_to(tmp_path / "other.json")
    with fails("is not a plain file"):
        read_options(tmp_path)
