"""A trial without SimpleTuner: arms, data, order of the trainings, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lokr_models import sd3_blocks
from PIL import Image
from synthetic_run import sd3_modules, write_ablated_run

from simpletuner_layerprobe.api import load, plan
from simpletuner_layerprobe.errors import ConfigError, ProbeError
from simpletuner_layerprobe.trial import process
from simpletuner_layerprobe.trial.arms import arm_names, make_arms, shuffled_plans
from simpletuner_layerprobe.trial.data import split_data
from simpletuner_layerprobe.trial.results import judging_images, tuning_images
from simpletuner_layerprobe.trial.schedule import Training, best, finals, parse_only, sweeps, wanted
from simpletuner_layerprobe.trial.settings import ArmFacts, Trial
from simpletuner_layerprobe.trial.work import claimed, duration


def a_trial(
    folder: Path, arms=("uniform", "plan", "shuffle-1", "shuffle-2"), rates=(1e-3, 2e-3), seeds=(1, 2)
) -> Trial:
    return Trial(
        folder, "run", "sd3 medium", 1000, tuple(ArmFacts(name, 1000, "") for name in arms), seeds, 10, rates, 1001, 1,
        ("new",), 20,
    )  # fmt: skip


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def backends(tmp_path: Path) -> Path:
    """Two folders with other pictures, and the backends that name them."""
    for number in range(3):
        picture(tmp_path / "train" / f"{number}.png", number)
        picture(tmp_path / "new" / "deep" / f"{number}.webp", 100 + number)
    made = [
        {"id": "train", "type": "local", "instance_data_dir": str(tmp_path / "train")},
        {"id": "new", "dataset_type": "image", "instance_data_dir": str(tmp_path / "new"), "disabled": True},
        {"id": "text", "dataset_type": "text_embeds", "default": True},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(made))
    return path


def test_names_of_arms():
    assert arm_names("plan,inverse") == ("uniform", "uniform-110", "plan", "inverse")
    assert arm_names("shuffle:2, uniform") == ("uniform", "uniform-110", "plan", "shuffle-1", "shuffle-2")
    assert arm_names("") == ("uniform", "uniform-110")


@pytest.mark.parametrize("text", ["shuffle:0", "shuffle:100", "plans", "shuffle-1", "plan;inverse"])
def test_what_is_no_arm(text):
    with pytest.raises(ConfigError, match="there is no arm"):
        arm_names(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a model of 6 blocks, of which the last has no text part."""
    blocks = {"image": sd3_blocks(6), "text": sd3_blocks(5)}
    folder = tmp_path_factory.mktemp("trial") / "run"
    write_ablated_run(folder, blocks, 300, np.linspace(0.1, 0.9, 6), modules=sd3_modules(6, 96))
    return load(folder)


def test_shuffles_move_factors_between_blocks_of_one_shape_alone(run):
    of = plan(run, params=60_000, direction="more-change-more-capacity", contrast=4.0)
    size = {group: group.parameters("lokr", number) for group, number in zip(of.groups, of.numbers, strict=True)}
    for shuffled, order in shuffled_plans(of, 5):
        assert shuffled.parameters == of.parameters and shuffled.numbers != of.numbers
        assert order[5] == 5 and sorted(order) == list(range(6))
        for group, number in zip(shuffled.groups, shuffled.numbers, strict=True):
            twin = next(g for g in of.groups if (g.number, g.kind) == (order[group.number], group.kind))
            assert group.parameters("lokr", number) == size[twin]
    assert shuffled_plans(of, 5)[2][1] == shuffled_plans(of, 3)[2][1]


def test_shuffles_that_are_not_there(run):
    equal = plan(run, params=60_000, direction="uniform")
    equal = replace(equal, numbers=(4,) * len(equal.groups))
    with pytest.raises(ConfigError, match="there are 0: too few blocks of equal shape"):
        shuffled_plans(equal, 1)


def test_an_arm_that_cannot_have_the_size_is_named(run):
    with pytest.raises(ConfigError, match=r"the arm 'uniform' has .* plans of its kind have"):
        make_arms(run, ("uniform",), 10**9, contrast=4.0)


def test_a_held_out_backend_leaves_the_training(backends):
    data = split_data(backends, "new")
    assert [each["id"] for each in data.train] == ["train", "text"]
    assert [each["id"] for each in data.held_out] == ["new", "text"]
    assert data.held_out[0]["disabled"] is False and data.held_out[0]["repeats"] == 9
    assert (data.held_out_ids, data.images, data.notes) == (("new",), 3, ())


def test_a_held_out_file_may_name_other_data(backends, tmp_path):
    read = json.loads(backends.read_text())
    backends.write_text(json.dumps([read[0], read[2]]))
    other = tmp_path / "other.json"
    other.write_text(json.dumps([read[1]]))
    data = split_data(backends, str(other))
    assert [each["id"] for each in data.held_out] == ["new", "text"] and data.images == 3


def test_an_image_in_both_is_refused_whatever_its_name_and_format(backends, tmp_path):
    Image.open(tmp_path / "train" / "2.png").save(tmp_path / "new" / "copy.bmp")
    with pytest.raises(ConfigError, match=r"copy\.bmp is trained on too, as .*2\.png"):
        split_data(backends, "new")


def test_images_that_are_elsewhere_cannot_be_compared_and_that_is_said(backends):
    read = json.loads(backends.read_text())
    read[0]["type"] = "huggingface"
    backends.write_text(json.dumps(read))
    data = split_data(backends, "new")
    assert "not compared image by image: train" in data.notes[0] and data.images == 3


@pytest.mark.parametrize(
    ("held_out", "says"), [("old", "neither a file nor one of those in .*: train, new"), ("text", "neither a file")]
)
def test_backends_that_are_not_there(backends, held_out, says):
    with pytest.raises(ConfigError, match=says):
        split_data(backends, held_out)


def test_something_must_be_left_to_train_on(backends):
    read = json.loads(backends.read_text())
    backends.write_text(json.dumps(read[1:]))
    with pytest.raises(ConfigError, match="no backend left to train on"):
        split_data(backends, "new")


def test_the_sweep_takes_the_shuffles_as_one_arm(tmp_path):
    trial = a_trial(tmp_path)
    assert {(each.arm, each.rate) for each in sweeps(trial)} == {
        (arm, rate) for arm in ("uniform", "plan", "shuffle-1") for rate in (1e-3, 2e-3)
    }
    assert {each.seed for each in sweeps(trial)} == {1001}
    made = finals(trial, {"uniform": 1e-3, "shuffle-2": 2e-3})
    assert [(each.arm, each.seed) for each in made] == [
        ("uniform", 1), ("shuffle-2", 1), ("uniform", 2), ("shuffle-2", 2)
    ]  # fmt: skip
    assert best({2e-3: 0.5, 1e-3: 0.5, 4e-3: float("inf")}) == 1e-3


def test_a_part_of_a_trial_brings_the_sweep_that_it_needs(tmp_path):
    trial = a_trial(tmp_path)
    all_of = [*sweeps(trial), *finals(trial, dict.fromkeys(("uniform", "plan", "shuffle-1", "shuffle-2"), 1e-3))]
    only = parse_only("shuffle-2/1", trial)
    assert {each.name for each in wanted(all_of, only)} == {
        "shuffle-1/rate-0.001", "shuffle-1/rate-0.002", "shuffle-2/seed-1"
    }  # fmt: skip
    assert {each.name for each in wanted(all_of, parse_only("plan/sweep", trial))} == {
        "plan/rate-0.001", "plan/rate-0.002"
    }  # fmt: skip
    assert len(wanted(all_of, parse_only("plan,uniform", trial))) == 8
    assert wanted(all_of, parse_only(None, trial)) == all_of
    for text in ("plan/3", "plans", "/1", "plan/1/2"):
        with pytest.raises(ConfigError, match="expected ARM, ARM/SEED or ARM/sweep"):
            parse_only(text, trial)


def test_a_fifth_of_the_images_chooses_and_the_others_judge(tmp_path):
    images = np.random.default_rng(0).integers(0, 2**63, 40).astype(np.uint64).repeat(10)
    tuning, judging = (f(a_trial(tmp_path), images) for f in (tuning_images, judging_images))
    assert len(tuning) == 8 and len(judging) == 32 and not set(tuning) & set(judging)
    few = images[:200]
    assert len(tuning_images(a_trial(tmp_path), few)) == len(judging_images(a_trial(tmp_path), few)) == 20
    assert len(tuning_images(a_trial(tmp_path, rates=()), images)) == 0


def test_a_trial_is_read_back_as_it_was_written(tmp_path):
    trial = a_trial(tmp_path)
    (tmp_path / "trial.json").write_text(json.dumps(trial.to_json()))
    assert Trial.load(tmp_path) == trial


@pytest.mark.parametrize("name", ["", "..", "../mine", "/mine", "plan/../../mine"])
def test_an_arm_leads_out_of_no_trial(tmp_path, name):
    """What lies in the folder of a training is removed before it is trained again."""
    (tmp_path / "trial.json").write_text(json.dumps(a_trial(tmp_path, arms=("uniform", name)).to_json()))
    with pytest.raises(ConfigError, match="is damaged"):
        Trial.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is no trial"),
        ("{", "not JSON"),
        ('{"schema": 2}', "has schema 2"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 1, "arms": 3}', "is damaged"),
    ],
)
def test_what_is_no_trial(tmp_path, text, says):
    if text is not None:
        (tmp_path / "trial.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        Trial.load(tmp_path)


def test_a_config_that_was_changed_is_refused(tmp_path):
    trial = a_trial(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read .*make the trial anew"):
        trial.require_unchanged()
    for arm in trial.arms:
        trial.arm_folder(arm.name).mkdir(parents=True)
        (trial.arm_folder(arm.name) / "lycoris_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="was changed after the trial was made"):
        trial.require_unchanged()


def test_a_folder_belongs_to_one_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from simpletuner_layerprobe.trial.work import claimed\n"
        "with claimed(Path(sys.argv[1])) as mine: print(mine)"
    )
    with claimed(tmp_path / "a" / "seed-1") as mine:
        assert mine
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a" / "seed-1")], capture_output=True, text=True, check=True
        )
    assert other.stdout.strip() == "False"
    with claimed(tmp_path / "a" / "seed-1") as mine:
        assert mine


def program(tmp_path: Path, monkeypatch, text: str) -> Path:
    """A training whose `simpletuner` is this shell script."""
    script = tmp_path / "simpletuner"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setattr(process, "simpletuner", lambda: str(script))
    config = tmp_path / "plan" / "seed-1" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    return config


def test_a_training_gets_its_config_and_fixed_hashes(tmp_path, monkeypatch):
    config = program(tmp_path, monkeypatch, 'echo "$@" $CONFIG_PATH $CONFIG_BACKEND $PYTHONHASHSEED')
    process.train(config, tmp_path / "log")
    assert (tmp_path / "log").read_text().split() == ["train", "env=seed-1", str(config.with_suffix("")), "json", "0"]


def test_a_training_that_fails_says_why_in_a_line(tmp_path, monkeypatch):
    config = program(
        tmp_path, monkeypatch, "printf '\\033[31mValueError: no such optimizer\\033[0m\\n'; echo bye; exit 3"
    )
    with pytest.raises(ProbeError, match=r"ended with 3: ValueError: no such optimizer \(all of it: .*log\)"):
        process.train(config, tmp_path / "log")


def test_what_an_earlier_start_left_running_is_ended(tmp_path, monkeypatch):
    """Also where it is in a session of its own, as SimpleTuner's training is; another training's is left alone."""
    config = program(tmp_path, monkeypatch, "exit 0")
    code = "import time; time.sleep(600)"
    marks = [str(config.parent.resolve()), str(config.parent.resolve().with_name("seed-2"))]
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {process.MARK: mark}, start_new_session=True)
        for mark in marks
    ]
    try:
        time.sleep(0.2)
        process.train(config, tmp_path / "log")
        assert started[0].poll() is not None and started[1].poll() is None
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_no_simpletuner(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no `simpletuner` command"):
        process.simpletuner()


def test_times():
    assert [duration(seconds) for seconds in (5.4, 75, 4000)] == ["5 s", "1 min 15 s", "1 h 6 min"]


def test_names_of_folders(tmp_path):
    trial = a_trial(tmp_path)
    assert Training("plan", 2, 1e-3).folder(trial) == tmp_path / "trainings" / "plan" / "seed-2"
    assert Training("plan", 1001, 5e-4, sweep=True).folder(trial).name == "rate-0.0005"
