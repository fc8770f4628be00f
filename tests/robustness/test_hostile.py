"""Hostile names, options and configs: they stay data. Nothing is executed, followed or written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from failing import fails
from synthetic_run import manifest, write_run

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.run.load import RunData
from simpletuner_layerprobe.run.manifest import Module
from simpletuner_layerprobe.training.environment import read_options

BLOCKS = {"image": ("a.0", "a.1", "a.2"), "text": ("a.0", "a.1", "a.2")}


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return write_run(tmp_path / "run", BLOCKS, 60)


def test_hostile_names_stay_text(tmp_path):
    script = "<script>alert(1)</script>\"'&amp;"
    blocks = {"image": (f"a.{script}", "a.1"), "text": (f"a.{script}", "a.1")}
    made = write_run(tmp_path / "run", blocks, 40, family=script, flavour=script)
    assert main(["report", str(made.path)]) == 0
    page = (made.path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for bad in ("\x1b[2J", "a\u202eb", "a\nb", "a\x00b"):
        with fails("expected a printable string"):
            manifest(BLOCKS, family=bad)


def test_a_damaged_run_is_one_line_of_the_command_line(run, capsys):
    path = run.files[0].path
    data = path.read_bytes()
    path.write_bytes(data[:900] + b"x" + data[901:])
    for command in (["status"], ["findings"], ["lokr", "--preset", "article"], ["export"]):
        assert main([*command, str(run.path), *(["x.jsonl"] if command == ["export"] else [])]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("layerprobe: error: stream file ") and path.name in error


def test_options_in_a_run_folder_are_data(run, tmp_path, capsys):
    (run.path / "config.json").symlink_to("/dev/zero")
    with fails("holds no links"):
        read_options(run.path)
    (run.path / "config.json").unlink()
    (run.path / "config.json").write_text('{"a": "\\ud800"}')
    with fails("is not JSON"):
        read_options(run.path)


MODEL = manifest(
    {"image": ("blocks.0",)},
    modules=(
        Module("blocks", "ModuleList", ()),
        Module("blocks.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Linear", (8, 8)),
    ),
)


@pytest.mark.parametrize(
    ("preset", "changes", "text"),
    [
        ({"target_name": ["blocks.(a+)+$b"]}, {}, "take over 1 s to match"),
        ({"target_name": ["(" * 3000]}, {}, "is not a regular expression"),
        ({"target_name": ["a{99999999999}"]}, {}, "is not a regular expression"),
        ({}, {"linear_dim": 2**70}, "linear_dim in"),
        ({}, {"linear_dim": 2**60, "algo": "lora"}, "LyCORIS"),
        ({}, {"factor": 10**30}, "the factor in"),
        ({}, {"preset": "/dev/zero"}, "nor a TOML file"),
    ],
)
def test_hostile_lycoris_configs(tmp_path, monkeypatch, preset, changes, text):
    if "take over" in text:
        monkeypatch.setattr("simpletuner_layerprobe.lokr.form.MATCH_SECONDS", 1.0)
    config = {"algo": "lokr", "multiplier": 1, "linear_dim": 100, "linear_alpha": 1, "apply_preset": preset} | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with fails(text):
        check_config(path, MODEL)
