from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, separate, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.flux.transformer import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=len(DOUBLE),
        num_single_layers=len(SINGLE),
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=14,
        guidance_embeds=True,
        axes_dims_rope=(8, 8, 8),
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": torch.randn(BATCH, 14),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def kontext_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 16, 4, 8)]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.flux import transformer

    return taped_forwards(model, (transformer.FluxTransformerBlock, transformer.FluxSingleTransformerBlock))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        joint_text = TEXT if crossing.path in SINGLE else 0
        assert crossing.arguments["hidden_states"].shape[1] == joint_text + IMAGE + references
    alone = [(0, IMAGE)] * BATCH
    image = [(TEXT, TEXT + IMAGE)] * BATCH
    text = [(0, TEXT)] * BATCH
    return {
        "image": joint(tape, DOUBLE, "hidden_states", alone, result=1) + joint(tape, SINGLE, "hidden_states", image),
        "text": separate(tape, DOUBLE, "encoder_hidden_states", 0, VALID)
        + joint(tape, SINGLE, "hidden_states", text, VALID),
    }


CASES = [
    Case(
        family="flux",
        flavour=flavour,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, batch, compare in (
        ("dev", raw_batch, reference),
        ("kontext", kontext_batch, partial(reference, references=REFERENCE)),
    )
]
