"""The sigma of a prepared batch by the family's own formula, written out again: the reference for training/noise.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Prepared = Mapping[str, Any]


@dataclass(frozen=True)
class Noise:
    """sigma(prepared): the expected sigma of each sample, (B,). drawn_as(sigma_B): what prescribed sigmas become in a
    family that cannot take each. scheduler: what the model class reads from the pipeline's folder.
    """

    sigma: Callable[[Prepared], torch.Tensor]
    drawn_as: Callable[[torch.Tensor], torch.Tensor] = lambda sigma_B: sigma_B
    scheduler: Mapping[str, Any] = field(
        default_factory=lambda: {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        }
    )


def checked(sigma_B: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """These sigmas, which are also the share of noise in the noisy latents: (1 - sigma) * latents + sigma * noise.

    Of a video only the last frame is looked at: it is never given.
    """
    last = slice(None) if prepared["latents"].ndim < 5 else (slice(None), slice(None), slice(-1, None))
    noise = prepared.get("input_noise", prepared["noise"])
    latents, noise, noisy = (
        one[last].double().flatten(1) for one in (prepared["latents"], noise, prepared["noisy_latents"])
    )
    share_B = ((noisy - latents) * (noise - latents)).sum(1) / (noise - latents).square().sum(1)
    tolerance = 1e-5 if prepared["noisy_latents"].dtype == prepared["latents"].dtype == torch.float32 else 4e-3
    torch.testing.assert_close(share_B, sigma_B.double(), rtol=0, atol=tolerance)
    return sigma_B


def thousandths(prepared: Prepared) -> torch.Tensor:
    """The timesteps are 1000 * sigma, and the batch may have both in its latents' dtype."""
    steps_B = prepared["timesteps"]
    return (steps_B.float() / 1000).to(steps_B.dtype).float()


FLOW = Noise(lambda prepared: checked(thousandths(prepared), prepared))
TIMESTEPS_ARE_SIGMAS = Noise(lambda prepared: checked(prepared["timesteps"], prepared))
TIMESTEPS_ARE_CLEAN = Noise(lambda prepared: checked(1 - prepared["timesteps"], prepared))
THOUSANDTHS_ARE_CLEAN = Noise(
    lambda prepared: checked(1 - prepared["timesteps"] / 1000, prepared),
    scheduler={"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000},
)
# latents + edm * noise, which the model scales to the share edm / (1 + edm) of noise.
EDM = Noise(lambda prepared: prepared["timesteps"].float() / (1 + prepared["timesteps"].float()))


def ddpm(betas: np.ndarray, **scheduler: Any) -> Noise:
    """Whole steps of a DDPM schedule with these betas; sigma is the step's number / the last one's."""
    steps = len(betas)
    kept_T = torch.from_numpy(np.cumprod(1 - betas)).unsqueeze(1)

    def sigma(prepared: Prepared) -> torch.Tensor:
        """The step at which the noise was really mixed in, told by the noisy latents alone."""
        numbers = []
        for clean, noise, noisy in zip(prepared["latents"], prepared["noise"], prepared["noisy_latents"], strict=True):
            mixed_TN = kept_T.sqrt() * clean.double().reshape(1, -1) + (1 - kept_T).sqrt() * noise.double().reshape(
                1, -1
            )
            off_T = (mixed_TN.to(noisy.dtype) - noisy.reshape(1, -1)).abs().sum(dim=1, dtype=torch.float64)
            numbers.append(int(off_T.argmin()))
        return torch.tensor(numbers, dtype=torch.float64) / (steps - 1)

    plain = {"_class_name": "DDPMScheduler", "num_train_timesteps": steps}
    return Noise(sigma, lambda sigma_B: (sigma_B * steps).floor() / (steps - 1), plain | scheduler)


def scaled_linear(start: float, end: float, steps: int = 1000) -> Noise:
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    return ddpm(betas, beta_schedule="scaled_linear", beta_start=start, beta_end=end)


LINEAR = np.linspace(0.0001, 0.02, 1000)


def cosine_betas() -> np.ndarray:
    kept = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
    return np.array([min(1 - kept[step + 1] / kept[step], 0.999) for step in range(1000)])
