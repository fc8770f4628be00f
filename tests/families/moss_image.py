from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCES = 2 * 3 + 1 * 2
PATHS = [f"layers.{i}" for i in range(3)]
VALID = [TEXT, 4]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.moss_image.transformer import MOSSImageTransformer

    return randomised(
        MOSSImageTransformer(
            dim=48, ffn_dim=40, num_heads=2, num_layers=len(PATHS), text_dim=20, freq_dim=16, latent_channels=128
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, 3, 5),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def edit_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 128, 2, 3), torch.randn(BATCH, 128, 1, 2)]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.moss_image.transformer import MOSSImageTransformerBlock

    return taped_forwards(model, (MOSSImageTransformerBlock,))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["x"].shape[1] == IMAGE + TEXT + references
    return {
        "image": joint(tape, PATHS, "x", [(0, IMAGE)] * BATCH),
        "text": joint(tape, PATHS, "x", [(IMAGE, IMAGE + count) for count in VALID]),
    }


CASES = [
    Case(
        family="moss_image",
        flavour=flavour,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, batch, compare in (
        ("base", raw_batch, reference),
        ("base-edit", edit_batch, partial(reference, references=REFERENCES)),
    )
]
