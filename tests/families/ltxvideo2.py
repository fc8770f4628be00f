from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, taped_forwards
from torch import nn

TEXT = 9
FRAMES, HEIGHT, WIDTH = 3, 3, 5  # a token is one latent
VIDEO = FRAMES * HEIGHT * WIDTH
AUDIO = 17  # latents in the (3 - 1) * 8 + 1 video frames at 25 a second
REFERENCE = 2 * HEIGHT * WIDTH
BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]


def denoiser(newer: bool = False) -> nn.Module:
    """newer: the switches of LTX 2.3, which gates attention and modulates the text."""
    from simpletuner.helpers.models.ltxvideo2.transformer import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=len(BLOCKS),
        caption_channels=20,
        rope_type="split",
        gated_attn=newer,
        cross_attn_mod=newer,
        audio_gated_attn=newer,
        audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer,
    )


def with_vaes_and_connectors(newer: bool = False) -> Any:
    """The parts beside the denoiser that a step asks for: the ratios of the VAEs and the text connectors."""

    def prepare_model(model: Any) -> None:
        from simpletuner.helpers.models.ltxvideo2.audio_autoencoder import AutoencoderKLLTX2Audio
        from simpletuner.helpers.models.ltxvideo2.autoencoder import AutoencoderKLLTX2Video
        from simpletuner.helpers.models.ltxvideo2.connectors import LTX2TextConnectors

        with torch.device("meta"):
            model.audio_vae = AutoencoderKLLTX2Audio()
            model.vae = AutoencoderKLLTX2Video(temporal_compression_ratio=8)
        model.connectors = LTX2TextConnectors(
            caption_channels=20,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=12 if newer else 10,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=3,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8 if newer else 10,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=3,
            per_modality_projections=newer,
            video_hidden_dim=24,
            audio_hidden_dim=16,
            rope_type="split",
        ).to(model.config.weight_dtype)
        # accelerate runs the forward of a bfloat16 run under autocast; latents with a given frame are float32.
        dtype = model.config.weight_dtype
        model.model.forward = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)(model.model.forward)

    return prepare_model


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 128, FRAMES, HEIGHT, WIDTH),
        "audio_latent_batch": torch.randn(BATCH, 8, AUDIO, 16),
        "prompt_embeds": torch.randn(BATCH, TEXT, 60),
        "add_text_embeds": None,
        "encoder_attention_mask": torch.tensor([[1.0] * TEXT, [0.0] * (TEXT - 4) + [1.0] * 4]),
        "data_backend_id": "videos",
        "prompts": ["a", "b"],
    }


def raw_batch_with_reference(dtype: torch.dtype) -> dict[str, Any]:
    reference = torch.randn(BATCH, 128, 2, HEIGHT, WIDTH)
    return raw_batch(dtype) | {"conditioning_latents": [reference], "conditioning_type": "reference_strict"}


def raw_batch_with_one_silent(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"audio_latent_mask": torch.tensor([1.0, 0.0])}


def raw_batch_of_audio(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"latent_batch": None, "is_audio_only": True, "video_latent_mask": torch.zeros(BATCH)}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.ltxvideo2.transformer import LTX2VideoTransformerBlock

    return taped_forwards(model, (LTX2VideoTransformerBlock,))


def reference_of(video: tuple[int, int]) -> Any:
    """video: the range of the noised tokens in the video stream."""

    def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
        ranges = {"image": ("hidden_states", 0, video), "audio": ("audio_hidden_states", 1, (0, AUDIO))}
        streams: dict[str, StreamReference] = {}
        for stream, (argument, result, (start, stop)) in ranges.items():
            streams[stream] = []
            for path in BLOCKS:
                (crossing,) = tape.of(path)
                angle_BS: np.ndarray = angles(crossing.arguments[argument], crossing.output[result])
                assert stream == "image" or angle_BS.shape[1] == AUDIO
                streams[stream].append((path, [(angle_BS[b, start:stop], None) for b in range(BATCH)]))
        return streams

    return reference


def case(label: str, batch: Any = raw_batch, video: tuple[int, int] = (0, VIDEO), **options: Any) -> Case:
    newer = label.startswith("2.3")
    return Case(
        family="ltxvideo2",
        flavour=label.split(",")[0],
        label=label,
        denoiser=lambda: denoiser(newer),
        raw_batch=batch,
        tape=tape,
        reference=reference_of(video),
        blocks={"image": len(BLOCKS), "audio": len(BLOCKS)},
        prepare_model=with_vaes_and_connectors(newer),
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        **options,
    )


CASES = [
    case("dev"),
    case("dev, reference video", raw_batch_with_reference, (REFERENCE, REFERENCE + VIDEO)),
    case(
        "dev, first frame given",
        video=(HEIGHT * WIDTH, VIDEO),
        options={"ltx2_first_frame_conditioning_probability": 1.0},
    ),
    case("dev, one sample without audio", raw_batch_with_one_silent, absent={"audio": (1,)}),
    case("dev, audio alone", raw_batch_of_audio, absent={"image": (0, 1)}),
    case("2.3-dev"),
]
