from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # patches
CHANNELS = 16
BLOCKS = [f"visual_transformer_blocks.{i}" for i in range(3)]


def denoiser(visual_cond: bool = False) -> nn.Module:
    from simpletuner.helpers.models.kandinsky5_video.transformer_kandinsky5 import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=20,
        in_text_dim2=14,
        time_dim=16,
        model_dim=24,
        ff_dim=40,
        num_text_blocks=2,
        num_visual_blocks=len(BLOCKS),
        axes_dims=(4, 4, 4),
        visual_cond=visual_cond,
    )
    # The modulation starts at zero, with which a block changes nothing.
    for block in model.visual_transformer_blocks:
        nn.init.normal_(block.visual_modulation.out_layer.weight, std=0.2)
        nn.init.normal_(block.visual_modulation.out_layer.bias, std=0.2)
    return model


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, CHANNELS, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": torch.randn(BATCH, 14),
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def raw_batch_with_first_frame(dtype: torch.dtype) -> dict[str, Any]:
    first = torch.randn(BATCH, CHANNELS, 2 * HEIGHT, 2 * WIDTH)
    return raw_batch(dtype) | {"conditioning_latents": [first], "is_i2v_data": True}


def with_autocast(model: Any) -> None:
    """As accelerate does for mixed precision: the time embedding is made in float32 and goes to bfloat16 weights."""
    denoiser, dtype = model.model, model.config.weight_dtype
    denoiser.forward = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)(denoiser.forward)


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.kandinsky5_video.transformer_kandinsky5 import Kandinsky5TransformerDecoderBlock

    return taped_forwards(model, (Kandinsky5TransformerDecoderBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "visual_embed", None)}


CASES = [
    Case(
        family="kandinsky5_video",
        flavour=flavour,
        denoiser=make,
        raw_batch=batch,
        tape=tape,
        prepare_model=with_autocast,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, make, batch in (
        ("t2v-lite-sft-5s", denoiser, raw_batch),
        # The first frame is given as further channels of the same tokens.
        ("i2v-lite-5s", lambda: denoiser(visual_cond=True), raw_batch_with_first_frame),
    )
]
