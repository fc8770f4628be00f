from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, separate, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
PATHS = [f"transformer_blocks.{i}" for i in range(3)]
VALID = [TEXT, 4]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.qwen_image.transformer import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=len(PATHS),
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(8, 8, 8),
    )


def denoiser_21() -> nn.Module:
    from simpletuner.helpers.models.qwen_image.transformer_21 import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        patch_size=1,
        in_channels=64,
        out_channels=64,
        num_layers=len(PATHS),
        attention_head_dim=24,
        num_attention_heads=2,
        context_in_dim=20,
        axes_dims_rope=(8, 8, 8),
    )


def text_batch() -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {"latent_batch": torch.randn(BATCH, 16, 6, 10)} | text_batch()


def raw_batch_edit_v1(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": torch.randn(BATCH, 16, 4, 6)}


def raw_batch_edit_v2(dtype: torch.dtype) -> dict[str, Any]:
    # SimpleTuner 4.10.1 keeps the first of this list and takes it apart as a list of reference datasets. What its
    # collate function returns, one (B, C, H, W) tensor for each dataset, passes that only where B is 1.
    return raw_batch(dtype) | {"conditioning_latents": [[torch.randn(BATCH, 16, 4, 6), torch.randn(BATCH, 16, 2, 4)]]}


def raw_batch_21(dtype: torch.dtype) -> dict[str, Any]:
    return {"latent_batch": torch.randn(BATCH, 64, 3, 5)} | text_batch()


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.qwen_image import transformer, transformer_21

    return taped_forwards(model, (transformer.QwenImageTransformerBlock, transformer_21.QwenImage21TransformerBlock))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {
        "image": separate(tape, PATHS, "hidden_states", 1),
        "text": joint(tape, PATHS, "encoder_hidden_states", [(0, count) for count in VALID], result=0),
    }


def reference_edit(references: int) -> Any:
    def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
        for crossing in tape.crossings:
            assert crossing.arguments["hidden_states"].shape[1] == IMAGE + references
        return {
            "image": joint(tape, PATHS, "hidden_states", [(0, IMAGE)] * BATCH, result=1),
            "text": joint(tape, PATHS, "encoder_hidden_states", [(0, count) for count in VALID], result=0),
        }

    return reference


def reference_21(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {
        "image": joint(tape, PATHS, "hidden_states", [(TEXT, TEXT + IMAGE)] * BATCH),
        "text": joint(tape, PATHS, "hidden_states", [(0, count) for count in VALID]),
    }


CASES = [
    Case(
        family="qwen_image",
        flavour=flavour,
        denoiser=make,
        raw_batch=batch,
        tape=tape,
        reference=expected,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, make, batch, expected in (
        ("v1.0", denoiser, raw_batch, reference),
        ("edit-v1", denoiser, raw_batch_edit_v1, reference_edit(6)),
        ("edit-v2", denoiser, raw_batch_edit_v2, reference_edit(6 + 2)),
        ("v2.1", denoiser_21, raw_batch_21, reference_21),
    )
]
