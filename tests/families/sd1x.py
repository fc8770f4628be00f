from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import (
    BATCH,
    DDPM_SCHEDULER,
    FLOW_SCHEDULER,
    Case,
    StreamReference,
    Tape,
    separate,
    sigma_of_mix,
    taped_forwards,
    whole_steps,
)
from torch import nn

# The last down block and the first up block have no attention, as in Stable Diffusion 1.5.
BLOCKS = [
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
    "up_blocks.2.attentions.0.transformer_blocks.0",
    "up_blocks.2.attentions.1.transformer_blocks.0",
]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.unet_flowmap import FlowMapUNet2DConditionModel

    return FlowMapUNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=20,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # 12 x 20 latent pixels: 240, 60 and 15 tokens.
    return {
        "latent_batch": torch.randn(BATCH, 4, 12, 20),
        "prompt_embeds": torch.randn(BATCH, 7, 20),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from diffusers.models.attention import BasicTransformerBlock

    return taped_forwards(model, (BasicTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


def sigma(prepared: Mapping[str, Any]) -> Any:
    betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    return sigma_of_mix(prepared, betas)


CASES = [
    Case(
        family="sd1x",
        flavour="1.5",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        options=options,
        sigma=sigma,
        drawn_as=whole_steps,
        label=label,
        scheduler=DDPM_SCHEDULER,
    )
    for label, options in (("1.5", {}), ("1.5, steps drawn alike", {"disable_segmented_timestep_sampling": True}))
] + [
    Case(
        family="sd1x",
        flavour="1.5",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        options={"prediction_type": "flow_matching"},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        # As Trainer.init_noise_schedule does once the prediction type is known.
        prepare_model=lambda model: model.setup_training_noise_schedule(),
        label="1.5, flow matching",
        scheduler=FLOW_SCHEDULER,
    )
]
