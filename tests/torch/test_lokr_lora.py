"""PEFT's LoRA with ranks per module: the files for SimpleTuner, and PEFT's own layers on the skeleton."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from failing import fails
from lokr_models import Model, contribution, small_blocks, small_model
from safetensors.numpy import load

from simpletuner_layerprobe.lokr.lora import verify_lora
from simpletuner_layerprobe.lokr.plan import Plan, make_plan
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


def plan(model: Model) -> Plan:
    """Ranks 9, 4 and 4; attention and gates half of that."""
    value_L = [1.0, (12 - 9 / 4) / 11, (12 - 9 / 4) / 11]
    return make_plan(model, contribution(small_blocks(3), value_L), algo="lora", rank=9)


def test_peft_gives_every_linear_layer_its_rank():
    made = plan(small_model(3)).verify()
    check = made.check
    assert check is not None and check.wrong == () and check.builder == "PEFT"
    got = {row.name: row.got for row in check.rows}
    assert len(got) == 9 and "blocks.0.mix" not in got  # no convolutions
    ranks = [made.intended[f"blocks.{number}.{part}"].tensors[0][1][0] for number in (0, 1) for part in ("ff", "attn")]
    assert ranks == [9, 4, 4, 2]
    assert check.parameters == made.parameters == 17 * (12 + 30) + 8 * (12 + 12) + 7 * (3 + 12)
    assert all(adapter is not None and adapter.scale == 1 for adapter in got.values())


def test_a_module_whose_name_ends_like_another_is_found():
    """PEFT takes names from their end, so `ff` of a block is also `other.blocks.0.ff`."""
    twin = (
        Module("other", "Part", ()),
        Module("other.blocks", "ModuleList", ()),
        Module("other.blocks.0", "Block", ()),
        Module("other.blocks.0.ff", "Linear", (12, 30)),
    )
    model = small_model(3)
    made = plan(model)
    model = replace(model, modules=(*model.modules, *twin))
    check = verify_lora(made.intended, model)
    assert [row.name for row in check.extra] == ["other.blocks.0.ff"]
    with fails("PEFT"):
        replace(made, model=model).verify()


def test_a_module_that_peft_cannot_adapt_is_an_error():
    model = small_model(3)
    odd = tuple(
        replace(module, type="Embedding") if module.name.endswith("gate") else module for module in model.modules
    )
    with fails("cannot build the adapter"):
        verify_lora(plan(model).intended, replace(model, modules=odd))


def test_the_file_holds_ranks_and_no_numbers():
    for model_class, component in (("SD3Transformer2DModel", "transformer"), ("FlowMapUNet2DConditionModel", "unet")):
        made = plan(replace(small_model(3), model_class=model_class))
        tensors = load(made.files()["lora_ranks.safetensors"])
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            f"{component}.{name}.lora_down.weight": (adapter.tensors[0][1][0], 0)
            for name, adapter in made.intended.items()
        }
        # What SimpleTuner would load weights or an alpha from.
        assert not any(re.search("lora_A|lora_B|alpha|magnitude", name) for name in tensors)
        assert made.files() == plan(made.model).files()
    assert json.loads(made.files()["lora_target_modules.json"]) == list(made.intended)


def test_the_options_name_the_files_and_the_most_common_rank():
    made = plan(small_model(3)).options("config/x")
    assert made["lora_rank"] == made["lora_alpha"] == 2
    assert (made["model_type"], made["lora_type"], made["lycoris_config"]) == ("lora", "standard", None)
    assert made["init_lora"] == "config/x/lora_ranks.safetensors"
    assert made["peft_lora_target_modules"] == "config/x/lora_target_modules.json"
