"""Flux in SimpleTuner's own loop: double blocks, then single blocks over the joint sequence."""

from __future__ import annotations

import json

import pytest
from test_real_run import run_of, set_options
from test_real_sd3 import assert_equal_to_further_reference, assert_equal_to_reference

from simpletuner_layerprobe.run.load import load_run


def test_every_distance_equals_the_articles_formula(simpletuner, tiny, tiny_flux):
    folder = tiny(tiny_flux, train_batch_size=2, max_train_steps=5, layerprobe_residual=True, layerprobe_block_pairs=3)
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_flux")
    assert result.code == 0, result.log[-4000:]

    run = run_of(folder)
    assert run.manifest.stream("text").blocks[2:5] == (
        "transformer_blocks.2",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    )
    assert_equal_to_reference(folder, run, {"image": 7, "text": 7})
    assert_equal_to_further_reference(folder, run)  # pairs over the change from double to single blocks too
    tokens = run.facts["text_tokens"]
    assert 0 < tokens.min() < tokens.max() < 512  # the mask decides, not the padded length


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_compiled_model_runs_uncompiled_under_its_own_names(simpletuner, tiny, tiny_flux, way):
    folder = tiny(tiny_flux, max_train_steps=2)
    plain = simpletuner.run(folder, "tiny-probe")
    assert plain.code == 0, plain.log[-4000:]
    environment = {}
    if way == "option":
        set_options(folder, dynamo_backend="inductor", dynamo_use_regional_compilation=True)
    else:
        environment = {
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
        }
    set_options(folder, layerprobe_dir="compiled")
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_flux", environment=environment)
    assert result.code == 0, result.log[-4000:]
    said = "dynamo_backend (was inductor)" if way == "option" else "inductor, from `accelerate config`"
    assert f"no compilation: {said}" in result.log
    run = load_run(folder / "compiled")
    assert_equal_to_reference(folder, run, {"image": 7, "text": 7})
    assert run.manifest.difference(run_of(folder).manifest) == []
    assert run.sigma.tolist() == run_of(folder).sigma.tolist()


@pytest.mark.parametrize("strength", [0.3, 0.0])
@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_the_assistant_has_the_strength_that_it_has_in_training(simpletuner, tiny, tiny_flux, lora_type, strength):
    folder = tiny(
        tiny_flux,
        max_train_steps=1,
        model_flavour="schnell",
        flux_fast_schedule=True,
        lora_type=lora_type,
        assistant_lora_path="assistant",
        assistant_lora_strength=strength,
    )
    scales = []
    for probe in (True, False):
        set_options(folder, layerprobe=probe)
        result = simpletuner.run(folder, "tiny-probe", setup="setups.py:adapters_in_use")
        assert result.code == 0, result.log[-4000:]
        path = folder / "adapters.json"
        adapters = json.loads(path.read_text())
        scales.append({name: of["assistant"] for name, of in adapters.items() if "assistant" in of})
        path.unlink()
    expected = strength if lora_type == "standard" else 1.0
    assert scales[0] == scales[1] and set(scales[0].values()) == ({expected} if expected else set())
    assert run_of(folder).manifest.settings["assistant_lora"] == expected
