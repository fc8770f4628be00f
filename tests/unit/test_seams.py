from __future__ import annotations

import importlib.util
from pathlib import Path

from simpletuner_layerprobe.training.doctor import checks
from simpletuner_layerprobe.training.seams import SEAMS, missing_seams, missing_seams_in_source


def source_of_trainer() -> Path:
    package = importlib.util.find_spec("simpletuner")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "helpers" / "training" / "trainer.py"


def test_the_installed_simpletuner_has_every_seam():
    assert missing_seams_in_source(source_of_trainer()) == []


def test_a_changed_trainer_is_described(tmp_path):
    text = source_of_trainer().read_text(encoding="utf-8")
    text = text.replace("def init_optimizer(self)", "def init_optimizers(self)")
    text = text.replace("def checkpoint_state_save(self, output_dir,", "def checkpoint_state_save(self, folder,")
    changed = tmp_path / "trainer.py"
    changed.write_text(text, encoding="utf-8")
    assert missing_seams_in_source(changed) == [
        "Trainer.init_optimizer is missing",
        "Trainer.checkpoint_state_save takes (self, folder, suffix), expected (self, output_dir, suffix)",
    ]


def test_a_class_is_checked_as_its_source_is():
    methods = {}
    for name, parameters in SEAMS.items():
        exec(f"def method({', '.join(parameters)}): pass", methods)
        methods[name] = methods["method"]
    complete = type("Trainer", (), methods)
    assert missing_seams(complete) == []
    del complete.train
    assert missing_seams(complete) == ["Trainer.train is missing"]


def test_doctor_without_the_pth_file_says_what_to_do(monkeypatch):
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE", "0")
    results = {check.name: check for check in checks()}
    assert not results["plugin"].ok and "unset SIMPLETUNER_LAYERPROBE" in results["plugin"].remedy
    for name in ("simpletuner", "lycoris-lora", "torch", "Trainer seams", "option registry", "sd3 blocks"):
        assert results[name].ok, results[name]


def test_doctor_notices_an_accelerate_of_another_environment(monkeypatch, tmp_path):
    command = tmp_path / "accelerate"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = {check.name: check for check in checks()}["accelerate command"]
    assert not check.ok and str(command) in check.detail and "activate" in check.remedy
