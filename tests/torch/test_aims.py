"""What a config can aim at: as many layers by each class and each pattern as LyCORIS adapts."""

from __future__ import annotations

import json
from math import prod

import pytest
from lokr_models import Model

from simpletuner_layerprobe.lokr import aims
from simpletuner_layerprobe.lokr.groups import layer_kind
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.models import NAMED, architecture
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

GLOBAL = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
WIDTH = 80 - len("  modules  18,866,503,680")
SMALL = {
    "SD3Transformer2DModel": {"num_layers": 2, "sample_size": 16},
    "WanTransformer3DModel": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64},
    "UNet2DConditionModel": {"cross_attention_dim": 64, "block_out_channels": [32, 64, 64, 64]},
    "SanaTransformer2DModel": {"num_layers": 2},
}


@pytest.mark.parametrize("model_class", SMALL)
def test_each_reaches_what_lycoris_adapts_by_it(tmp_path, model_class):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": model_class} | SMALL[model_class]))
    model = architecture(path, alone=True)
    shapes = {module.name: module.shape for module in model.modules}
    presets = [(aim, {"target_module": [aim.text]}) for aim in aims.classes(model)]
    patterns = {"target_module": [], "use_fnmatch": True}
    presets += [(aim, patterns | {"target_name": [aim.text]}) for aim in aims.names(model)]
    assert len(presets) > 20
    for aim, preset in presets:
        check = check_config(GLOBAL | {"apply_preset": preset}, model)
        assert check.unmatched == () and check.wrong == ()
        assert (aim.modules, aim.weights) == (len(check.rows), sum(prod(shapes[row.name]) for row in check.rows)), aim


@pytest.mark.parametrize("name", NAMED)
def test_the_patterns_have_every_layer_once_and_fit_a_terminal(name):
    model = architecture(name, alone=True)
    layers = [module for module in model.modules if layer_kind(module) in ("linear", "conv")]
    patterns = aims.names(model)
    assert sum(aim.modules for aim in patterns) == len(layers)
    assert sum(aim.weights for aim in patterns) == sum(prod(layer.shape) for layer in layers)
    assert max(len(aim.text) for aim in (*patterns, *aims.classes(model))) <= WIDTH
    whole = aims.classes(model)[0]
    assert (whole.text, whole.modules) == (model.model_class, len(layers))


def test_a_shorter_pattern_matches_no_other():
    """Where every shorter one would, the pattern stays whole."""
    tail = "a_name_that_is_not_short.with_more.to_q"
    names = [
        f"{head}.{tail}"
        for head in ("image.first_blocks", "image.second_blocks", "text.first_blocks", "audio.first_blocks")
    ]
    found = aims.names(Model(tuple(Module(name, "Linear", (4, 4)) for name in names)))
    assert [aim.modules for aim in found] == [1] * 4
    assert (found[0].text, found[3].text) == (names[0], f"audio.*.{tail}")
