from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, separate, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
LAYERS = 2
IMAGE_ALONE = [f"mode_blocks.image.{i}" for i in range(LAYERS)]
TEXT_ALONE = [f"txt_mode_blocks.{i}" for i in range(LAYERS)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser(flow_map: bool = False) -> nn.Module:
    from simpletuner.helpers.models.flux3_image.transformer import Flux3ImageTransformer2DModel

    return randomised(
        Flux3ImageTransformer2DModel(
            joint_attention_dim=20,
            num_attention_heads=2,
            attention_head_dim=32,
            num_layers=LAYERS,
            num_single_layers=len(SINGLE),
            axes_dims_rope=(8, 8, 8, 8),
            timestep_channels=16,
            flow_map=flow_map,
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, 3, 5),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def batch_with_references(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 128, 2, 4)]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.flux3_image import transformer

    return taped_forwards(model, (transformer.Flux3ImageTransformerBlock,))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    for path in SINGLE:
        assert tape.of(path)[0].arguments["hidden_states"].shape[1] == TEXT + IMAGE + references
    image = [(TEXT, TEXT + IMAGE)] * BATCH
    text = [(0, TEXT)] * BATCH
    return {
        "image": separate(tape, IMAGE_ALONE, "hidden_states", None) + joint(tape, SINGLE, "hidden_states", image),
        "text": separate(tape, TEXT_ALONE, "hidden_states", None, VALID)
        + joint(tape, SINGLE, "hidden_states", text, VALID),
    }


CASES = [
    Case(
        family="flux3_image",
        flavour=flavour,
        label=label,
        denoiser=partial(denoiser, flow_map=flavour == "klein"),
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, label, batch, compare in (
        ("klein-base", "klein-base", raw_batch, reference),
        (
            "klein-base",
            "klein-base with a reference image",
            batch_with_references,
            partial(reference, references=REFERENCE),
        ),
        ("klein", "klein", raw_batch, reference),
    )
]
