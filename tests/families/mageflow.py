from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, randomised, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
DOUBLE = [f"transformer_blocks.{i}" for i in range(3)]
TEXTS = [9, 4]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser(checkpoint: bool = False) -> nn.Module:
    from simpletuner.helpers.models.mageflow.transformer import MageFlowTransformer2DModel

    return randomised(
        MageFlowTransformer2DModel(
            in_channels=128,
            out_channels=128,
            context_in_dim=20,
            hidden_size=48,
            num_heads=2,
            depth=len(DOUBLE),
            axes_dim=[8, 8, 8],
            checkpoint=checkpoint,
            attn_type="sdpa",
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, 3, 5),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def edit_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 128, 2, 4)]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.mageflow.vendor.models.modules import mage_layers

    return taped_forwards(model, (mage_layers.MageFlowTransformerBlock,))


def row(tape: Tape, argument: str, result: int, ranges: list[tuple[int, int]]) -> StreamReference:
    """All samples lie in one row; `ranges` are the places of each in it."""
    blocks = []
    for path in DOUBLE:
        (crossing,) = tape.of(path)
        (angle_S,) = angles(crossing.arguments[argument], crossing.output[result])
        blocks.append((path, [(angle_S[start:stop], None) for start, stop in ranges]))
    return blocks


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["hidden_states"].shape[1] == BATCH * (IMAGE + references)
        assert crossing.arguments["encoder_hidden_states"].shape[1] == sum(TEXTS)
    second = IMAGE + references
    return {
        "image": row(tape, "hidden_states", 1, [(0, IMAGE), (second, second + IMAGE)]),
        "text": row(tape, "encoder_hidden_states", 0, [(0, TEXTS[0]), (TEXTS[0], sum(TEXTS))]),
    }


CASES = [
    Case(
        family="mageflow",
        flavour=flavour,
        label=label,
        denoiser=partial(denoiser, checkpoint=label == "base, checkpointing"),
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 3, "text": 3},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, label, batch, compare in (
        ("base", "base", raw_batch, reference),
        # The family's own switch, which works in place of `gradient_checkpointing`.
        ("base", "base, checkpointing", raw_batch, reference),
        ("edit-base", "edit-base", edit_batch, partial(reference, references=REFERENCE)),
    )
]
