from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, taped_forwards
from torch import nn

BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]
FRAMES = 11


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.minimaxmusic.transformer import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=20,
        num_layers=len(BLOCKS),
        num_attention_heads=2,
        attention_head_dim=24,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=32,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 8, FRAMES),
        # One hidden state of the language model for each frame.
        "prompt_embeds": torch.randn(BATCH, FRAMES, 20),
        "data_backend_id": "songs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.minimaxmusic.transformer import MiniMaxMusic3TransformerBlock

    return taped_forwards(model, (MiniMaxMusic3TransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    # One time token stands before the frames.
    return {"image": joint(tape, BLOCKS, "hidden_states", [(1, 1 + FRAMES)] * BATCH)}


CASES = [
    Case(
        family="minimaxmusic",
        flavour="music3",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: 1 - prepared["timesteps"],
    )
]
