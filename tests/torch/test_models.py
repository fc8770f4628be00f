"""Architectures known by name or by their config.json, on the meta device."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from failing import fails
from lokr_models import contribution

from simpletuner_layerprobe.lokr.groups import layer_kind
from simpletuner_layerprobe.lokr.plan import make_plan
from simpletuner_layerprobe.models import NAMED, architecture
from simpletuner_layerprobe.probe.families import DIFFUSERS, family
from simpletuner_layerprobe.run.manifest import Target
from simpletuner_layerprobe.training.denoisers import denoiser, denoiser_class

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

# blocks per stream, linear layers
SHAPES = {
    "sd35-large": ({"image": 38, "text": 37}, 536),
    "sd35-medium": ({"image": 24, "text": 23}, 392),
    "flux-dev": ({"image": 57, "text": 57}, 504),
    "qwen-image": ({"image": 60, "text": 60}, 846),
    "wan21-14b": ({"image": 40}, 406),
    "hidream": ({"image": 48, "text": 48}, 1128),
    "sdxl": ({"image": 70}, 743),
}


def tables(name):
    """The architecture; its module table imports of SimpleTuner what it needs."""
    return architecture(name, alone=True)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_architecture_is_the_published_one(name):
    published = NAMED[name]
    found = tables(name)
    assert (found.family, found.flavour) == (published.family, published.flavour)
    entry = family(published.family, published.class_name)
    model = denoiser(entry.source, published.config, name, alone=True)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    if published.parameters.endswith(" B"):
        digits = len(published.parameters.removesuffix(" B").partition(".")[2])
        assert f"{count / 1e9:.{digits}f} B" == published.parameters
    else:
        assert f"{count:,}" == published.parameters
    names = [module.name for module in found.modules]
    assert len(set(names)) == len(names)
    assert {path for stream in found.streams for path in stream.blocks} <= set(names)
    assert found.targets == tuple(Target(*vars(each).values()) for each in entry.targets)
    if name in SHAPES:
        blocks = {stream.name: len(stream.blocks) for stream in found.streams}
        assert (blocks, sum(layer_kind(module) == "linear" for module in found.modules)) == SHAPES[name]


def test_every_setting_of_a_named_architecture_is_one_of_its_class():
    for name, published in NAMED.items():
        known = inspect.signature(denoiser_class(family(published.family, published.class_name).source).__init__)
        assert set(published.config) <= set(known.parameters), name


def test_the_blocks_are_the_published_ones():
    names = {module.name for module in tables("sd35-medium").modules}
    assert [n for n in range(24) if f"transformer_blocks.{n}.attn2.to_q" in names] == list(range(13))
    image, text = tables("flux-dev").streams
    assert image.blocks == text.blocks
    assert image.blocks[18:20] == ("transformer_blocks.18", "single_transformer_blocks.0")
    found = tables("sd35-large")
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
    config = dict(NAMED["sd35-medium"].config) | {"num_layers": 3, "num_attention_heads": 2, "sample_size": 16}
    config |= {"caption_projection_dim": 128, "pos_embed_max_size": 16, "dual_attention_layers": [0]}
    config |= {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.42.1"}
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("inside", ["transformer/config.json", "transformer", "."])
def test_an_architecture_from_its_config(small, inside):
    found = tables(small / inside)
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
    found = tables(path)
    assert found.family == {"UNet2DConditionModel": "sd1x"}.get(model_class, DIFFUSERS[model_class].name)
    blocks = found.streams[0].blocks
    value_L = np.linspace(0, 1, len(blocks))
    plan = make_plan(found, contribution(blocks, value_L))
    assert plan.parameters > 0 and {group.number for group in plan.groups} == set(range(len(blocks)))


def test_families_that_share_a_class_are_told_by_their_settings_or_their_name(tmp_path):
    path = tmp_path / "config.json"
    sizes = {"block_out_channels": [32, 32], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    sizes |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 64}
    sizes |= {"_class_name": "UNet2DConditionModel"}
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    times |= {"projection_class_embeddings_input_dim": 64}
    for name, settings in {
        "sd1x": {},
        "sdxl": times,
        "kolors": times | {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32},
    }.items():
        path.write_text(json.dumps(sizes | settings))
        found = tables(path)
        assert (found.family, found.model_class) == (name, "FlowMapUNet2DConditionModel")
        assert found.streams[0].blocks[0].startswith("down_blocks.1.attentions.0.transformer_blocks")
    path.write_text(json.dumps(sizes))
    assert tables(f"sdxl:{path}").family == "sdxl"
    with fails("model family 'heartmula' cannot be probed"):
        tables(f"heartmula:{path}")
    # A class that the family does not have is not loaded as it.
    path.write_text(json.dumps({"_class_name": "Transformer2DModel", "num_layers": 2, "sample_size": 8}))
    assert tables(path).family == "pixart"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no architecture"),
        ("{", "is not JSON"),
        ('{"num_layers": 3}', "has no _class_name"),
        ('{"_class_name": "MyTransformer2DModel"}', "is of the class 'MyTransformer2DModel', which no model family"),
        ('{"_class_name": "CogView4Transformer2DModel"}', "which no model family of SimpleTuner has"),
        (
            '{"_class_name": "SD3Transformer2DModel", "num_layers": "many"}',
            "SimpleTuner cannot build SD3Transformer2DModel",
        ),
    ],
)
def test_a_config_that_is_no_architecture(tmp_path, content, text):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with fails(text):
        tables(tmp_path)
    with fails("there is no architecture 'sd4': it is neither one of sd35-large, sd35-medium, flux-dev, "):
        tables("sd4")
