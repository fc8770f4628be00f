from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # patches
BLOCKS = [f"blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.longcat_video.transformer import LongCatVideoTransformer3DModel

    return LongCatVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        hidden_size=32,
        depth=len(BLOCKS),
        num_heads=2,
        caption_channels=20,
        mlp_ratio=2,
        adaln_tembed_dim=16,
        frequency_embedding_size=16,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def with_float32_modulation(model: Any) -> None:
    """On CUDA the family computes the modulation in float32 by an autocast that a CPU does not have."""
    for name, module in model.model.named_modules():
        if name.endswith(("adaLN_modulation", "t_embedder")):
            module.float()


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.longcat_video.transformer import LongCatSingleStreamBlock

    return taped_forwards(model, (LongCatSingleStreamBlock,))


def reference_after(frames: int) -> Any:
    def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
        noised = [(frames * HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH)] * BATCH
        return {"image": joint(tape, BLOCKS, "x", noised)}

    return reference


CASES = [
    Case(
        family="longcat_video",
        flavour="final",
        label=label,
        denoiser=denoiser,
        raw_batch=lambda dtype, frames=frames: raw_batch(dtype) | {"conditioning_latent_count": frames},
        tape=tape,
        prepare_model=with_float32_modulation,
        reference=reference_after(frames),
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for label, frames in (("final", 0), ("final, first frame given", 1))
]
