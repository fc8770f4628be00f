from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

TEXT = 9
TEXT_LAYERS = 4
IMAGE = 3 * 5
PATHS = [f"transformer_blocks.{i}" for i in range(3)]
VALID = [TEXT, 4]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.krea2.transformer import Krea2Transformer2DModel

    return randomised(
        Krea2Transformer2DModel(
            in_channels=64,
            num_layers=len(PATHS),
            attention_head_dim=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=40,
            timestep_embed_dim=16,
            text_hidden_dim=20,
            num_text_layers=TEXT_LAYERS,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=28,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(8, 8, 8),
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, TEXT_LAYERS, 20) * MASK[..., None, None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def reference_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 16, 6, 10)]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.krea2.transformer import Krea2TransformerBlock

    return taped_forwards(model, (Krea2TransformerBlock,))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["hidden_states"].shape[1] == TEXT + IMAGE + references
    return {
        "image": joint(tape, PATHS, "hidden_states", [(TEXT, TEXT + IMAGE)] * BATCH),
        "text": joint(tape, PATHS, "hidden_states", [(0, count) for count in VALID]),
    }


CASES = [
    Case(
        family="krea2",
        flavour="raw",
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        options=options,
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        label=label,
    )
    for label, batch, compare, options in (
        ("raw", raw_batch, reference, {}),
        (
            "raw with references",
            reference_batch,
            partial(reference, references=IMAGE),
            {"krea2_reference_latents": True},
        ),
    )
]
