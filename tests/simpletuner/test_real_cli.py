"""Whole command lines: signals through `simpletuner train`, errors, WebUI jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_real_run import RUN, run_of, wait_for_batches

from simpletuner_layerprobe.training.options import OPTIONS

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")},
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
}


# The command itself is a fork of the process that has SimpleTuner imported, what it starts is all new.
PROBE = {"SIMPLETUNER_LAYERPROBE": "1", "PATH": ENVIRONMENT["PATH"]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_simpletuner_train_ends_with_code_0_and_the_last_line(simpletuner, tiny, number):
    """Ctrl-C goes to the command alone, whose children have a session of their own; a scheduler's SIGTERM to all."""
    folder = tiny(max_train_steps=1_000_000, layerprobe_flush_seconds=1)
    command = simpletuner.start_script(folder, BIN / "simpletuner", "train", "env=tiny-probe", environment=PROBE)
    try:
        wait_for_batches(folder, 1, command.text, ended=command.ended)
        if number == signal.SIGTERM:
            (accelerate,) = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
            os.killpg(int(accelerate), number)
        os.kill(command.pid, number)
        result = command.result()
    except BaseException:
        if not command.ended():
            os.kill(command.pid, signal.SIGKILL)
        raise
    assert result.code == 0, result.log[-4000:]
    last = result.log.rstrip().splitlines()[-1]
    total = run_of(folder).samples
    assert f"layerprobe: {total} samples in" in last and "samples/s" in last
    assert f"{RUN}" in last and "next: layerprobe report" in last


def test_an_error_is_one_line_after_simpletuner_train_too(simpletuner, tiny):
    folder = tiny(layerprobe_sigmas="even")
    result = simpletuner.start_script(
        folder, BIN / "simpletuner", "train", "env=tiny-probe", out="out.txt", environment=PROBE
    ).result()
    assert result.code == 1
    assert "layerprobe: error: layerprobe_sigmas is 'even'" in result.log
    assert "Traceback" not in (folder / "out.txt").read_text() + result.log


def test_a_job_of_the_webui(simpletuner, tiny):
    folder = tiny(max_train_steps=3)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:webui_job")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == 3
    assert "layerprobe: 3 samples in" in result.line("layerprobe: ")
    options = json.loads((folder / RUN / "config.json").read_text())
    assert options["model_family"] == "sd3" and options["layerprobe"] is True


def test_the_options_are_in_the_webuis_training_tab(simpletuner, tiny):
    folder = tiny()
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:webui_fields")
    assert result.code == 0, result.log[-4000:]
    fields = json.loads((folder / "fields.json").read_text())
    assert list(fields) == [option.name for option in OPTIONS]
    assert fields["layerprobe_sigmas"]["choices"] == ["uniform", "stratified", "training"]
    assert all(field["help"] and field["label"] and field["section"] == "layer_probe" for field in fields.values())
