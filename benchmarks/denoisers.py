"""The denoisers that are measured: SimpleTuner's own transformer classes with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from simpletuner_layerprobe.probe.families import Family, family


@dataclass(frozen=True)
class Shape:
    """One denoiser. side: latent pixels of the image's side. text: tokens of the prompt."""

    family: str
    config: dict[str, Any]
    side: int
    text: int


def sd3(width: int, blocks: int, side: int, text: int, joint: int, pooled: int, heads: int) -> Shape:
    config = {
        "sample_size": side,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": width // heads,
        "num_attention_heads": heads,
        "joint_attention_dim": joint,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "out_channels": 16,
        "pos_embed_max_size": max(192, side // 2),
        "qk_norm": "rms_norm",
    }
    return Shape("sd3", config, side, text)


def flux(heads: int, head: int, double: int, single: int, side: int, text: int, joint: int, pooled: int) -> Shape:
    config = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": True,
        "axes_dims_rope": (head // 8, head * 7 // 16, head * 7 // 16),
    }
    return Shape("flux", config, side, text)


# 1024 x 1024 pixels are 128 x 128 latents. SimpleTuner's SD3 text: 77 CLIP and 154 T5 tokens; Flux.1-dev: 512 T5.
SHAPES = {
    "sd3.5-large": sd3(2432, 38, 128, 77 + 154, 4096, 2048, 38),
    "flux.1-dev": flux(24, 128, 19, 38, 128, 512, 4096, 768),
    # Four of SD3.5 Medium's 24 blocks at 512 x 512: the probe's share of a step hardly depends on how many there are.
    "sd3.5-medium": sd3(1536, 4, 64, 77 + 154, 4096, 2048, 24),
    "sd3-small": sd3(768, 10, 48, 154, 256, 64, 12),
    # As many blocks as the real ones, so narrow that the host is all that counts.
    "sd3.5-large, narrow": sd3(32, 38, 8, 5, 16, 8, 2),
    "flux.1-dev, narrow": flux(2, 32, 19, 38, 8, 5, 16, 8),
    "sd3-tiny": sd3(32, 3, 8, 5, 16, 8, 2),
    "flux-tiny": flux(2, 32, 2, 2, 8, 5, 16, 8),
}


@dataclass
class Subject:
    """A denoiser with one batch of inputs; `batch` is what the probe's token rules ask of SimpleTuner's batch."""

    denoiser: nn.Module
    entry: Family
    inputs: dict[str, Any]
    batch: dict[str, torch.Tensor]
    count: int

    def forward(self) -> torch.Tensor:
        return self.denoiser(**self.inputs, return_dict=False)[0]


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, what is made with no device and dtype of its own has these; random numbers are the same each time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def denoiser(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """SimpleTuner's own class with random weights."""
    with _made_on(device, dtype):
        made = _class(shape.family)(**shape.config)
    # Buffers that a class makes in float32 (the positions) follow, as when SimpleTuner moves its model.
    return nn.Module.to(made, device=device, dtype=dtype).requires_grad_(False)


def subject(name: str, count: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Subject:
    """Build a denoiser of SHAPES on the device, with random weights, and inputs for `count` samples."""
    shape = SHAPES[name]
    made = denoiser(shape, device, dtype)
    with _made_on(device, dtype):
        latents = torch.randn(count, 16, shape.side, shape.side)
        text = torch.randn(count, shape.text, shape.config["joint_attention_dim"])
        pooled = torch.randn(count, shape.config["pooled_projection_dim"])
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if shape.family == "sd3":
        inputs |= {"hidden_states": latents, "timestep": torch.full((count,), 500.0, device=device, dtype=dtype)}
    else:
        side = shape.side // 2
        ids = torch.zeros(side, side, 3)
        ids[..., 1] += torch.arange(side)[:, None]
        ids[..., 2] += torch.arange(side)[None, :]
        inputs |= {
            "hidden_states": latents.reshape(count, side * side, 64),
            "timestep": torch.full((count,), 0.5, device=device, dtype=dtype),
            "guidance": torch.full((count,), 1.0, device=device, dtype=dtype),
            "img_ids": ids.reshape(-1, 3).to(device=device, dtype=dtype),
            "txt_ids": torch.zeros(shape.text, 3, device=device, dtype=dtype),
        }
    batch = {"latents": latents, "encoder_hidden_states": text}
    return Subject(made, family(shape.family), inputs, batch, count)


def _class(name: str) -> type[nn.Module]:
    if name == "sd3":
        from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

        return SD3Transformer2DModel
    from simpletuner.helpers.models.flux.transformer import FluxTransformer2DModel

    return FluxTransformer2DModel
