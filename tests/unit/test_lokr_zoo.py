from __future__ import annotations

import json
import time
from math import prod

import pytest
from failing import fails

from simpletuner_layerprobe.lokr.config import layer_kind
from simpletuner_layerprobe.models import NAMED, architecture

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

# family, flavour, blocks per stream, linear layers, billions of parameters as published
PUBLISHED = {
    "sd35-large": ("sd3", "large", {"image": 38, "text": 37}, 536, 8.05),
    "sd35-medium": ("sd3", "medium", {"image": 24, "text": 23}, 392, 2.24),
    "flux-dev": ("flux", "dev", {"image": 57, "text": 57}, 504, 11.9),
}


def test_every_named_architecture_is_tested():
    assert set(NAMED) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
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


def test_a_table_is_built_at_once():
    architecture("sd35-medium")  # the imports
    for name in NAMED:
        start = time.perf_counter()
        architecture(name)
        assert time.perf_counter() - start < 2


def test_sd35_large_has_the_articles_blocks():
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


def test_sd35_medium_has_a_second_attention_in_its_first_thirteen_blocks():
    names = {module.name for module in architecture("sd35-medium").modules}
    assert [n for n in range(24) if f"transformer_blocks.{n}.attn2.to_q" in names] == list(range(13))


def test_flux_has_the_double_blocks_before_the_single_ones():
    image, text = architecture("flux-dev").streams
    assert image.blocks == text.blocks
    assert image.blocks[18:20] == ("transformer_blocks.18", "single_transformer_blocks.0")


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


def test_a_model_of_diffusers_that_the_probe_does_not_know_has_no_streams(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "sample_size": 8}))
    found = architecture(path)
    assert (found.family, found.streams) == ("", ())
    assert any(layer_kind(module) == "linear" for module in found.modules)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is not JSON"),
        ("[]", "has no _class_name"),
        ('{"num_layers": 3}', "has no _class_name"),
        ('{"_class_name": 3}', "has no _class_name"),
        ('{"_class_name": "MyTransformer2DModel"}', "is of the class 'MyTransformer2DModel'"),
        ('{"_class_name": "StableDiffusion3Pipeline"}', "is of the class 'StableDiffusion3Pipeline'"),
        ('{"_class_name": "__version__"}', "is of the class '__version__'"),
        (
            '{"_class_name": "SD3Transformer2DModel", "num_layers": "many"}',
            "diffusers cannot build SD3Transformer2DModel",
        ),
    ],
)
def test_a_config_that_is_no_architecture(tmp_path, content, text):
    path = tmp_path / "config.json"
    path.write_text(content)
    with fails(text):
        architecture(path)


def test_a_name_that_is_none(tmp_path):
    with fails("there is no architecture 'sd4': it is neither one of sd35-large, sd35-medium, flux-dev"):
        architecture("sd4")
    with fails("there is no architecture"):
        architecture(tmp_path)
