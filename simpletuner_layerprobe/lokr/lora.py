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
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.proof import Adapter, Check, Row, skeleton
from simpletuner_layerprobe.lokr.ranks import PlannedRank
from simpletuner_layerprobe.run.manifest import Module

INIT_NAME = "lora_ranks.safetensors"
TARGETS_NAME = "lora_target_modules.json"
NOT_IN_A_SKELETON = ("bitsandbytes", "torchao", "torchvision", "sklearn")
"""Packages that PEFT, and transformers for it, import if they are there, and no layer of a skeleton needs."""


def init_file(plan: Sequence[PlannedRank], model_class: str) -> bytes:
    """The `init_lora` file of a plan: an empty tensor of shape (rank, 0) per module. The same plan, the same bytes."""
    from safetensors.numpy import save

    component = "unet" if "UNet" in model_class else "transformer"
    return bytes(
        save({f"{component}.{one.name}.lora_down.weight": np.zeros((one.rank, 0), np.float32) for one in plan})
    )


def options(plan: Sequence[PlannedRank], folder: str) -> dict[str, Any]:
    """The SimpleTuner options that train a plan whose two files lie in `folder` (a POSIX path); None: left out."""
    rank = _usual_rank(plan)
    return {
        "model_type": "lora",
        "lora_type": "standard",
        "lycoris_config": None,
        "lora_rank": rank,
        "lora_alpha": rank,
        "init_lora": f"{folder}/{INIT_NAME}",
        "peft_lora_target_modules": f"{folder}/{TARGETS_NAME}",
    }


def verify_lora(plan: Sequence[PlannedRank], modules: Sequence[Module], *, model_class: str = "") -> Check:
    """Build PEFT's LoRA on the model of the table as SimpleTuner does from the plan's files; compare it with the plan.

    The ranks go the way of SimpleTuner: the most common one for all, the others as patterns, which PEFT matches at the
    end of module names. Raises ProbeError, with PEFT's own words, if it refuses.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model = skeleton(modules, model_class)
    rank = _usual_rank(plan)
    others = {one.name: one.rank for one in plan if one.rank != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern={name: float(other) for name, other in others.items()},
        target_modules=[one.name for one in plan],
    )
    try:
        with torch.device("meta"):
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ProbeError(f"PEFT {version('peft')} cannot build the adapter: {' '.join(str(error).split())}") from error
    layers: dict[str, Any] = {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}
    got = {
        name: Adapter(
            "lora",
            None,
            tuple(
                (f"lora_{side}.weight", tuple(getattr(one, f"lora_{side}")["default"].weight.shape)) for side in "AB"
            ),
            float(one.scaling["default"]),
        )
        for name, one in layers.items()
    }
    meant = {one.name: Adapter("lora", None, one.tensors, one.alpha / one.rank) for one in plan}
    rows = tuple(
        Row(module.name, module.type, module.shape, meant.get(module.name), got.get(module.name))
        for module in modules
        if module.name in meant or module.name in got
    )
    return Check(rows, (), (), version("peft"), "PEFT")


def _usual_rank(plan: Sequence[PlannedRank]) -> int:
    """The most common rank, the larger one among equals: what SimpleTuner takes for `r`."""
    counts = Counter(one.rank for one in plan)
    return max(counts, key=lambda rank: (counts[rank], rank))
