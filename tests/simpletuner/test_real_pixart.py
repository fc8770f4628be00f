"""PixArt in SimpleTuner's own loop: DDPM steps, text by cross-attention only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real import TESTS, SimpleTuner
from test_real_run import run_of, set_options

from simpletuner_layerprobe.run.load import load_run


@pytest.fixture(scope="module")
def tiny_pixart(simpletuner: SimpleTuner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart") / "tiny"
    return simpletuner.pipeline(folder, TESTS / "tiny_pixart.py", folder)


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
    assert run.samples == 20
    assert [(stream.name, len(stream.blocks)) for stream in run.manifest.streams] == [("image", 4)]
    assert run.manifest.settings["text"] == "cross" and run.manifest.settings["noise"] == "ddpm"
    steps = run.sigma * 999
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)  # whole steps of 1,000
    assert sorted((np.round(steps) // 100).astype(int)) == sorted([*range(10)] * 2)


def test_regional_compilation_stays_off(simpletuner, tiny, tiny_pixart):
    """Accelerate would compile each block in place, and the model's output is taken from inside."""
    folder = tiny(tiny_pixart, max_train_steps=2)
    compiled = {"dynamo_backend": "inductor", "dynamo_use_regional_compilation": True}
    for where, options in (("first", {}), ("plain", {}), ("compiled", compiled)):  # the first one fills the caches
        set_options(folder, layerprobe_dir=where, **options)
        result = simpletuner.run(folder, "tiny-probe")
        assert result.code == 0, result.log[-4000:]
    assert "no compilation: dynamo_backend (was inductor)" in result.log
    run, plain = load_run(folder / "compiled"), load_run(folder / "plain")
    assert run.samples == 2 and run.manifest.difference(plain.manifest) == []
    assert not [module.name for module in run.manifest.modules if "_orig_mod" in module.name]
    np.testing.assert_allclose(run.distances("image", "mean"), plain.distances("image", "mean"), rtol=0, atol=1e-6)
