"""PEFT's standard LoRA with a rank of its own for every module, in the one way that SimpleTuner takes it.

SimpleTuner has one `lora_rank` for all modules and no option for others. But it reads the ranks, and alphas equal to
them, off the shapes in the file of `init_lora`; `peft_lora_target_modules` names the modules. So a plan is written as a
file of shapes without a single number in it, under the names "lora_down": SimpleTuner takes their ranks, loads weights
from "lora_A" and "lora_B" only, says that all of them are missing, and PEFT starts every module as usual. A file with
real weights would not do: where loaded ranks differ, SimpleTuner 4.8 to 4.10 sets every scale anew and takes PEFT 0.21
for rank-stabilised, so that training has sqrt(rank) in place of 1.
The only file that knows PEFT; torch and PEFT are imported in the calls.
Source: SimpleTuner 4.10.1, helpers/training/lora_format.py, `peft_lora_config_kwargs_from_state_dict`, and
helpers/training/adapter.py, `load_lora_weights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import json_bytes
from simpletuner_layerprobe.lokr.adapter import LORA, Adapter
from simpletuner_layerprobe.lokr.check import Check, rows_of
from simpletuner_layerprobe.lokr.groups import Model
from simpletuner_layerprobe.lokr.skeleton import skeleton

INIT_NAME = "lora_ranks.safetensors"
TARGETS_NAME = "lora_target_modules.json"


def files(intended: Mapping[str, Adapter], model_class: str) -> dict[str, bytes]:
    """The two files of a plan: an empty tensor of shape (rank, 0) per module, and the names of the modules."""
    from safetensors.numpy import save

    component = "unet" if "UNet" in model_class else "transformer"
    shapes = {
        f"{component}.{name}.lora_down.weight": np.zeros((rank, 0), np.float32)
        for name, rank in _ranks(intended).items()
    }
    return {TARGETS_NAME: json_bytes(list(intended)), INIT_NAME: bytes(save(shapes))}


def options(intended: Mapping[str, Adapter], folder: str) -> dict[str, Any]:
    """The SimpleTuner options that train a plan whose two files lie in `folder` (a POSIX path); None: left out."""
    rank = _usual_rank(intended)
    return {
        "model_type": "lora",
        "lora_type": "standard",
        "lycoris_config": None,
        "lora_rank": rank,
        "lora_alpha": rank,
        "init_lora": f"{folder}/{INIT_NAME}",
        "peft_lora_target_modules": f"{folder}/{TARGETS_NAME}",
    }


def verify_lora(intended: Mapping[str, Adapter], model: Model) -> Check:
    """Build PEFT's LoRA on the model of the table as SimpleTuner does from the plan's files; compare it with the plan.

    The ranks go the way of SimpleTuner: the most common one for all, the others as patterns, which PEFT matches at the
    end of module names. Raises ConfigError, with PEFT's own words, if it refuses.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    built = skeleton(model.modules, model.model_class)
    rank = _usual_rank(intended)
    others = {name: other for name, other in _ranks(intended).items() if other != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern={name: float(other) for name, other in others.items()},
        target_modules=list(intended),
    )
    try:
        with torch.device("meta"):
            inject_adapter_in_model(config, built, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"PEFT {version('peft')} cannot build the adapter: {' '.join(str(error).split())}") from error
    layers: dict[str, Any] = {name: layer for name, layer in built.named_modules() if hasattr(layer, "lora_A")}
    got = {}
    for name, layer in layers.items():
        tensors = [
            (f"lora_{side}.weight", tuple(getattr(layer, f"lora_{side}")["default"].weight.shape)) for side in "AB"
        ]
        got[name] = Adapter(LORA, None, tuple(tensors), float(layer.scaling["default"]))
    return Check(rows_of(model.modules, intended, got), (), (), version("peft"), "PEFT")


def _ranks(intended: Mapping[str, Adapter]) -> dict[str, int]:
    return {name: adapter.tensors[0][1][0] for name, adapter in intended.items()}


def _usual_rank(intended: Mapping[str, Adapter]) -> int:
    """The most common rank, the larger one among equals: what SimpleTuner takes for `r`."""
    counts = Counter(_ranks(intended).values())
    return max(counts, key=lambda rank: (counts[rank], rank))
