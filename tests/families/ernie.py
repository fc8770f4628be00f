from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, randomised, taped_forwards
from torch import nn

TEXT = 13
# SimpleTuner cuts the text to the longest of the batch.
VALID = [4, 9]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])
LONGEST = 9
IMAGE = 3 * 5
PATHS = [f"layers.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.ernie.transformer import ErnieImageTransformer2DModel

    return randomised(
        ErnieImageTransformer2DModel(
            hidden_size=48,
            num_attention_heads=2,
            num_layers=len(PATHS),
            ffn_hidden_size=40,
            in_channels=128,
            out_channels=128,
            patch_size=1,
            text_in_dim=20,
            rope_axes_dim=(8, 8, 8),
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


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.ernie.transformer_diffusers import ErnieImageSharedAdaLNBlock

    return taped_forwards(model, (ErnieImageSharedAdaLNBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    """The states are (S, B, D): [image | text | padding]."""
    streams: dict[str, StreamReference] = {"image": [], "text": []}
    for path in PATHS:
        (crossing,) = tape.of(path)
        angle_SB = angles(crossing.arguments["x"], crossing.output)
        assert angle_SB.shape == (IMAGE + LONGEST, BATCH)
        streams["image"].append((path, [(angle_SB[:IMAGE, b], None) for b in range(BATCH)]))
        streams["text"].append((path, [(angle_SB[IMAGE : IMAGE + VALID[b], b], None) for b in range(BATCH)]))
    return streams


CASES = [
    Case(
        family="ernie",
        flavour="base",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
