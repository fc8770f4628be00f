"""Compiled models of diffusers: the probe runs them uncompiled, with the names and numbers of the model as it is."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import compile_regions
from diffusers_models import MODELS
from small import hooks
from torch._dynamo.testing import CompileCounter

from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.probe.observe import Seen, observe

# What torch's compiler says of Python 3.13.0, and of itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"]
)
def test_a_model_in_regions_runs_uncompiled(name):
    model, inputs = MODELS[name].build()
    backend = CompileCounter()
    compiled = compile_regions(model, backend=backend)
    with observe(model) as plain:
        model(**inputs)
    with observe(compiled) as seen:
        compiled(**inputs)
    assert backend.frame_count == 0
    assert_same(seen, plain)
    assert module_table(compiled) == module_table(model) and fingerprint(compiled) == fingerprint(model)
    assert hooks(compiled) == 0


def assert_same(seen: Seen, plain: Seen) -> None:
    assert seen.streams == plain.streams
    for stream in plain.streams:
        for reading in plain.readings:
            assert torch.equal(seen.distances(stream, reading), plain.distances(stream, reading))


@torch.no_grad()
def test_a_model_that_ran_compiled_before_and_after():
    """Hooks that come after a model was compiled do not fire in it, and those in it stay."""
    model, inputs = MODELS["FluxTransformer2DModel"].build()
    with observe(model) as plain:
        model(**inputs)
    backend = CompileCounter()
    model.compile_repeated_blocks(backend=backend)
    model(**inputs)
    graphs = backend.frame_count
    with observe(model) as seen:
        model(**inputs)
    assert_same(seen, plain)
    model(**inputs)
    assert backend.frame_count == graphs > 0 and hooks(model) == 0


def test_a_unet_in_regions_has_its_own_names():
    """diffusers' U-Net does not run so: it asks a compiled part for its length."""
    model, _ = MODELS["UNet2DConditionModel"].build()
    compiled = compile_regions(model, backend="eager")
    assert any("_orig_mod" in name for name, _ in compiled.named_modules())  # another tree
    with observe(compiled) as seen, observe(model) as plain:
        assert seen.streams == plain.streams
    assert module_table(compiled) == module_table(model) and fingerprint(compiled) == fingerprint(model)
