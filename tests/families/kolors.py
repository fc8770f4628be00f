from __future__ import annotations

from typing import Any

import numpy as np
import torch
from family_case import FLOW_SCHEDULER, Case, sigma_of_mix, whole_steps
from torch import nn

from families.sdxl import BASE, base, raw_batch, reference, tape

# Kolors has 1100 steps.
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1100,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.014,
}


def denoiser() -> nn.Module:
    # The text has the width of ChatGLM's states and is projected.
    return base(encoder_hid_dim=26, encoder_hid_dim_type="text_proj")


def batch(dtype: torch.dtype) -> dict[str, Any]:
    raw = raw_batch(dtype)
    raw["prompt_embeds"] = torch.randn(2, 9, 26)
    return raw


def sigma(prepared: Any) -> Any:
    return sigma_of_mix(prepared, np.linspace(0.00085**0.5, 0.014**0.5, 1100) ** 2)


CASES = [
    Case(
        family="kolors",
        flavour="1.0",
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BASE)},
        sigma=sigma,
        drawn_as=lambda sigma_B: whole_steps(sigma_B, 1100),
        scheduler=SCHEDULER,
    ),
    Case(
        family="kolors",
        flavour="1.0",
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BASE)},
        options={"prediction_type": "flow_matching"},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        # As Trainer.init_noise_schedule does once the prediction type is known.
        prepare_model=lambda model: model.setup_training_noise_schedule(),
        label="1.0, flow matching",
        scheduler=FLOW_SCHEDULER,
    ),
]
