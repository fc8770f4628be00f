"""`observe` on diffusers' own classes, without SimpleTuner, against float64."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers_models import BATCH, MODELS, taped
from small import FluxLike, hooks, model_error
from torch import nn

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.probe.families import DIFFUSERS
from simpletuner_layerprobe.probe.observe import observe

each_model = pytest.mark.parametrize("name", MODELS)


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def simpletuner_modules() -> set[str]:
    return {module for module in sys.modules if module.split(".")[0] == "simpletuner"}


def test_every_known_class_is_tested():
    assert set(MODELS) == set(DIFFUSERS)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_model
def test_agrees_with_float64(name, dtype):
    imported = simpletuner_modules()
    case = MODELS[name]
    model, inputs = case.build(dtype)
    output = run(model, inputs)
    with observe(model) as seen, taped(model, list(case.paths("image"))) as crossings:
        observed = run(model, inputs)
    assert torch.equal(observed, output)  # the probe changes nothing
    assert seen.streams == {stream: case.paths(stream) for stream in case.streams}
    assert next(iter(seen.streams)) == "image" and seen.readings == ("last", "mean")
    for stream in case.streams:
        for reading, expected_BL in case.expected(crossings, stream).items():
            taken = seen.distances(stream, reading)
            assert taken.dtype == torch.float32 and taken.device.type == "cpu"
            np.testing.assert_allclose(taken, expected_BL, rtol=0, atol=2e-6)
            assert expected_BL.min() > 1e-4 and len(np.unique(expected_BL)) == expected_BL.size
        assert torch.equal(seen.distances(stream), seen.distances(stream, "mean"))
    assert hooks(model) == 0
    assert simpletuner_modules() == imported


@torch.no_grad()
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@each_model
def test_group_offloading_changes_nothing(name, level):
    """diffusers' own: a model's parts come to the device for their forward, by hooks of their own."""
    model, inputs = MODELS[name].build(torch.float32)
    with observe(model) as expected:
        run(model, inputs)
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=level, **groups)
    with observe(model) as seen:
        run(model, inputs)
    for stream in expected.streams:
        assert torch.equal(seen.distances(stream), expected.distances(stream)), stream


@each_model
def test_with_gradients(name):
    """The same numbers and the same gradients; backward inside, through checkpointed blocks; no graph is kept."""
    model, inputs = MODELS[name].build()
    with torch.no_grad(), observe(model, residual=True, pairs=2) as without:
        run(model, inputs)
    model.enable_gradient_checkpointing()
    model.train()
    run(model, inputs).square().sum().backward()
    expected = {path: parameter.grad for path, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with observe(model, residual=True, pairs=2) as seen:
        output = run(model, inputs)
        output.square().sum().backward()
        graph = weakref.ref(output)
        del output
        assert graph() is None
    for stream in seen.streams:
        for reading in seen.readings:
            taken = seen.distances(stream, reading)
            assert torch.allclose(taken, without.distances(stream, reading), rtol=0, atol=0, equal_nan=True)
            assert not taken.requires_grad
    for path, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[path] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[path]), path


@torch.no_grad()
def test_given_frames_of_a_video_are_left_out():
    """Wan 2.2 TI2V: a timestep for each token, 0 for those of the given frame."""
    case = MODELS["WanTransformer3DModel"]
    model, inputs = case.build()
    inputs["timestep"] = torch.full((BATCH, 30), 400.0)
    inputs["timestep"][:, :15] = 0
    inputs["timestep"][1] = 0
    with observe(model) as seen, taped(model, list(case.paths("image"))) as crossings:
        run(model, inputs)
    noised = replace(case, valid_BS={"image": np.array([[False] * 15 + [True] * 15] * BATCH)})
    expected_BL = noised.expected(crossings, "image")["mean"]
    np.testing.assert_allclose(seen.distances("image")[0], expected_BL[0], rtol=0, atol=2e-6)
    assert seen.distances("image")[1].isnan().all()


@torch.no_grad()
def test_without_a_mask_all_text_counts():
    case = MODELS["QwenImageTransformer2DModel"]
    model, inputs = case.build()
    inputs["encoder_hidden_states_mask"] = None
    with observe(model) as seen, taped(model, list(case.paths("image"))) as crossings:
        run(model, inputs)
    expected_BL = replace(case, valid_BS={}).expected(crossings, "text")["mean"]
    np.testing.assert_allclose(seen.distances("text"), expected_BL, rtol=0, atol=2e-6)


@torch.no_grad()
def test_what_is_asked_wrongly_is_said():
    model, inputs = MODELS["PixArtTransformer2DModel"].build()
    with observe(model) as seen:
        with model_error("no forward of PixArtTransformer2DModel was seen"):
            seen.distances("image")
        run(model, inputs)
        with model_error("there is no stream 'text'; this model has: image"):
            seen.distances("text")
        with pytest.raises(ConfigError, match=r"there is no reading 'pair2_mean'; expected one of last, mean"):
            seen.distances("image", "pair2_mean")


@torch.no_grad()
def test_a_forward_that_fails_has_no_distances_and_leaves_nothing():
    model, inputs = MODELS["FluxTransformer2DModel"].build()
    with observe(model) as seen:
        run(model, inputs)
        with pytest.raises(RuntimeError):
            run(model, inputs | {"img_ids": inputs["img_ids"][1:]})
        with model_error("10 of 10 block states were not reported in this step: transformer_blocks.0 (image)"):
            seen.distances("image")
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), observe(model):
        1 / 0  # noqa: B018
    assert hooks(model) == 0


def test_other_classes_are_refused():
    class SD3Transformer2DModel(FluxLike):
        """SimpleTuner has a class of that name that runs its blocks in another way."""

    known = ", ".join(DIFFUSERS)
    for model in (SD3Transformer2DModel(), nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager")):
        with model_error(f" cannot be observed; of diffusers' own classes these can: {known}"), observe(model):
            pass


@torch.no_grad()
def test_a_class_that_is_derived_from_a_known_one():
    model, inputs = MODELS["PixArtTransformer2DModel"].build()
    model.__class__ = type("Own", (type(model),), {})
    with observe(model) as seen:
        run(model, inputs)
    assert seen.distances("image").shape == (BATCH, 3)
