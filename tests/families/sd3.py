from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles
from torch import nn

BLOCKS = 4
WIDTH = 24


def denoiser(dual_attention: tuple[int, ...] = ()) -> nn.Module:
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=14,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=dual_attention,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # Odd lengths: 3 x 5 patches of the image, 13 text tokens.
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, 13, 20),
        "add_text_embeds": torch.randn(BATCH, 14),
        "encoder_attention_mask": None,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


@contextmanager
def tape(model: nn.Module) -> Iterator[Tape]:
    """SD3's forward never calls a block: the states are what its norm layers get, and the last norm."""
    states: dict[str, list[torch.Tensor]] = {"image": [], "text": []}
    handles = []

    def keep(stream: str, module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: states[stream].append(args[0].clone())))

    for block in model.transformer_blocks:
        keep("image", block.norm1.norm)
        keep("text", block.norm1_context.norm)
    keep("image", model.norm_out.norm)
    result = Tape()
    result.states = states  # type: ignore[attr-defined]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    streams: dict[str, StreamReference] = {}
    for stream, states in tape.states.items():  # type: ignore[attr-defined]
        streams[stream] = []
        for index, (before, after) in enumerate(pairwise(states)):
            angle_BS = angles(before, after)
            streams[stream].append((f"transformer_blocks.{index}", [(angle_BS[b], None) for b in range(BATCH)]))
    return streams


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    return prepared["timesteps"] / 1000


CASES = [
    Case(
        family="sd3",
        flavour=flavour,
        denoiser=lambda dual=dual: denoiser(dual),
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": BLOCKS, "text": BLOCKS - 1},
        sigma=sigma,
    )
    for flavour, dual in (("large", ()), ("medium", (0, 1)))
]
