"""Architectures known by name or by their config.json, on the meta device."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest
from failing import fails
from lokr_models import contribution

from simpletuner_layerprobe.lokr.groups import layer_kind
from simpletuner_layerprobe.lokr.plan import make_plan
from simpletuner_layerprobe.models import NAMED, architecture
from simpletuner_layerprobe.probe.families import DIFFUSERS
from simpletuner_layerprobe.probe.families import family as table_family
from simpletuner_layerprobe.run.manifest import Target

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

# family, flavour, blocks per stream, linear layers, billions of parameters as published
PUBLISHED = {
    "sd35-large": ("sd3", "large", {"image": 38, "text": 37}, 536, 8.05),
    "sd35-medium": ("sd3", "medium", {"image": 24, "text": 23}, 392, 2.24),
    "flux-dev": ("flux", "dev", {"image": 57, "text": 57}, 504, 11.9),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_architecture_is_the_published_one(name):
    family, flavour, blocks, linear_layers, billions = PUBLISHED[name]
    found = architecture(name)
    assert (found.family, found.flavour) == (family, flavour)
    assert {stream.name: len(stream.blocks) for stream in found.streams} == blocks
    assert sum(layer_kind(module) == "linear" for module in found.modules) == linear_layers
    assert sum(prod(module.shape) for module in found.modules if module.shape) / 1e9 == pytest.approx(
        billions, rel=0.005
    )
    names = [module.name for module in found.modules]
    assert len(set(names)) == len(names)
    assert {path for stream in found.streams for path in stream.blocks} <= set(names)
    assert found.targets == tuple(Target(*vars(each).values()) for each in table_family(family).targets)


def test_the_blocks_are_the_published_ones():
    names = {module.name for module in architecture("sd35-medium").modules}
    assert [n for n in range(24) if f"transformer_blocks.{n}.attn2.to_q" in names] == list(range(13))
    image, text = architecture("flux-dev").streams
    assert image.blocks == text.blocks
    assert image.blocks[18:20] == ("transformer_blocks.18", "single_transformer_blocks.0")
    found = architecture("sd35-large")
    image, text = found.streams
    assert image.blocks == tuple(f"transformer_blocks.{number}" for number in range(38))
    assert text.blocks == image.blocks[:37]
    in_blocks = [module for module in found.modules if module.name.startswith("transformer_blocks.")]
    assert sum(layer_kind(module) == "linear" for module in in_blocks) == 529
    types = {module.name: module.type for module in found.modules}
    assert types["transformer_blocks.37"] == "JointTransformerBlock"
    shapes = {module.name: module.shape for module in found.modules}
    assert shapes["transformer_blocks.0.norm1.linear"] == (14592, 2432)
    assert shapes["transformer_blocks.0.ff.net.2"] == (2432, 9728)
    assert shapes["transformer_blocks.0.attn.norm_q"] == (64,)
    assert shapes["transformer_blocks.0.norm1.norm"] == ()
    assert shapes["pos_embed.proj"] == (2432, 16, 2, 2)


@pytest.fixture
def small(tmp_path):
    """A pipeline folder with the config.json of a small SD3 transformer."""
    config = NAMED["sd35-medium"].config | {"num_layers": 3, "num_attention_heads": 2, "sample_size": 16}
    config |= {"caption_projection_dim": 128, "pos_embed_max_size": 16, "dual_attention_layers": [0]}
    config |= {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.42.1"}
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("inside", ["transformer/config.json", "transformer", "."])
def test_an_architecture_from_its_config(small, inside):
    found = architecture(small / inside)
    assert (found.family, found.flavour, found.model_class) == ("sd3", "", "SD3Transformer2DModel")
    assert {stream.name: len(stream.blocks) for stream in found.streams} == {"image": 3, "text": 2}
    names = {module.name for module in found.modules}
    assert "transformer_blocks.0.attn2.to_q" in names
    assert "transformer_blocks.1.attn2.to_q" not in names


SMALL = {
    "SD3Transformer2DModel": {"num_layers": 2, "sample_size": 16},
    "FluxTransformer2DModel": {"num_layers": 2, "num_single_layers": 3},
    "QwenImageTransformer2DModel": {"num_layers": 2},
    "WanTransformer3DModel": {"num_layers": 2},
    "PixArtTransformer2DModel": {"num_layers": 2, "sample_size": 8},
    "UNet2DConditionModel": {"cross_attention_dim": 64},
}


@pytest.mark.parametrize("model_class", DIFFUSERS)
def test_every_class_of_the_table_can_be_planned_for(tmp_path, model_class):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": model_class} | SMALL[model_class]))
    found = architecture(path)
    assert found.family == DIFFUSERS[model_class].name
    blocks = found.streams[0].blocks
    value_L = np.linspace(0, 1, len(blocks))
    plan = make_plan(found, contribution(blocks, value_L))
    assert plan.parameters > 0 and {group.number for group in plan.groups} == set(range(len(blocks)))


def test_a_model_of_diffusers_that_the_probe_does_not_know_has_no_streams(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "AuraFlowTransformer2DModel", "num_mmdit_layers": 1, "sample_size": 8}))
    found = architecture(path)
    assert (found.family, found.streams, found.targets) == ("", (), ())
    assert any(layer_kind(module) == "linear" for module in found.modules)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no architecture"),
        ("{", "is not JSON"),
        ('{"num_layers": 3}', "has no _class_name"),
        ('{"_class_name": "MyTransformer2DModel"}', "is of the class 'MyTransformer2DModel'"),
        ('{"_class_name": "__version__"}', "is of the class '__version__'"),
        (
            '{"_class_name": "SD3Transformer2DModel", "num_layers": "many"}',
            "diffusers cannot build SD3Transformer2DModel",
        ),
    ],
)
def test_a_config_that_is_no_architecture(tmp_path, content, text):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with fails(text):
        architecture(tmp_path)
    with fails("there is no architecture 'sd4': it is neither one of sd35-large, sd35-medium, flux-dev"):
        architecture("sd4")
