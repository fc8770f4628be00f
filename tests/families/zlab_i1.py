from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, separate, taped_forwards
from torch import nn

BLOCKS = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
TEXT = 9
WORDS = (9, 4)  # tokens of each caption


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.zlab_i1.transformer import ZlabI1Transformer2DModel

    return ZlabI1Transformer2DModel(
        input_size=16,
        image_resolution=128,
        hidden_size=48,
        depth=len(BLOCKS),
        num_heads=2,
        mlp_ratio=2.0,
        text_embed_dim=20,
        text_num_tokens=TEXT,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 32, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.tensor([[token < words for token in range(TEXT)] for words in WORDS]),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.zlab_i1.transformer import i1DiTBlock

    return taped_forwards(model, (i1DiTBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    image = separate(tape, BLOCKS, "image_tokens", 0)
    assert all(angle_S.shape == (3 * 5,) for _, samples in image for angle_S, _ in samples)
    text: StreamReference = []
    for path in BLOCKS:
        (crossing,) = tape.of(path)
        before, after = crossing.arguments["text_tokens"], crossing.output[1]
        samples: list[tuple[np.ndarray, np.ndarray | None]] = []
        for b, words in enumerate(WORDS):
            # The blocks set padding to zero, where an angle has no meaning.
            assert not after[b, words:].any()
            samples.append((angles(before[b, :words], after[b, :words]), None))
        text.append((path, samples))
    return {"image": image, "text": text}


CASES = [
    Case(
        family="zlab_i1",
        flavour="3b",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS), "text": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        scheduler_repositories=("black-forest-labs/FLUX.2-dev",),
    )
]
