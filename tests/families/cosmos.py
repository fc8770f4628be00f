from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]
TEXT = 9


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.cosmos.transformer import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=len(BLOCKS),
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=12,
        max_size=(8, 16, 16),
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # The blocks get no text mask: SimpleTuner's T5 embeddings are zero where the caption has ended.
    text = torch.randn(BATCH, TEXT, 20)
    text[1, 4:] = 0
    return {
        "latent_batch": torch.randn(BATCH, 16, 1, 6, 10),
        "prompt_embeds": text,
        "encoder_attention_mask": None,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.cosmos.transformer import CosmosTransformerBlock

    return taped_forwards(model, (CosmosTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    image = separate(tape, BLOCKS, "hidden_states", None)
    assert all(angle_S.shape == (3 * 5,) for _, samples in image for angle_S, _ in samples)
    return {"image": image}


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    """The noise's part of the noised latents, after the model has scaled them: noise / (latents + noise)."""
    edm_B = prepared["timesteps"].float()
    return edm_B / (1 + edm_B)


CASES = [
    Case(
        family="cosmos",
        flavour="2b",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
    )
]
