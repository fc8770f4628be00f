"""A probe-only run inside the real SimpleTuner that ends by itself when its factors are settled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from real import EXAMPLES, SimpleTuner
from test_real_run import run_of, samples_per_rank, set_options

from simpletuner_layerprobe import api

SHARE = 0.5


@pytest.fixture(scope="module")
def twelve_images(simpletuner: SimpleTuner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with all of its photographs: of fewer than eight images nothing is settled."""
    folder = tmp_path_factory.mktemp("twelve") / "tiny"
    return simpletuner.pipeline(folder, EXAMPLES / "tiny_sd3.py", "--out", folder, "--images", 12)


def test_a_run_ends_when_its_factors_are_settled(simpletuner, tiny, twelve_images):
    folder = tiny(
        twelve_images,
        max_train_steps=5000,
        train_batch_size=4,
        layerprobe_sigmas="stratified",
        layerprobe_flush_seconds=0.2,
        layerprobe_stop_when_stable=SHARE,
    )
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:eager_trackers")
    assert result.code == 0, result.log[-4000:]
    assert f"ends by itself when every factor of the preset article is agreed by {SHARE:.1%}" in result.log
    run = run_of(folder)
    assert 100 <= run.samples < 5000 * 4
    assert "6 of 6 factors settled for images like these 12: 50% of" in result.log
    assert "stopping after this step" in result.log
    assert f"layerprobe: {run.samples} samples in" in result.line("layerprobe: ")
    # The judgement of the same samples afterwards, give or take the last step's, says so too.
    confidence = api.load(run.path).confidence(share=SHARE)
    assert confidence.enough and confidence.agreement_K.min() > SHARE - 0.1
    bars = re.findall(r"samples=(\d+)\S*, settled=(\d+)%", result.log)
    assert bars and int(bars[-1][0]) <= run_of(folder).samples and "lr=" not in result.log


def test_two_ranks_end_together_when_the_plan_for_a_budget_is_settled(simpletuner, tiny, twelve_images):
    """Only rank 0 judges; the other one must hear of it. Another preset than in the first start is no other run.

    The budget is beyond the model, so that every replicate has the same plan: it settles when the bins have samples.
    """
    folder = tiny(
        twelve_images,
        max_train_steps=3000,
        train_batch_size=4,
        layerprobe_sigmas="stratified",
        layerprobe_flush_seconds=0.2,
        layerprobe_stop_when_stable=0.5,
        layerprobe_preset="1b",
    )
    results = [
        rank.result() for rank in simpletuner.start_ranks(folder, "tiny-probe", 2, setup="setups.py:eager_trackers")
    ]
    assert [result.code for result in results] == [0, 0], results[0].log[-3000:] + results[1].log[-3000:]
    assert "every factor of the preset 1b is agreed by 50.0%" in results[0].log
    assert "stopping after this step" in results[0].log
    counts = samples_per_rank(run_of(folder))
    assert 100 <= sum(counts.values()) < 24_000 and abs(counts[0] - counts[1]) <= 4
    set_options(folder, layerprobe_preset="article", layerprobe_samples=sum(counts.values()) + 4)
    again = simpletuner.run(folder, "tiny-probe")
    assert again.code == 0, again.log[-3000:]
    assert run_of(folder).samples == sum(counts.values()) + 4
