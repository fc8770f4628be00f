from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
PATHS = [f"layers.{i}" for i in range(3)]
VALID = [TEXT, 4]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.ideogram.transformer import Ideogram4Config, Ideogram4Transformer

    config = Ideogram4Config(
        emb_dim=48,
        num_layers=len(PATHS),
        num_heads=2,
        intermediate_size=40,
        adanln_dim=16,
        llm_features_dim=20,
        mrope_section=(4, 4, 4),
    )
    return randomised(Ideogram4Transformer(config))


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, 3, 5),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.ideogram.transformer import Ideogram4TransformerBlock

    return taped_forwards(model, (Ideogram4TransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["x"].shape[1] == TEXT + IMAGE
    return {
        "image": joint(tape, PATHS, "x", [(TEXT, TEXT + IMAGE)] * BATCH),
        "text": joint(tape, PATHS, "x", [(0, count) for count in VALID]),
    }


CASES = [
    Case(
        family="ideogram",
        flavour="fp8",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
