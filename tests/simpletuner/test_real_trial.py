"""A trial by the real SimpleTuner: trained, judged, cut off and taken up again."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_real_paired import by_place
from test_real_run import RUN

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.trial import work

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")
BACKENDS = Path("config") / "tiny-probe" / "multidatabackend.json"


@pytest.fixture
def started(simpletuner, tiny, monkeypatch):
    """A folder with a probe run and a held-out backend, and how often SimpleTuner was started for which training.

    The trial starts SimpleTuner as it does, but for the seconds that importing it takes: in a fork of the tests' own.
    `cut` names logs whose next training is cut off when it has begun.
    """
    folder = tiny(max_train_steps=12)
    backends = json.loads((folder / BACKENDS).read_text())
    image = next(each for each in backends if each.get("dataset_type", "image") == "image")
    new = image | {"id": "new", "instance_data_dir": "new", "cache_dir_vae": "cache/vae/new", "disabled": True}
    (folder / BACKENDS).write_text(json.dumps([*backends, new]))
    flip(folder / image["instance_data_dir"], folder / "new")
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    monkeypatch.chdir(folder)
    count: Counter[str] = Counter()
    cut: list[str] = []

    def train(config: Path, log: Path) -> None:
        environment = {"CONFIG_PATH": str(config.with_suffix("")), "CONFIG_BACKEND": "json"}
        training = simpletuner.start(folder, "trial", environment=environment, log=str(log))
        count[str(log)] += 1
        if str(log) in cut:
            cut.remove(str(log))
            training.wait_for("Epoch 1/")
            os.kill(training.pid, 9)
            training.result()
            raise KeyboardInterrupt
        result = training.result()
        assert result.code == 0, result.log[-3000:]

    monkeypatch.setattr(work, "train", train)
    return folder, count, cut


def flip(source: Path, target: Path) -> None:
    """Five of the photographs turned over, with their captions: others, as a held-out image has to be."""
    from PIL import Image, ImageOps

    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.suffix in (".png", ".jpg"))[-5:]:
        ImageOps.flip(Image.open(path)).save(target / path.name)
        shutil.copy(path.with_suffix(".txt"), target)


def new(name: str, *options: str) -> int:
    asked = ["--params", "30k", "--steps", "2", "--held-out", "new", "--seeds", "1", "--arms", "uniform"]
    return main(["trial", "new", name, "--run", str(RUN), *asked, *options])


def test_a_trial_that_is_cut_off_ends_as_one_that_is_not(started, capsys):
    folder, count, cut = started
    for name in ("whole", "parts"):
        assert new(name) == 0
    assert "2 trainings of 2 steps (2 that count), each judged on 5 held-out images (new)" in capsys.readouterr().out
    assert main(["trial", "run", "whole"]) == 0
    said = capsys.readouterr().out
    assert "[2/2] uniform-110 seed 1: trained in" in said and "next: layerprobe trial report whole" in said

    training = "parts/trainings/uniform/seed-1"
    cut += [f"{training}/train.log", f"{training}/held-out/probe.log"]
    for _ in range(2):
        assert main(["trial", "run", "parts"]) == 130
    assert not (folder / training / "done.json").exists()
    assert main(["trial", "run", "parts", "--only", "uniform/1"]) == 0
    assert "[1/1] uniform seed 1" in capsys.readouterr().out
    assert main(["trial", "run", "parts"]) == 0
    # What was whole was not made again: only the cut-off probe brought its training back.
    assert count[f"{training}/train.log"] == 3 and count["parts/prepared/train/train.log"] == 1
    assert count["parts/trainings/uniform-110/seed-1/train.log"] == 1

    losses = {}
    for name in ("whole", "parts"):
        for arm in ("uniform", "uniform-110"):
            run = by_place(load_run(folder / name / "trainings" / arm / "seed-1" / "held-out" / "layerprobe"))
            assert Counter(Counter(image for image, _ in run).values()) == {10: 5}
            losses[name, arm] = np.array([run[place]["loss"] for place in sorted(run)], dtype=np.float64)
    assert np.array_equal(losses["whole", "uniform"], losses["parts", "uniform"])
    assert np.array_equal(losses["whole", "uniform-110"], losses["parts", "uniform-110"])
    assert not np.array_equal(losses["whole", "uniform"], losses["whole", "uniform-110"])

    capsys.readouterr()
    # The report says the means of these losses, and that one seed gives no interval.
    assert main(["trial", "report", "whole", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    for arm in ("uniform", "uniform-110"):
        assert made["arms"][arm]["loss"] == pytest.approx(losses["whole", arm].mean(), rel=1e-9)
    change = (losses["whole", "uniform-110"] - losses["whole", "uniform"]).mean()
    assert made["arms"]["uniform-110"]["difference"] == pytest.approx(change, rel=1e-6)
    assert main(["trial", "report", "whole"]) == 0
    assert "one seed" in capsys.readouterr().out
    assert "<html" in (folder / "whole" / "report.html").read_text()


def test_what_a_trial_refuses(started, capsys):
    folder, count, _ = started
    assert new("trial", "--arms", "uniform,ablation") == 1
    assert_one_line(capsys, "record it with layerprobe_ablation: blocks, or leave the arm out")
    assert new("trial", "--params", "3B") == 1
    assert_one_line(capsys, "the arm 'uniform' has")
    photograph = next((folder / "new").glob("*.jpg"))
    source = next(path for path in folder.rglob(photograph.name) if path.parent.name != "new")
    shutil.copy(source, folder / "new" / "again.jpg")
    assert new("trial") == 1
    assert_one_line(capsys, f"new/again.jpg is trained on too, as {source.relative_to(folder)}")
    (folder / "new" / "again.jpg").unlink()
    assert not (folder / "trial").exists()

    assert new("trial") == 0
    assert new("trial") == 1
    assert_one_line(capsys, "exists already")
    assert main(["trial", "report", "trial"]) == 1
    assert_one_line(capsys, "has no seed yet for which every arm is trained")
    (folder / "trial" / "arms" / "uniform" / "lycoris_config.json").write_text("{}")
    assert main(["trial", "run", "trial"]) == 1
    assert_one_line(capsys, "was changed after the trial was made")
    assert not count


def assert_one_line(capsys, says: str) -> None:
    err = capsys.readouterr().err
    assert says in err and err.count("layerprobe: error: ") == 1 and "Traceback" not in err, err
