from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import (
    BATCH,
    FLOW_SCHEDULER,
    Case,
    StreamReference,
    Tape,
    separate,
    sigma_of_mix,
    taped_forwards,
    whole_steps,
)
from torch import nn

TEXT = 9
VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def denoiser(sample_size: int = 128) -> nn.Module:
    from simpletuner.helpers.models.pixart.transformer import PixArtTransformer2DModel

    # With 128 the model is also told the size of the image.
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=len(BLOCKS),
        cross_attention_dim=24,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=20,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # 3 x 5 patches of the image.
    return {
        "latent_batch": torch.randn(BATCH, 4, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": torch.from_numpy(VALID).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.pixart.transformer import PixArtSelfFlowTransformerBlock

    return taped_forwards(model, (PixArtSelfFlowTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


def sigma(prepared: Mapping[str, Any]) -> Any:
    return sigma_of_mix(prepared, np.linspace(0.0001, 0.02, 1000))


CASES = [
    Case(
        family="pixart",
        flavour=flavour,
        denoiser=lambda size=size: denoiser(size),
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
        drawn_as=whole_steps,
        scheduler=SCHEDULER,
    )
    for flavour, size in (("900M-1024-v0.6", 128), ("600M-512", 64))
] + [
    Case(
        family="pixart",
        flavour="900M-1024-v0.6",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        options={"prediction_type": "flow_matching"},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        # As Trainer.init_noise_schedule does once the prediction type is known.
        prepare_model=lambda model: model.setup_training_noise_schedule(),
        label="900M-1024-v0.6, flow matching",
        scheduler=FLOW_SCHEDULER,
    )
]
