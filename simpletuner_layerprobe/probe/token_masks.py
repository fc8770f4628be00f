"""The token rules (see tokens.py) whose tokens stand at other places in each sample, so that a mask says which.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.parts import Part, between, prefix
from simpletuner_layerprobe.probe.tokens import RULES, Forward, rule

__all__ = ["RULES"]  # of both files

# Texts of each sample's own length.


@rule
def own_text_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image | padding], where each sample has the text length that its mask gives."""
    return Part(prefix(forward.call["encoder_attention_mask"].sum(dim=1), tokens))


@rule
def after_own_text(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image | padding]; if there is padding, the block's attention mask is False for it."""
    image_BS = ~prefix(forward.call["encoder_attention_mask"].sum(dim=1), tokens)
    valid_BS = forward.block["attention_mask"]
    return Part(image_BS if valid_BS is None else image_BS & valid_BS)


@rule
def own_prompt_first(forward: Forward, tokens: int) -> Part:
    """The text in [text | ...] of each sample, as long as its text mask says."""
    return Part(prefix(forward.call["instruction_attention_mask"].sum(dim=1), tokens))


@rule
def noised_last(forward: Forward, tokens: int) -> Part:
    """The noised latents in [references | noised latents | padding] of each sample."""
    ends_B = forward.block["img_attention_mask"].sum(dim=1)
    return Part(between(ends_B - noised_lengths(forward, ends_B), ends_B, tokens))


@rule
def noised_last_after_prompt(forward: Forward, tokens: int) -> Part:
    """The noised latents in [text | references | noised latents | padding] of each sample."""
    ends_B = forward.block["attention_mask"].sum(dim=1)
    image_B = ends_B - forward.call["instruction_attention_mask"].sum(dim=1)
    return Part(between(ends_B - noised_lengths(forward, image_B), ends_B, tokens))


def noised_lengths(forward: Forward, lengths_B: torch.Tensor) -> torch.Tensor:
    """(B,) how many of a sample's image tokens, references included, are of its noised latents: its share of area."""
    area = math.prod(forward.batch["noisy_latents"].shape[-2:])
    references = forward.call["ref_image_hidden_states"] or [None] * len(lengths_B)
    others = [sum(math.prod(image.shape[-2:]) for image in images or ()) for images in references]
    return torch.stack(
        [length * area // (area + other) for length, other in zip(lengths_B.unbind(), others, strict=True)]
    )


@rule
def cut_text_last(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text], where the model cuts the text to the longest of the batch.

    Its padding is zero before the first block and has no direction: it does not belong to the part.
    """
    length = forward.call["text_bth"].shape[1]
    return Part(pad(prefix(forward.call["text_lens"], length), (tokens - length, 0)))


@rule
def attended_after_embeds(forward: Forward, tokens: int) -> Part:
    """The text in [image embeddings | text | padding]: what the block attends to after them, if they are not all 0."""
    if "start of text" not in forward.notes:
        embeds_BSD = forward.call["image_embeds"]
        forward.notes["start of text"] = (embeds_BSD != 0).any() * embeds_BSD.shape[1]
    start = forward.notes["start of text"]
    return Part(forward.block["attention_mask"] & (torch.arange(tokens, device=start.device) >= start))


# States with some tokens that are of one block alone.


@rule
def unpadded_first(forward: Forward, tokens: int) -> Part:
    """The image part of [image | ...], without the padding that the block's `image_tokens_masks` has as 0, if any."""
    length = forward.lengths["image"]
    mask_BS = forward.block["image_tokens_masks"]
    if mask_BS is None:
        return Part(slice(0, length))
    return Part((mask_BS > 0.5) & (torch.arange(tokens, device=mask_BS.device) < length))


# All samples one after the other in one row.


@rule
def packed_row_text(forward: Forward, tokens: int) -> Part:
    """The texts of all samples one after the other in one row, without padding."""
    ends = forward.call["txt_cu_seqlens"]
    return Part(between(ends[:-1], ends[1:], tokens))


@rule
def packed_row_noised(forward: Forward, tokens: int) -> Part:
    """[noised latents | references] of all samples one after the other in one row."""
    starts_B = forward.call["img_cu_seqlens"][:-1]
    count = forward.batch["noisy_latents"][0].numel() // forward.call["img"].shape[-1]
    return Part(between(starts_B, starts_B + count, tokens))


@rule
def vision_predicted(forward: Forward, tokens: int) -> Part:
    """The vision tokens of one sample that are predicted, not given, among those that follow its text."""
    return rows_part(forward.call["vision_mse_loss_indexes"] - forward.call["und_len"], 1, tokens)


@rule
def packed_video(forward: Forward, tokens: int) -> Part:
    """The noised video tokens of a packed sequence: their rows are in `video_indices`, after those of given frames.

    None in a sample that is audio alone, for which SimpleTuner makes an empty video.
    """
    rows = forward.call["video_indices"][forward.call["num_condition_video_rows"] or 0 :]
    part = rows_part(rows, len(forward.call["hidden_states"]), tokens)
    return in_samples(forward, part, tokens, "video_latent_mask")


def rows_part(rows: torch.Tensor, samples: int, tokens: int) -> Part:
    """The tokens at these positions, the same in all samples."""
    mask_BS = torch.zeros(samples, tokens, dtype=torch.bool, device=rows.device)
    return Part(mask_BS.index_fill(1, rows, True))


@rule
def packed_text(forward: Forward, tokens: int) -> Part:
    """The caption's tokens of a packed sequence: tagged 1 in `token_tags`; 0 is video, also in a prompt, 2 is audio."""
    text_BS = (forward.call["token_tags"] == 1).expand(len(forward.call["hidden_states"]), tokens)
    valid_BS = forward.call["packed_valid_mask"]
    return Part(text_BS if valid_BS is None else text_BS & valid_BS)


# Latents of each sample's own size, padded to whole multiples.


def spans(forward: Forward, tokens: int, ranges: Sequence[Sequence[tuple[int, int]]]) -> Part:
    """The tokens in the given ranges (start, stop) of each sample."""
    position_S = torch.arange(tokens, device=forward.device)
    rows = []
    for sample in ranges:
        row_S = torch.zeros_like(position_S, dtype=torch.bool)
        for start, stop in sample:
            row_S |= (position_S >= start) & (position_S < stop)
        rows.append(row_S)
    return Part(torch.stack(rows))


def with_padding(count: int) -> int:
    """`count` tokens padded to a whole multiple of 32."""
    return count + -count % 32


def sizes_of_grids(forward: Forward, grids: list[Any]) -> list[int]:
    """Tokens of latents (C, F, H, W), by the patch sizes of the denoiser's call."""
    patch, frame_patch = forward.call["patch_size"] or 2, forward.call["f_patch_size"] or 1
    shapes = [(1, 0, 0, 0) if grid is None else grid.shape for grid in grids]
    return [(frames // frame_patch) * (height // patch) * (width // patch) for _, frames, height, width in shapes]


@rule
def own_grid_first(forward: Forward, tokens: int) -> Part:
    """The noised latents in [image | text] of each sample, both padded to whole multiples.

    A reference image is to the left of the noised latents in the same grid (IC-LoRA): its columns are left out.
    """
    grids, patch = forward.call["x"], forward.call["patch_size"] or 2
    part = spans(forward, tokens, [[(0, count)] for count in sizes_of_grids(forward, grids)])
    columns, noised_columns = grids[0].shape[-1] // patch, forward.batch["latents"].shape[-1] // patch
    if noised_columns == columns:
        return part
    position_S = torch.arange(tokens, device=forward.device)
    return Part(part.tokens & (position_S % columns >= columns - noised_columns))


@rule
def text_after_own_grid(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text] of each sample, both padded to whole multiples."""
    starts = [with_padding(count) for count in sizes_of_grids(forward, forward.call["x"])]
    texts = forward.call["cap_feats"]
    return spans(forward, tokens, [[(start, start + len(text))] for start, text in zip(starts, texts, strict=True)])


@rule
def own_texts_first(forward: Forward, tokens: int) -> Part:
    """The texts in [texts | reference images | image | vision features] of each sample, all padded to multiples."""
    ranges = []
    for texts in forward.call["cap_feats"]:
        start, sample = 0, []
        for text in texts:
            sample.append((start, start + len(text)))
            start += with_padding(len(text))
        ranges.append(sample)
    return spans(forward, tokens, ranges)


@rule
def grid_after_own_references(forward: Forward, tokens: int) -> Part:
    """The noised latents in [texts | reference images | image | vision features] of each sample, all padded."""
    ranges = []
    sizes = sizes_of_grids(forward, forward.call["x"])
    for size, texts, references in zip(sizes, forward.call["cap_feats"], forward.call["cond_latents"], strict=True):
        start = sum(with_padding(len(text)) for text in texts)
        # A missing reference is a whole multiple of padding.
        start += sum(with_padding(count or 1) for count in sizes_of_grids(forward, references))
        ranges.append([(start, start + size)])
    return spans(forward, tokens, ranges)


# Streams of which some tokens or samples are given, not noised.


@rule
def attended(forward: Forward, tokens: int) -> Part:
    """The tokens that the denoiser's `attention_mask` keeps: the others pad the shorter samples of a batch."""
    mask_BS = forward.call["attention_mask"]
    if mask_BS.shape[1] != tokens:
        raise ModelError(
            f"the denoiser's attention_mask is for {mask_BS.shape[1]} tokens and the hidden states have {tokens}; "
            f"the layer probe does not know which of them are padding"
        )
    return Part(mask_BS > 0.5)


@rule
def noised_tokens(forward: Forward, tokens: int) -> Part:
    """The tokens whose timestep is not 0, where the denoiser gets one for each token (given ones have 0); else all.

    None in a sample that is given as a whole.
    """
    timestep = forward.call["timestep"]
    if timestep.ndim < 2:
        return Part(slice(0, tokens))
    return Part((timestep.flatten(1) > 0).expand(-1, tokens))


@rule
def noised_tokens_of_video(forward: Forward, tokens: int) -> Part:
    """The noised tokens; none in a sample that is audio alone, for which SimpleTuner makes an empty video."""
    return in_samples(forward, noised_tokens(forward, tokens), tokens, "video_latent_mask")


@rule
def tokens_of_audio(forward: Forward, tokens: int) -> Part:
    """All tokens; none in a sample without audio, for which SimpleTuner makes an empty one."""
    return in_samples(forward, Part(slice(0, tokens)), tokens, "audio_latent_mask")


def in_samples(forward: Forward, part: Part, tokens: int, mask: str) -> Part:
    """This part in the samples whose `mask` in the batch is above 0, and no token in the others; all without one."""
    present_B = forward.batch.get(mask)
    if present_B is None:
        return part
    mask_BS = part.mask(len(present_B), tokens, forward.device)
    return Part(mask_BS & (present_B.to(mask_BS.device, non_blocking=True) > 0).unsqueeze(1))
