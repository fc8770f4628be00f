from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

from families.sana import sigma

TEXT = 9
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.sanavideo.transformer import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=len(BLOCKS),
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # 3 frames of 3 x 5 patches.
    return {
        "latent_batch": torch.randn(BATCH, 16, 3, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "films",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.sanavideo.transformer import SanaVideoTransformerBlock

    return taped_forwards(model, (SanaVideoTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


CASES = [
    Case(
        family="sanavideo",
        flavour="2b-480p",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
    )
]
