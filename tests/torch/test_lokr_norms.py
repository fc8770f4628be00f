"""train_norm: LyCORIS takes the norms of what it adapts, with a weight or without; without one nothing trains."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from failing import fails
from lokr_models import Model

from simpletuner_layerprobe.lokr.network import fresh_wrapper, silent
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.probe.modules import module_table, norm_widths
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

CONFIG = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "train_norm": True}
BLOCKS = CONFIG | {"apply_preset": {"target_module": ["JointTransformerBlock"]}}
INPUTS = {
    "hidden_states": torch.zeros(1, 16, 8, 8),
    "encoder_hidden_states": torch.zeros(1, 5, 32),
    "pooled_projections": torch.zeros(1, 32),
    "timestep": torch.zeros(1),
}


def sd3():
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(**sizes, qk_norm="rms_norm", dual_attention_layers=(0,))


def table(model) -> Model:
    widths = norm_widths(model)
    modules = tuple(Module(*row, widths.get(row[0], 0)) for row in module_table(model))
    return Model(modules, model_class=type(model).__name__)


def network(config, model):
    """LyCORIS's, on a model with weights, as SimpleTuner builds it."""
    rest = copy.deepcopy(config)
    wrapper = fresh_wrapper()
    wrapper.LycorisNetwork.apply_preset(rest["apply_preset"])
    with silent():
        made = wrapper.create_lycoris(
            model, *(rest.pop(key) for key in ("multiplier", "linear_dim", "linear_alpha")), **rest
        )
        made.apply_to()
    gc.collect()
    return made


def test_norms_without_a_weight_are_built_counted_and_stop_the_training():
    model = sd3()
    check = check_config(BLOCKS, table(model))
    without = check_config(BLOCKS | {"train_norm": False}, table(model))
    assert (len(without.rows), without.stops, len(check.rows)) == (43, (), 54)
    made = network(BLOCKS, model)
    trained = [sum(p.numel() for p in lora.parameters()) for lora in made.loras]
    assert (sum(count > 0 for count in trained), sum(trained)) == (54, check.parameters)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'to'"):
        model(**INPUTS)
    assert check.wrong == ()
    (reason,) = check.stops
    assert reason.startswith(
        "train_norm: LyCORIS takes 11 norms without a weight, first transformer_blocks.0.norm1.norm,"
    )
    with fails(reason):
        check.require()


def test_norms_with_a_weight_train():
    from torch import nn

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8))
    config = CONFIG | {"apply_preset": {"target_module": ["Sequential"]}}
    check = check_config(config, table(model))
    assert [row.got.algo for row in check.rows] == ["norm", "lokr", "norm"] and check.stops == ()
    made = network(config, model)
    assert sum(p.numel() for p in made.parameters()) == check.parameters
    model(torch.zeros(1, 8)).sum().backward()


def test_where_the_width_is_not_known_the_norm_is_built_all_the_same():
    """As of a run: its table has no width."""
    model = table(sd3())
    read = replace(model, modules=tuple(replace(module, width=0) for module in model.modules))
    known, unknown = check_config(BLOCKS, model), check_config(BLOCKS, read)
    assert [row.name for row in unknown.rows] == [row.name for row in known.rows]
    assert (unknown.stops, unknown.parameters < known.parameters) == (known.stops, True)
