"""Raw batches as SimpleTuner's collate function returns them, one builder a kind.

A builder returns a function of the dtype: the batch is drawn when the case runs, after its seed is set. Every batch has
two samples (B) with captions of different lengths, and images of 3 x 5 tokens: odd numbers, not alike in any direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

BATCH = 2
ROWS, COLUMNS = 3, 5
IMAGE = ROWS * COLUMNS  # tokens of an image, or of one frame
TEXT = 9  # tokens of a text, padding included
WORDS = (9, 4)  # tokens of each sample's caption

Batch = Callable[[torch.dtype], dict[str, Any]]


def drawn(*shape: int) -> Batch:
    """A tensor (B, *shape) for a further key of a batch."""
    return lambda dtype: torch.randn(BATCH, *shape)


def mask_of(words: Sequence[int], length: int) -> torch.Tensor:
    """(B, length) bool, True for the words of each caption."""
    return torch.arange(length) < torch.tensor(words)[:, None]


def image(channels: int, patch: int = 2, *, rows: int = ROWS, columns: int = COLUMNS, **rest: Any) -> Batch:
    """Latents (B, C, H, W) of rows x columns tokens; `rest` as for `batch`."""
    return batch((channels, rows * patch, columns * patch), **rest)


def video(channels: int, patch: int = 2, *, frames: int = 3, rows: int = ROWS, **rest: Any) -> Batch:
    """Latents (B, C, F, H, W) of rows x 5 tokens in each frame; `rest` as for `batch`."""
    return batch((channels, frames, rows * patch, COLUMNS * patch), **rest)


def unet(channels: int, text: int, **rest: Any) -> Batch:
    """Latents (or pixels) of 12 x 20 places, which a U-Net halves to 6 x 10 and 3 x 5; a text without a mask."""
    return image(channels, patch=4, text=text, mask=None, **rest)


def batch(latents: tuple[int, ...], **rest: Any) -> Batch:
    """latents: their shape without B. rest: as for `make_batch`."""
    return partial(make_batch, latents=latents, **rest)


def make_batch(
    dtype: torch.dtype,
    *,
    latents: tuple[int, ...],
    text: int | tuple[int, ...] = 20,
    length: int = TEXT,
    words: Sequence[int] = WORDS,
    mask: torch.dtype | None = torch.float32,
    pooled: int = 0,
    **further: Any,
) -> dict[str, Any]:
    """text: the width of the prompt embeddings (B, length, text), 0 for none. pooled: that of the pooled ones.

    words, mask: how many tokens of each sample are no padding, and the dtype of the mask that says so (None: no mask).
    further: other keys of the batch; what can be called is called with the dtype, also in lists and dicts.
    """
    raw: dict[str, Any] = {"latent_batch": torch.randn(BATCH, *latents), "prompt_embeds": None}
    if text:
        raw["prompt_embeds"] = torch.randn(BATCH, length, *((text,) if isinstance(text, int) else text))
    if pooled:
        raw["add_text_embeds"] = torch.randn(BATCH, pooled)
    raw["encoder_attention_mask"] = None if mask is None else mask_of(words, length).to(mask)
    return raw | {"data_backend_id": "photographs", "prompts": ["a", "b"]} | _made(further, dtype)


def _made(value: Any, dtype: torch.dtype) -> Any:
    if callable(value):
        return value(dtype)
    if isinstance(value, dict):
        return {key: _made(part, dtype) for key, part in value.items()}
    return [_made(part, dtype) for part in value] if isinstance(value, list) else value


# Kinds of a single family.


def song(dtype: torch.dtype) -> dict[str, Any]:
    """ACE-Step: latents (B, C, bins, frames) padded to the longer song, a caption and lyrics."""
    raw = make_batch(
        dtype,
        latents=(8, 16, max(SONGS)),
        latent_metadata=[{"latent_lengths": frames} for frames in SONGS],
        lyric_token_ids=torch.randint(1, 32, (BATCH, 6)),
        lyric_mask=mask_of((6, 3), 6).long(),
    )
    for latents, frames in zip(raw["latent_batch"], SONGS, strict=True):
        latents[..., frames:] = 0
    return raw


SONGS = (11, 7)  # frames


def two_encoders(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """HiDream: 7 T5 tokens, 5 Llama tokens in 4 layers, a pooled text; padded by the encoders, without a mask."""
    shapes = {
        "t5_prompt_embeds": (7, 20),
        "llama_prompt_embeds": (4, 1, 5, 22),
        "pooled_prompt_embeds": (14,),
    }
    return {name: torch.randn(BATCH, *shape, dtype=dtype) for name, shape in shapes.items()}


def tagged_text(dtype: torch.dtype, *, pictures: int = 0, **rest: Any) -> dict[str, Any]:
    """MiniMax-H3: every text token has a tag: 1 text, -1 padding, 0 for the first `pictures` that stand for a frame."""
    raw = make_batch(dtype, mask=None, **rest)
    valid_BS = mask_of(WORDS, TEXT)
    tags_BS = torch.where(valid_BS, 1, -1)
    tags_BS[:, :pictures] = 0
    raw["prompt_embeds"] *= valid_BS.unsqueeze(-1)
    return raw | {"text_encoder_output": {"prompt_embeds": raw["prompt_embeds"], "text_token_tags": tags_BS}}
