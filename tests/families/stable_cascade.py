from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, sigma_of_mix, taped_forwards, whole_steps
from torch import nn

# Each level is a row of (residual, timestep, attention) blocks; two rows in the second.
BLOCKS = [
    "down_blocks.0.2",
    "down_blocks.1.2",
    "down_blocks.1.5",
    "up_blocks.0.2",
    "up_blocks.0.5",
    "up_blocks.1.2",
]
SCHEDULER = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.stable_cascade.unet import StableCascadeUNet

    return StableCascadeUNet(
        in_channels=16,
        out_channels=16,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=20,
        block_out_channels=(16, 24),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_in_channels=26,
        clip_text_pooled_in_channels=14,
        clip_image_in_channels=18,
        switch_level=(False,),
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # 3 x 5 states at both levels.
    return {
        "latent_batch": torch.randn(BATCH, 16, 3, 5),
        "prompt_embeds": torch.randn(BATCH, 7, 26),
        "add_text_embeds": torch.randn(BATCH, 14),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.stable_cascade.unet import SDCascadeAttnBlock

    return taped_forwards(model, (SDCascadeAttnBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    blocks: StreamReference = []
    for path in BLOCKS:
        (crossing,) = tape.of(path)
        # Channels last: a state is the vector of channels at one place.
        angle_BHW = angles(*(state.permute(0, 2, 3, 1) for state in (crossing.arguments["x"], crossing.output)))
        blocks.append((path, [(angle_BHW[b].reshape(-1), None) for b in range(BATCH)]))
    return {"image": blocks}


def sigma(prepared: Mapping[str, Any]) -> Any:
    # SimpleTuner trains it with the schedule of a plain DDPMScheduler.
    return sigma_of_mix(prepared, np.linspace(0.0001, 0.02, 1000))


CASES = [
    Case(
        family="stable_cascade",
        flavour="stage-c",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        # The family refuses anything else.
        options={"mixed_precision": "no"},
        sigma=sigma,
        drawn_as=whole_steps,
        scheduler=SCHEDULER,
    )
]
