from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, separate, taped_forwards
from torch import nn

TEXT = 9
GLYPHS = 4
VISION = 6
VIDEO = 2 * 3 * 5
CHANNELS = 32
DOUBLE = [f"transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * 7 + [False] * 2, [True] * 4 + [False] * 5])
VALID_GLYPHS = np.array([[True] * 3 + [False], [True] + [False] * 3])
# Both texts of a caption lie one after the other; the padding after them is cut to the longer sample.
TEXTS = [7 + 3, 4 + 1]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.hunyuanvideo.transformer import HunyuanVideo15Transformer3DModel

    return randomised(
        HunyuanVideo15Transformer3DModel(
            in_channels=2 * CHANNELS + 1,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=len(DOUBLE),
            num_refiner_layers=1,
            text_embed_dim=20,
            text_embed_2_dim=14,
            image_embed_dim=18,
            rope_axes_dim=(8, 8, 8),
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, CHANNELS, 2, 3, 5),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID),
        "text_encoder_output": {
            "prompt_embeds_2": torch.randn(BATCH, GLYPHS, 14),
            "attention_masks_2": torch.from_numpy(VALID_GLYPHS),
        },
        "data_backend_id": "films",
        "prompts": ["a", "b"],
    }


def image_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {
        "conditioning_latents": [torch.randn(BATCH, CHANNELS, 1, 3, 5)],
        "vision_states": torch.randn(BATCH, VISION, 18),
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.hunyuanvideo import transformer

    return taped_forwards(model, (transformer.HunyuanVideo15TransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module, vision: int = 0) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["hidden_states"].shape[1] == VIDEO
        assert crossing.arguments["encoder_hidden_states"].shape[1] == vision + max(TEXTS)
    text = [(vision, vision + length) for length in TEXTS]
    return {
        "image": separate(tape, DOUBLE, "hidden_states", 0),
        "text": joint(tape, DOUBLE, "encoder_hidden_states", text, result=1),
    }


CASES = [
    Case(
        family="hunyuanvideo",
        flavour=flavour,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 3, "text": 3},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, batch, compare in (
        ("t2v-480p", raw_batch, reference),
        ("i2v-480p", image_batch, partial(reference, vision=VISION)),
    )
]
