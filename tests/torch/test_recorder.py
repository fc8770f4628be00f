"""Rows from the device to the run folder: what is kept, written, refused and tried again."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails, no_file_can_be_opened
from synthetic_run import manifest

from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.run.manifest import create_run
from simpletuner_layerprobe.training.facts import sample_facts
from simpletuner_layerprobe.training.noise import RULES
from simpletuner_layerprobe.training.noise_check import NoiseCheck
from simpletuner_layerprobe.training.recorder import Recorder
from simpletuner_layerprobe.training.stop import Stop

FLOW = SimpleNamespace()


def recorder(folder: Path, seen: dict[int, int] | None = None) -> Recorder:
    run = create_run(folder, manifest({"image": ("a", "b")}, readings=("last",), settings={"noise": "flow"}))
    return Recorder(str(folder), run, 0, NoiseCheck(RULES["flow"], "sd3"), Counter(seen or {}), Stop())


def keep(target: Recorder, sigmas: list[float], images: list[int] | None = None, **options: Any) -> None:
    count = len(sigmas)
    facts = sample_facts({}, count) | {"image": images or [0] * count}
    distances = {("image", "last"): options.get("distances", torch.full((count, 2), 0.25))}
    tokens_B = torch.full((count,), -1, dtype=torch.int32)
    target.keep(
        distances, torch.tensor(sigmas), torch.full((count,), 0.5), tokens_B, facts, options.get("count", count)
    )


def test_rows_and_how_often_their_images_came_before(tmp_path):
    target = recorder(tmp_path, {7: 2})
    keep(target, [0.25, 0.5, 0.75], [7, 8, 7])
    keep(target, [0.125, 0.875], [8, 7], count=1)
    target.flush()
    keep(target, [0.0, 1.0], [7, 0])
    target.close()
    run = load_run(tmp_path)
    assert run.sigma.tolist() == [0.25, 0.5, 0.75, 0.125, 0.0, 1.0]
    assert run.facts["repeat"].tolist() == [2, 0, 3, 1, 4, -1]
    assert run.facts["text_tokens"].tolist() == [-1] * 6
    assert [file.batches for file in run.files] == [2]
    assert all("noise_difference" not in notes for notes in run.files[0].notes)


def test_rows_that_the_disk_refuses_are_written_later(tmp_path):
    target = recorder(tmp_path)
    keep(target, [0.25])
    with no_file_can_be_opened(), fails("cannot write"):
        target.flush()
    keep(target, [0.5])
    target.flush()
    assert load_run(tmp_path).sigma.tolist() == [0.25, 0.5]


def test_rows_that_are_lost_at_the_end_are_counted(tmp_path):
    target = recorder(tmp_path)
    keep(target, [0.25])
    target.flush()
    target._writer.close()  # so that the next rows need a new file
    keep(target, [0.5, 0.75])
    with no_file_can_be_opened(), fails("the 2 samples since the last flush are lost, all before them are kept"):
        target.close()
    assert load_run(tmp_path).sigma.tolist() == [0.25]


def test_wrong_noise_writes_nothing_more(tmp_path):
    target = recorder(tmp_path)
    good = torch.randn(2, 4, 8, 8)
    batch = {"latents": good, "noise": torch.randn_like(good)}
    for sigma, said in ((0.25, 0.25), (0.25, 0.75)):
        batch["noisy_latents"] = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
        target.check.add(FLOW, batch, torch.full((2,), said))
        keep(target, [said, said])
        if said == sigma:
            target.flush()
    with fails("mixed with noise at sigma 0.250, and its batch says sigma 0.750"):
        target.flush()
    target.close()
    run = load_run(tmp_path)
    assert run.sigma.tolist() == [0.25, 0.25]
    assert float(run.files[0].notes[0]["noise_difference"]) < 1e-5


def test_the_first_step_is_checked_at_once(tmp_path):
    target = recorder(tmp_path)
    latents, noise = torch.randn(2, 2, 4, 8, 8).unbind()
    target.check.add(FLOW, {"latents": latents, "noise": noise, "noisy_latents": noise}, torch.full((2,), 0.5))
    with fails("mixed with noise at sigma 1.000"):
        keep(target, [0.5, 0.5])


@pytest.mark.parametrize("sigma", [-0.01, 1.01, float("nan")])
def test_a_sigma_outside_its_range_is_refused(tmp_path, sigma):
    target = recorder(tmp_path)
    keep(target, [0.5, sigma])
    with fails("by the rule 'flow', expected 0 to 1"):
        target.flush()
    target.close()
    assert load_run(tmp_path).samples == 0


def test_rounding_beyond_the_range_is_the_end_of_the_range(tmp_path):
    target = recorder(tmp_path)
    keep(target, [1 + 2.0**-23, -(2.0**-25), 0.1])
    target.close()
    assert load_run(tmp_path).sigma.tolist() == [1.0, 0.0, float(np.float32(0.1))]


def test_angles_that_are_not_finite_are_counted(tmp_path):
    target = recorder(tmp_path)
    distances = torch.tensor([[0.1, 0.2], [float("nan"), 0.2], [0.1, float("inf")]])
    keep(target, [0.1, 0.2, 0.3], distances=distances)
    target.close()
    assert target.nonfinite == 2


def test_a_second_ctrl_c_waits_until_rows_are_whole():
    stop = Stop()
    stop._received(2, None)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt), stop.not_now():
        stop._received(2, None)
    with pytest.raises(KeyboardInterrupt):
        stop._received(2, None)


def test_sigterm_interrupts_never(capsys):
    stop = Stop()
    for number in (15, 15, 2, 15):
        stop._received(number, None)
    assert stop.requested and capsys.readouterr().out.count("stopping after this step") == 1
    with pytest.raises(KeyboardInterrupt):
        stop._received(2, None)


def test_after_a_stop_sigterm_is_ignored_for_good():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = Stop()
    try:
        with stop.on_signals():
            pass
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        with stop.on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
