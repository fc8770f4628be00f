from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, joint, randomised, taped_forwards
from torch import nn

TEXT = 37
VALID = [TEXT, 7]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])
PADDED = [64, 32]  # texts and images are padded to a whole multiple of 32
IMAGE = 3 * 5
# 5 x 7 patches of the reference image, padded to two times 32.
REFERENCE = 64
PATHS = [f"layers.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.z_image_omni.transformer import ZImageOmniTransformer2DModel

    model = ZImageOmniTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=len(PATHS),
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        siglip_feat_dim=12,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )
    # The pad tokens are made without a value.
    return randomised(model)


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def reference_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 16, 10, 14)]}


def vision_batch(dtype: torch.dtype) -> dict[str, Any]:
    return reference_batch(dtype) | {"siglip_embeds": torch.randn(BATCH, 4, 4, 12)}


def prepare_model(model: Any) -> None:
    """One text for every image and one behind them, as SimpleTuner's pipeline splits a prompt.

    Its training code (4.10.1) gives the denoiser a single text, which it refuses if there is a reference image.
    """
    whole = model._prepare_prompt_list

    def split(*args: Any) -> list[list[torch.Tensor]]:
        return [[text[:2], text[2:5], text[5:]] for (text,) in whole(*args)]

    model._prepare_prompt_list = split


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.z_image_omni.transformer import ZImageTransformerBlock

    return taped_forwards(model, (ZImageTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    for path in PATHS:
        (crossing,) = tape.of(path)
        assert crossing.arguments["x"].shape[1] == max(PADDED) + 32
    return {
        "image": joint(tape, PATHS, "x", [(start, start + IMAGE) for start in PADDED]),
        "text": joint(tape, PATHS, "x", [(0, count) for count in VALID]),
    }


def reference_edit(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, vision: int = 0
) -> dict[str, StreamReference]:
    """Three texts, each padded to 32: 2, 3 and 32 or 2 tokens; the reference image; the noised image."""
    start = 3 * 32 + REFERENCE
    words = [[*range(2), *range(32, 35), *range(64, 64 + count - 5)] for count in VALID]
    text: StreamReference = []
    for path in PATHS:
        (crossing,) = tape.of(path)
        assert crossing.arguments["x"].shape[1] == start + 32 + vision
        angle_BS = angles(crossing.arguments["x"], crossing.output)
        text.append((path, [(angle_BS[b, words[b]], None) for b in range(BATCH)]))
    return {"image": joint(tape, PATHS, "x", [(start, start + IMAGE)] * BATCH), "text": text}


CASES = [
    Case(
        family="z_image_omni",
        flavour=flavour,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        prepare_model=prepare,
        label=label,
    )
    for flavour, label, batch, compare, prepare in (
        ("base", "base", raw_batch, reference, lambda model: None),
        ("edit", "edit", reference_batch, reference_edit, prepare_model),
        # The vision features are padded to 32, and the noised image has 32 of padding for its missing ones.
        ("edit", "edit with vision features", vision_batch, partial(reference_edit, vision=64), prepare_model),
    )
]
