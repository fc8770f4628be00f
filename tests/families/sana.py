from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

TEXT = 9
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]


def denoiser(patch_size: int = 1) -> nn.Module:
    from simpletuner.helpers.models.sana.transformer import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=len(BLOCKS),
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
        patch_size=patch_size,
    )


def raw_batch(dtype: torch.dtype, patch_size: int = 1) -> dict[str, Any]:
    # 3 x 5 patches of the image.
    return {
        "latent_batch": torch.randn(BATCH, 32, 3 * patch_size, 5 * patch_size),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.sana.transformer import SanaTransformerBlock

    return taped_forwards(model, (SanaTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


def sigma(prepared: Mapping[str, Any]) -> Any:
    """The share of noise in the noisy latents; the timesteps of Sana's table have to agree."""
    latents, noise, noisy = (prepared[name].double().flatten(1) for name in ("latents", "noise", "noisy_latents"))
    share_B = ((noisy - latents) * (noise - latents)).sum(1) / (noise - latents).square().sum(1)
    assert torch.allclose(share_B, prepared["timesteps"].double() / 1000, atol=1e-3)
    return prepared["timesteps"] / 1000


CASES = [
    Case(
        family="sana",
        flavour="sana1.5-1.6b-1024",
        denoiser=lambda size=size: denoiser(size),
        raw_batch=lambda dtype, size=size: raw_batch(dtype, size),
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
        label=label,
    )
    for label, size in (("1.5", 1), ("patches of 2", 2))
]
