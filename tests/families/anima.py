from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

BLOCKS = [f"core.transformer_blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.anima.transformer import AnimaTransformerModel

    return AnimaTransformerModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=len(BLOCKS),
        mlp_ratio=2.0,
        text_embed_dim=20,
        adaln_lora_dim=12,
        max_size=(8, 16, 16),
        adapter_vocab_size=32,
        adapter_dim=20,
        adapter_layers=2,
        adapter_heads=2,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # The second caption is shorter: its T5 tokens are padding with weight 0.
    weights = torch.ones(BATCH, 11, 1)
    weights[1, 5:] = 0
    return {
        "latent_batch": torch.randn(BATCH, 16, 1, 6, 10),
        "prompt_embeds": torch.randn(BATCH, 9, 20),
        "t5xxl_ids": torch.randint(0, 32, (BATCH, 11)),
        "t5xxl_weights": weights,
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


def prepare_model(model: Any) -> None:
    """accelerate runs the forward of a bfloat16 run under autocast; Anima's float32 text weights need that."""
    if model.config.weight_dtype == torch.bfloat16:
        model.model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.model.forward)


CASES = [
    Case(
        family="anima",
        flavour="preview-3",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"],
        prepare_model=prepare_model,
    )
]
