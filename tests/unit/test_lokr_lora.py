"""PEFT's LoRA with ranks per module: the files for SimpleTuner, and PEFT's own layers on the skeleton."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import load
from test_lokr_ranks import TARGETS, names, table

from simpletuner_layerprobe.lokr.lora import init_file, options, verify_lora
from simpletuner_layerprobe.lokr.ranks import PlannedRank, rank_plan
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

RANKS = np.array([[9, 5], [4, 2], [4, 2]])


def plan() -> tuple[PlannedRank, ...]:
    return rank_plan("lora", names(3), RANKS, TARGETS, table(3))


def test_peft_gives_every_linear_layer_its_rank():
    check = verify_lora(plan(), table(3))
    assert check.wrong == () and check.builder == "PEFT"
    got = {row.name: row.got for row in check.rows}
    assert len(got) == 9 and "blocks.0.mix" not in got  # no convolutions
    assert check.parameters == (9 + 4 + 4) * (12 + 30) + (5 + 2 + 2) * (12 + 12) + (3 + 2 + 2) * (3 + 12)
    assert all(adapter is not None and adapter.scale == 1 for adapter in got.values())


def test_a_module_whose_name_ends_like_another_is_found():
    """PEFT takes names from their end, so `ff` of a block is also `other.blocks.0.ff`."""
    twin = (
        Module("other", "Part", ()),
        Module("other.blocks", "ModuleList", ()),
        Module("other.blocks.0", "Block", ()),
    )
    check = verify_lora(plan(), (*table(3), *twin, Module("other.blocks.0.ff", "Linear", (12, 30))))
    assert [row.name for row in check.extra] == ["other.blocks.0.ff"]


def test_the_file_holds_ranks_and_no_numbers():
    for model_class, component in (("SD3Transformer2DModel", "transformer"), ("FlowMapUNet2DConditionModel", "unet")):
        tensors = load(init_file(plan(), model_class))
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            f"{component}.{one.name}.lora_down.weight": (one.rank, 0) for one in plan()
        }
        # What SimpleTuner would load weights or an alpha from.
        assert not any(re.search("lora_A|lora_B|alpha|magnitude", name) for name in tensors)
    assert init_file(plan(), "A") == init_file(plan(), "A")


def test_the_options_name_the_files_and_the_most_common_rank():
    made = options(plan(), "config/x")
    assert made["lora_rank"] == made["lora_alpha"] == 2
    assert (made["model_type"], made["lora_type"], made["lycoris_config"]) == ("lora", "standard", None)
    assert made["init_lora"] == "config/x/lora_ranks.safetensors"
    assert made["peft_lora_target_modules"] == "config/x/lora_target_modules.json"
