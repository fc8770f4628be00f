from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, joint, randomised, taped_forwards
from torch import nn

TEXT = 37
VALID = [TEXT, 7]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])
ROWS, COLUMNS = 3, 5
REFERENCE_COLUMNS = 2
PADDED = 32  # image and text of each sample are padded to a whole multiple of 32
PATHS = [f"layers.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.z_image.transformer import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=48,
        n_layers=len(PATHS),
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )
    # The pad tokens are made without a value.
    return randomised(model)


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 2 * ROWS, 2 * COLUMNS),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def reference_batch(dtype: torch.dtype) -> dict[str, Any]:
    references = torch.randn(BATCH, 16, 2 * ROWS, 2 * REFERENCE_COLUMNS)
    return raw_batch(dtype) | {"conditioning_latents": [references], "conditioning_type": "reference_strict"}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.z_image.transformer import ZImageTransformerBlock

    return taped_forwards(model, (ZImageTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    for path in PATHS:
        (crossing,) = tape.of(path)
        # The longer text takes two times 32 tokens.
        assert crossing.arguments["x"].shape[1] == PADDED + 2 * PADDED
    return {
        "image": joint(tape, PATHS, "x", [(0, ROWS * COLUMNS)] * BATCH),
        "text": joint(tape, PATHS, "x", [(PADDED, PADDED + count) for count in VALID]),
    }


def reference_with_references(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    """Every row of the grid has the columns of the reference image first."""
    row = [False] * REFERENCE_COLUMNS + [True] * COLUMNS
    noised = np.array(row * ROWS)
    image: StreamReference = []
    for path in PATHS:
        (crossing,) = tape.of(path)
        angle_BS = angles(crossing.arguments["x"], crossing.output)[:, : len(noised)]
        image.append((path, [(angle_BS[b][noised], None) for b in range(BATCH)]))
    return reference(tape, prepared, model) | {"image": image}


CASES = [
    Case(
        family="z_image",
        flavour="turbo",
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        label=label,
    )
    for label, batch, compare in (
        ("turbo", raw_batch, reference),
        ("turbo with references", reference_batch, reference_with_references),
    )
]
