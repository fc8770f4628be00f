from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, separate, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # patches
BLOCKS = [f"blocks.{i}" for i in range(3)]
AUDIO_WIDTH, AUDIO_LAYERS = 16, 2


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.infinitetalk.transformer import InfiniteTalkTransformer3DModel

    return InfiniteTalkTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,  # with the mask and the clean first frame
        out_channels=16,
        text_dim=20,
        freq_dim=16,
        ffn_dim=40,
        num_layers=len(BLOCKS),
        image_dim=14,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        audio_layers=AUDIO_LAYERS,
        audio_dim=AUDIO_WIDTH,
        audio_intermediate_dim=18,
        audio_output_dim=AUDIO_WIDTH,
        audio_context_tokens=5,
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [1.0] * 4 + [0.0] * (TEXT - 4)]),
        "conditioning_image_embeds": torch.randn(BATCH, 7, 14),
        "s2v_audio_paths": ["a.wav", "b.wav"],
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def with_audio_and_vae(model: Any) -> None:
    """Speech features in place of an audio file, which only FFmpeg can read, and the VAE of the first frame."""
    from diffusers import AutoencoderKLWan
    from simpletuner.helpers.models.infinitetalk.audio import window_audio_embeddings

    model.vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1).to(model.config.weight_dtype).eval()
    model.encode_audio = lambda path, frames: window_audio_embeddings(torch.randn(1, frames, AUDIO_LAYERS, AUDIO_WIDTH))
    model.model.audio_proj.norm.float()  # it gets a float32 input, and on a CPU no autocast helps


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.infinitetalk.transformer import InfiniteTalkTransformerBlock

    return taped_forwards(model, (InfiniteTalkTransformerBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    return {"image": separate(tape, BLOCKS, "hidden_states", None)}


CASES = [
    Case(
        family="infinitetalk",
        flavour="single-14b-480p",
        options={"framerate": 25},
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(BLOCKS)},
        prepare_model=with_audio_and_vae,
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
]
