from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, separate, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.chroma.transformer import ChromaTransformer2DModel

    return randomised(
        ChromaTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=len(DOUBLE),
            num_single_layers=len(SINGLE),
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=20,
            axes_dims_rope=(8, 8, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.chroma import transformer

    return taped_forwards(model, (transformer.ChromaTransformerBlock, transformer.ChromaSingleTransformerBlock))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    image = [(TEXT, TEXT + IMAGE)] * BATCH
    text = [(0, TEXT)] * BATCH
    return {
        "image": separate(tape, DOUBLE, "hidden_states", 1) + joint(tape, SINGLE, "hidden_states", image),
        "text": separate(tape, DOUBLE, "encoder_hidden_states", 0, VALID)
        + joint(tape, SINGLE, "hidden_states", text, VALID),
    }


def mixed_sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    """The sigma with which the latents and the noise were really mixed, by least squares."""
    latents, noise, noisy = (prepared[name].double().flatten(1) for name in ("latents", "input_noise", "noisy_latents"))
    return ((noisy - latents) * (noise - latents)).sum(1) / (noise - latents).square().sum(1)


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    # In bfloat16 the mixed latents themselves are rounded.
    tolerance = 1e-6 if prepared["latents"].dtype == torch.float32 else 2e-3
    assert (mixed_sigma(prepared) - prepared["timesteps"].double() / 1000).abs().max() < tolerance
    # The timesteps are 1000 * sigma in the latents' dtype.
    return (prepared["timesteps"].float() / 1000).to(prepared["timesteps"].dtype).float()


CASES = [
    Case(
        family="chroma",
        flavour="base",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": 5, "text": 5},
        sigma=sigma,
    )
]
