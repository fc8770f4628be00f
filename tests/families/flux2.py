from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, separate, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.flux2.transformer import Flux2Transformer2DModel

    return randomised(
        Flux2Transformer2DModel(
            in_channels=128,
            num_layers=len(DOUBLE),
            num_single_layers=len(SINGLE),
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=20,
            timestep_guidance_channels=16,
            axes_dims_rope=(8, 8, 8, 8),
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # Latents of the VAE: model_predict puts 2 x 2 of them into one.
    return {
        "latent_batch": torch.randn(BATCH, 32, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def batch_with_references(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {
        "latent_batch": torch.randn(BATCH, 128, 3, 5),
        "conditioning_latents": [torch.randn(BATCH, 128, 2, 4)],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.flux2 import transformer

    return taped_forwards(model, (transformer.Flux2TransformerBlock, transformer.Flux2SingleTransformerBlock))


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
        family="flux2",
        flavour="dev",
        label=label,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for label, batch, compare in (
        ("dev", raw_batch, reference),
        ("dev with a reference image", batch_with_references, partial(reference, references=REFERENCE)),
    )
]
