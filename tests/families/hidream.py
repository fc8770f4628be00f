from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

T5, LLAMA = 7, 5
IMAGE = 3 * 5
SQUARE = 4 * 4
MAX_IMAGE = 36  # tokens to which the model pads an image that is not square
DOUBLE = [f"double_stream_blocks.{i}" for i in range(2)]
SINGLE = [f"single_stream_blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.hidream.transformer import HiDreamImageTransformer2DModel

    return randomised(
        HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=len(DOUBLE),
            num_single_layers=len(SINGLE),
            attention_head_dim=24,
            num_attention_heads=2,
            caption_channels=[20, 22],
            text_emb_dim=14,
            num_routed_experts=3,
            num_activated_experts=2,
            axes_dims_rope=(8, 8, 8),
            max_resolution=(12, 12),
            llama_layers=[0, 2, 1, 3, 3],
        )
    )


def raw_batch(dtype: torch.dtype, height: int = 6, width: int = 10) -> dict[str, Any]:
    # The family's prompts have no mask; the text encoders pad them to fixed lengths.
    return {
        "latent_batch": torch.randn(BATCH, 16, height, width),
        "prompt_embeds": None,
        "text_encoder_output": {
            "t5_prompt_embeds": torch.randn(BATCH, T5, 20, dtype=dtype),
            "llama_prompt_embeds": torch.randn(BATCH, 4, 1, LLAMA, 22, dtype=dtype),
            "pooled_prompt_embeds": torch.randn(BATCH, 14, dtype=dtype),
        },
        "encoder_attention_mask": None,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.hidream import transformer

    return taped_forwards(model, (transformer.HiDreamImageBlock,))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, image_tokens: int, padded: int
) -> dict[str, StreamReference]:
    text_tokens = T5 + LLAMA
    for crossing in tape.crossings:
        joined = padded + text_tokens + LLAMA if crossing.path in SINGLE else padded
        assert crossing.arguments["image_tokens"].shape[1] == joined
    image = [(0, image_tokens)] * BATCH
    text = [(0, text_tokens)] * BATCH
    text_after_image = [(padded, padded + text_tokens)] * BATCH
    return {
        "image": joint(tape, DOUBLE, "image_tokens", image, result=0) + joint(tape, SINGLE, "image_tokens", image),
        "text": joint(tape, DOUBLE, "text_tokens", text, result=1)
        + joint(tape, SINGLE, "image_tokens", text_after_image),
    }


CASES = [
    Case(
        family="hidream",
        flavour="full",
        label=label,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for label, batch, compare in (
        ("full", raw_batch, partial(reference, image_tokens=IMAGE, padded=MAX_IMAGE)),
        (
            "full, square",
            partial(raw_batch, height=8, width=8),
            partial(reference, image_tokens=SQUARE, padded=SQUARE),
        ),
    )
]
