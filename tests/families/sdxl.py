from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import (
    BATCH,
    DDPM_SCHEDULER,
    FLOW_SCHEDULER,
    Case,
    StreamReference,
    Tape,
    separate,
    taped_forwards,
    whole_steps,
)
from torch import nn

from families.sd1x import sigma

# As in SDXL the first down block and the last up block have no attention, and the others several blocks.
BASE = [
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "down_blocks.2.attentions.0.transformer_blocks.0",
    "down_blocks.2.attentions.0.transformer_blocks.1",
    "mid_block.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.1",
    "up_blocks.0.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.0.transformer_blocks.1",
    "up_blocks.0.attentions.1.transformer_blocks.0",
    "up_blocks.0.attentions.1.transformer_blocks.1",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
]
# The refiner has attention in the middle blocks of its four.
REFINER = [
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
]


def unet(**rest: Any) -> nn.Module:
    from simpletuner.helpers.models.unet_flowmap import FlowMapUNet2DConditionModel

    return FlowMapUNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=20,
        attention_head_dim=(2, 2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        **rest,
    )


def base(**rest: Any) -> nn.Module:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        # Six time ids and the pooled text.
        projection_class_embeddings_input_dim=6 * 8 + 14,
        **rest,
    )


def refiner() -> nn.Module:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        projection_class_embeddings_input_dim=5 * 8 + 14,
    )


def raw_batch(dtype: torch.dtype, time_ids: int = 6) -> dict[str, Any]:
    # 12 x 20 latent pixels: 60 and 15 tokens.
    return {
        "latent_batch": torch.randn(BATCH, 4, 12, 20),
        "prompt_embeds": torch.randn(BATCH, 7, 20),
        "add_text_embeds": torch.randn(BATCH, 14),
        "batch_time_ids": torch.tensor([[160.0, 96.0, 0.0, 0.0, 160.0, 96.0][:time_ids]] * BATCH),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from diffusers.models.attention import BasicTransformerBlock

    return taped_forwards(model, (BasicTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    paths = BASE if len(tape.of("down_blocks.2.attentions.0.transformer_blocks.0")) else REFINER
    return {"image": separate(tape, paths, "hidden_states", None)}


CASES = [
    Case(
        family="sdxl",
        flavour="base-1.0",
        denoiser=base,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BASE)},
        sigma=sigma,
        drawn_as=whole_steps,
        scheduler=DDPM_SCHEDULER,
    ),
    Case(
        family="sdxl",
        flavour="refiner-1.0",
        denoiser=refiner,
        raw_batch=lambda dtype: raw_batch(dtype, time_ids=5),
        tape=tape,
        reference=reference,
        blocks={"image": len(REFINER)},
        options={"refiner_training": True, "prediction_type": "v_prediction"},
        sigma=sigma,
        drawn_as=whole_steps,
        scheduler=DDPM_SCHEDULER,
    ),
    Case(
        family="sdxl",
        flavour="base-1.0",
        denoiser=base,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BASE)},
        options={"prediction_type": "flow_matching"},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        # As Trainer.init_noise_schedule does once the prediction type is known.
        prepare_model=lambda model: model.setup_training_noise_schedule(),
        label="base-1.0, flow matching",
        scheduler=FLOW_SCHEDULER,
    ),
]
