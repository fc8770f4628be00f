"""PixArt in SimpleTuner's own loop: DDPM steps, text by cross-attention only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, make_pipeline
from test_real_run import column, run_of


@pytest.fixture(scope="module")
def tiny_pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart") / "tiny"
    make_pipeline(TESTS / "tiny_pixart.py", folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 5])
def test_stratified_steps_of_a_ddpm_family(simpletuner, tiny, tiny_pixart, batch_size):
    folder = tiny(
        tiny_pixart,
        layerprobe_sigmas="stratified",
        layerprobe_samples=20,
        num_train_epochs=4,
        train_batch_size=batch_size,
    )
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.sample_count() == 20
    assert [(stream.name, len(stream.blocks)) for stream in run.manifest.streams] == [("image", 4)]
    assert run.manifest.settings["text"] == "cross" and run.manifest.settings["noise"] == "ddpm"
    steps = column(run, "sigma_N") * 999
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)  # whole steps of 1,000
    assert sorted((np.round(steps) // 100).astype(int)) == sorted([*range(10)] * 2)
