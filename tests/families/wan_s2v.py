from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 5, 4, 5  # patches; the motion packer needs 8 x 8 latents, the audio encoder 4 frames
BLOCKS = [f"blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.wan_s2v.transformer import WanS2VTransformer3DModel

    return WanS2VTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=20,
        freq_dim=16,
        audio_dim=14,
        # The audio is added to the video between the blocks.
        audio_inject_layers=(0, 2),
        ffn_dim=40,
        num_layers=len(BLOCKS),
        num_weighted_avg_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "s2v_audio_embeds": torch.randn(BATCH, 4, 14, 11),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.wan_s2v.transformer import WanS2VTransformerBlock

    return taped_forwards(model, (WanS2VTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    """The sequence is [video | reference image]."""
    (first, *_) = tape.of(BLOCKS[0])
    assert first.arguments["hidden_states"].shape[1] == (FRAMES + 1) * HEIGHT * WIDTH
    return {"image": joint(tape, BLOCKS, "hidden_states", [(0, FRAMES * HEIGHT * WIDTH)] * BATCH)}


CASES = [
    Case(
        family="wan_s2v",
        flavour="s2v-14b-2.2",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
