from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, noise_share, taped_forwards
from torch import nn

BLOCKS = [f"transformer_blocks.{i}" for i in range(3)]
FRAME = 3 * 5  # tokens of one frame
TEXT = 9
WORDS = (9, 4)  # tokens of each caption
PICTURE = 3  # tokens at the front of a prompt that stand for a given picture
VIDEO_TAG, TEXT_TAG, PADDING_TAG = 0, 1, -1
FLOAT32 = ("proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out")


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.minimaxh3.transformer import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=48,
        num_layers=len(BLOCKS),
        num_refiner_layers=1,
        ffn_dim=64,
        audio_in_channels=8,
        text_dim=20,
        freq_dim=32,
        time_embed_hidden_dim=24,
        time_embed_dim=12,
        rope_freq_dim=4,
    )


def prepare_model(model: Any) -> None:
    for name in FLOAT32:  # as from_pretrained leaves them (`_keep_in_fp32_modules`)
        model.model.get_submodule(name).float()


def raw_batch(frames: int, first_frame: bool, video: tuple[bool, ...]) -> dict[str, Any]:
    text = torch.randn(BATCH, TEXT, 20)
    tags = torch.full((BATCH, TEXT), TEXT_TAG)
    for b, words in enumerate(WORDS):
        text[b, words:] = 0
        tags[b, words:] = PADDING_TAG
    batch = {
        "latent_batch": torch.randn(BATCH, 24, frames, 6, 10),
        "prompt_embeds": text,
        "text_encoder_output": {"prompt_embeds": text, "text_token_tags": tags},
        "encoder_attention_mask": None,
        "video_latent_mask": torch.tensor(video).float(),
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }
    if first_frame:
        tags[:, :PICTURE] = VIDEO_TAG
        batch["conditioning_latents"] = torch.randn(BATCH, 24, 1, 6, 10)
    return batch


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.minimaxh3.transformer import MiniMaxH3TransformerBlock

    return taped_forwards(model, (MiniMaxH3TransformerBlock,))


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, frames: int, first_frame: bool, sound: bool
) -> dict[str, StreamReference]:
    # [text | the given frame | both channels of the sound | video]
    sound_tokens = 2 * prepared["audio_noisy_latents"].shape[-1] if sound else 0
    assert (sound_tokens > 0) == sound
    start = TEXT + FRAME * first_frame + sound_tokens
    image = joint(tape, BLOCKS, "hidden_states", [(start, start + frames * FRAME)] * BATCH)
    assert all(len(crossing.output[0]) == start + frames * FRAME for crossing in tape.crossings)
    text = joint(tape, BLOCKS, "hidden_states", [(PICTURE * first_frame, words) for words in WORDS])
    return {"image": image, "text": text}


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    sigma_B = 1 - prepared["timesteps"]
    torch.testing.assert_close(noise_share(prepared), sigma_B, rtol=0, atol=1e-3)
    return sigma_B


CASES = [
    Case(
        family="minimaxh3",
        flavour="fl2va",
        label=label,
        denoiser=denoiser,
        raw_batch=lambda dtype, shape=(frames, first_frame, video): raw_batch(*shape),
        tape=tape,
        reference=lambda tape, prepared, model, shape=(frames, first_frame, mode == "av"): reference(
            tape, prepared, model, *shape
        ),
        blocks={"image": len(BLOCKS), "text": len(BLOCKS)},
        options={"minimax_h3_target_mode": mode},
        sigma=sigma,
        prepare_model=prepare_model,
        absent={"image": tuple(b for b in range(BATCH) if not video[b])},
    )
    for label, frames, first_frame, mode, video in (
        ("image", 1, False, "auto", (True, True)),
        ("video with sound and a given frame", 2, True, "av", (True, True)),
        ("one sample of sound alone", 2, False, "av", (True, False)),
    )
]
