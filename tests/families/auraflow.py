from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, separate, taped_forwards
from torch import nn

REGISTERS = 8
TEXT = 9
IMAGE = 3 * 5
DOUBLE = [f"joint_transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.auraflow.transformer import AuraFlowTransformer2DModel

    return randomised(
        AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=len(DOUBLE),
            num_single_dit_layers=len(SINGLE),
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=20,
            caption_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=64,
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 4, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.auraflow import transformer

    return taped_forwards(
        model, (transformer.AuraFlowJointTransformerBlock, transformer.AuraFlowSingleTransformerBlock)
    )


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    before_image = REGISTERS + TEXT
    image = [(before_image, before_image + IMAGE)] * BATCH
    text = [(REGISTERS, before_image)] * BATCH
    return {
        "image": separate(tape, DOUBLE, "hidden_states", 1) + joint(tape, SINGLE, "hidden_states", image),
        "text": joint(tape, DOUBLE, "encoder_hidden_states", text, VALID, result=0)
        + joint(tape, SINGLE, "hidden_states", text, VALID),
    }


CASES = [
    Case(
        family="auraflow",
        flavour="v0.3",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
