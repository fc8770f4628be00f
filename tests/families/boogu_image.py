from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
OTHER_REFERENCE = 3 * 3
DOUBLE = [f"double_stream_layers.{i}" for i in range(2)]
SINGLE = [f"single_stream_layers.{i}" for i in range(3)]
TEXTS = [9, 4]
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.boogu_image.transformer import BooguImageTransformer2DModel

    return randomised(
        BooguImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            hidden_size=48,
            num_layers=len(DOUBLE) + len(SINGLE),
            num_double_stream_layers=len(DOUBLE),
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 64, 64),
            instruction_feature_configs={
                "instruction_feat_dim": 20,
                "reduce_type": "mean",
                "num_instruction_feat_layers": 1,
            },
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def edit_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 16, 4, 8)]}


def uneven_batch(dtype: torch.dtype) -> dict[str, Any]:
    """References of different shapes come as a list; SimpleTuner 4.10.1 gives all of them to the first sample."""
    return raw_batch(dtype) | {"conditioning_latents": [[torch.randn(16, 4, 8), torch.randn(16, 6, 6)]]}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.boogu_image import transformer

    return taped_forwards(
        model, (transformer.BooguImageDoubleStreamTransformerBlock, transformer.BooguImageTransformerBlock)
    )


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: tuple[int, int]
) -> dict[str, StreamReference]:
    image = [(before, before + IMAGE) for before in references]
    text = [(0, length) for length in TEXTS]
    image_after_text = [
        (length + before, length + before + IMAGE) for length, before in zip(TEXTS, references, strict=True)
    ]
    for path in SINGLE:
        joined = max(stop for _, stop in image_after_text)
        assert tape.of(path)[0].arguments["hidden_states"].shape[1] == joined
    return {
        "image": joint(tape, DOUBLE, "img_hidden_states", image, result=0)
        + joint(tape, SINGLE, "hidden_states", image_after_text),
        "text": joint(tape, DOUBLE, "instruct_hidden_states", text, result=1)
        + joint(tape, SINGLE, "hidden_states", text),
    }


CASES = [
    Case(
        family="boogu_image",
        flavour=flavour,
        label=label,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=partial(reference, references=references),
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: 1 - prepared["timesteps"],
    )
    for flavour, label, batch, references in (
        ("v0.1-base", "v0.1-base", raw_batch, (0, 0)),
        ("v0.1-edit", "v0.1-edit", edit_batch, (REFERENCE, REFERENCE)),
        ("v0.1-edit", "v0.1-edit, uneven references", uneven_batch, (REFERENCE + OTHER_REFERENCE, 0)),
    )
]
