from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, separate, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # patches
BLOCKS = [f"blocks.{i}" for i in range(3)]


def denoiser(in_channels: int = 16, **config: Any) -> nn.Module:
    from simpletuner.helpers.models.wan.transformer import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=20,
        freq_dim=16,
        ffn_dim=40,
        num_layers=len(BLOCKS),
        rope_max_seq_len=32,
        **config,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def raw_batch_with_image_embeds(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_image_embeds": torch.randn(BATCH, 7, 14)}


def raw_batch_with_first_frame(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_pixel_values": torch.rand(BATCH, 3, 48, 80) * 2 - 1}


def with_vae(model: Any) -> None:
    """The tiny VAE that encodes the first frame."""
    from diffusers import AutoencoderKLWan

    model.vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1).to(model.config.weight_dtype).eval()


def with_vae_and_timesteps_of_frames(model: Any) -> None:
    """SimpleTuner 4.10.1 sets this switch of TI2V too early and its own constructor turns it off again."""
    with_vae(model)
    model._wan_expand_timesteps = True


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.wan.transformer import WanTransformerBlock

    return taped_forwards(model, (WanTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


def reference_after_first_frame(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module
) -> dict[str, StreamReference]:
    """The first frame is given clean, at timestep 0: its tokens are no part of the image stream."""
    noised = [(HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH)] * BATCH
    return {"image": joint(tape, BLOCKS, "hidden_states", noised)}


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    return prepared["timesteps"] / 1000


CASES = [
    Case(
        family="wan",
        flavour="t2v-480p-1.3b-2.1",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
    ),
    Case(
        family="wan",
        flavour="i2v-14b-2.1",
        # The mask and the clean first frame are further channels of the same tokens.
        denoiser=lambda: denoiser(in_channels=36, image_dim=14, added_kv_proj_dim=24),
        raw_batch=raw_batch_with_image_embeds,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        prepare_model=with_vae,
        sigma=sigma,
    ),
    Case(
        family="wan",
        flavour="ti2v-5b-2.2",
        denoiser=denoiser,
        raw_batch=raw_batch_with_first_frame,
        tape=tape,
        reference=reference_after_first_frame,
        blocks={"image": len(BLOCKS)},
        prepare_model=with_vae_and_timesteps_of_frames,
        sigma=sigma,
    ),
]
