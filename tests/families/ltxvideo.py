from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # a token is one latent
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.ltxvideo.transformer import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=128,  # model_predict asks for these
        out_channels=128,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=len(BLOCKS),
        caption_channels=20,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, FRAMES, HEIGHT, WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.ltxvideo.transformer import LTXVideoTransformerBlock

    return taped_forwards(model, (LTXVideoTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


CASES = [
    Case(
        family="ltxvideo",
        flavour="0.9.5",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
