from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, taped_forwards
from torch import nn

BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]
FRAMES = (11, 7)  # of the latents of each sample, padded to the longer


def denoiser() -> nn.Module:
    from py3langid.langid import LanguageIdentifier
    from simpletuner.helpers.models.ace_step import transformer

    # SimpleTuner asks for py3langid>=0.2.2, but makes its model object with a name that 0.4 no longer has.
    if not hasattr(LanguageIdentifier, "from_pickled_model"):
        LanguageIdentifier.from_pickled_model = LanguageIdentifier.from_model_file
    # The encoder of the lyrics has 100 million parameters whatever the config says; it is not part of a block.
    lyrics = partial(transformer.LyricEncoder, output_size=16, attention_heads=2, linear_units=32, num_blocks=1)
    with mock.patch.object(transformer, "LyricEncoder", lyrics):
        return transformer.ACEStepTransformer2DModel(
            num_layers=len(BLOCKS),
            inner_dim=48,
            attention_head_dim=24,
            num_attention_heads=2,
            mlp_ratio=2.0,
            max_position=64,
            speaker_embedding_dim=14,
            text_embedding_dim=20,
            ssl_encoder_depths=[1, 1],
            ssl_latent_dims=[8, 8],
            lyric_encoder_vocab_size=32,
            lyric_hidden_size=16,
            max_width=64,
        )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    latents = torch.randn(BATCH, 8, 16, max(FRAMES))
    latents[1, ..., FRAMES[1] :] = 0
    return {
        "latent_batch": latents,
        "latent_metadata": [{"latent_lengths": frames} for frames in FRAMES],
        "prompt_embeds": torch.randn(BATCH, 9, 20),
        "encoder_attention_mask": torch.tensor([[1.0] * 9, [1.0] * 4 + [0.0] * 5]),
        "lyric_token_ids": torch.randint(1, 32, (BATCH, 6)),
        "lyric_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "data_backend_id": "songs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.ace_step.attention import LinearTransformerBlock

    return taped_forwards(model, (LinearTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    image: StreamReference = []
    for path in BLOCKS:
        (crossing,) = tape.of(path)
        angle_BS = angles(crossing.arguments["hidden_states"], crossing.output)
        assert angle_BS.shape == (BATCH, max(FRAMES))
        image.append((path, [(angle_BS[b, :frames], None) for b, frames in enumerate(FRAMES)]))
    return {"image": image}


CASES = [
    Case(
        family="ace_step",
        flavour="base",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
