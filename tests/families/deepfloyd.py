from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, sigma_of_mix, taped_forwards, whole_steps
from torch import nn

# The first down block and the last up block have no attention.
BLOCKS = [
    "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
}


def denoiser(stage: int) -> nn.Module:
    from simpletuner.helpers.models.unet_flowmap import FlowMapUNet2DConditionModel

    # Stage II is given the small image beside the noised one, and its noise level as a class.
    second = {"in_channels": 6, "class_embed_type": "timestep", "only_cross_attention": True}
    return FlowMapUNet2DConditionModel(
        sample_size=16,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=4,
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=20,
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        **(second if stage == 2 else {"in_channels": 3}),
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # Pixels, not latents: 12 x 20, then 6 x 10 and 3 x 5 states.
    return {
        "latent_batch": torch.randn(BATCH, 3, 12, 20),
        "prompt_embeds": torch.randn(BATCH, 7, 20),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from diffusers.models.attention_processor import Attention

    return taped_forwards(model, (Attention,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    blocks: StreamReference = []
    for path in BLOCKS:
        (crossing,) = tape.of(path)
        # Channels last: a state is the vector of channels at one place.
        before, after = (state.permute(0, 2, 3, 1) for state in (crossing.arguments["hidden_states"], crossing.output))
        angle_BHW = angles(before, after)
        blocks.append((path, [(angle_BHW[b].reshape(-1), None) for b in range(BATCH)]))
    return {"image": blocks}


def sigma(prepared: Mapping[str, Any]) -> Any:
    kept = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    return sigma_of_mix(prepared, np.array([min(1 - kept[t + 1] / kept[t], 0.999) for t in range(1000)]))


CASES = [
    Case(
        family="deepfloyd",
        flavour=flavour,
        denoiser=lambda stage=stage: denoiser(stage),
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
        drawn_as=whole_steps,
        scheduler=SCHEDULER,
    )
    for flavour, stage in (("i-medium-400m", 1), ("ii-medium-450m", 2))
]
