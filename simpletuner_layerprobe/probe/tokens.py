"""Which tokens of a block's hidden states belong to a stream: the rules that the family table names.

A rule gets the running forward and the number of tokens S of the state, and returns the stream's Part of them.
Nothing here waits for the device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.probe.angles import last_token, mean_token


@dataclass(frozen=True)
class Part:
    """The tokens of a state that belong to a stream.

    tokens: a slice (the same for all samples) or a bool mask (B, S). Where samples are packed one after the other into
    one row, the mask has a row for each sample and the state one row in all. valid_BS: for a slice, which of its tokens
    are not padding, (B, length) bool; None if all are.
    """

    tokens: slice | torch.Tensor
    valid_BS: torch.Tensor | None = None


class Call:
    """The arguments of a running call, by name, however they were passed."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._positions = positions(function)
        self._args = args
        self._kwargs = kwargs

    def __getitem__(self, name: str) -> Any:
        """The argument called `name`; None if it was not passed."""
        if name in self._kwargs:
            return self._kwargs[name]
        position = self._positions.get(name, len(self._args))
        return self._args[position] if position < len(self._args) else None


_POSITIONS: dict[Any, dict[str, int]] = {}


def positions(function: Callable[..., Any]) -> dict[str, int]:
    """Position of each parameter among the positional arguments after the first (self, or the block)."""
    found = _POSITIONS.get(function)
    if found is None:
        names = list(inspect.signature(function).parameters)[1:]
        found = _POSITIONS[function] = {name: position for position, name in enumerate(names)}
    return found


class Forward:
    """One running forward of the denoiser.

    call: its arguments. batch: SimpleTuner's prepared batch. text_mask_BS: the batch's mask of valid text tokens, or
    None. lengths: tokens of each stream in the last block that had the stream to itself. block: the arguments of the
    block that runs now. notes: what a rule wants to keep until the forward ends.
    """

    def __init__(self, call: Call, batch: Mapping[str, Any], text_mask_BS: torch.Tensor | None) -> None:
        self.call = call
        self.batch = batch
        self.text_mask_BS = text_mask_BS
        self.lengths: dict[str, int] = {}
        self.block: Call | None = None
        self.notes: dict[str, Any] = {}


Rule = Callable[[Forward, int], Part]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule under its name, as the family table calls it."""
    RULES[function.__name__] = function
    return function


def prefix_mask(lengths_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens) bool, True for the first `lengths_B[b]` tokens of each sample."""
    return torch.arange(tokens, device=lengths_B.device) < lengths_B.unsqueeze(1)


@rule
def all_tokens(forward: Forward, tokens: int) -> Part:
    """The whole state."""
    return Part(slice(0, tokens))


@rule
def text_alone(forward: Forward, tokens: int) -> Part:
    """A text stream of its own; the batch's mask says which tokens are valid, if there is one."""
    return text_part(forward, slice(0, tokens))


@rule
def text_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image], as long as the text stream was in the last double-stream block."""
    return text_part(forward, slice(0, forward.lengths["text"]))


@rule
def after_text(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image]."""
    return Part(slice(forward.lengths["text"], tokens))


def text_part(forward: Forward, part: slice) -> Part:
    """These tokens, with the batch's text mask for the valid ones. Raises ProbeError if the mask does not fit."""
    mask_BS = forward.text_mask_BS
    if mask_BS is not None and mask_BS.shape[1] != part.stop - part.start:
        raise ProbeError(
            f"the batch's text mask is for {mask_BS.shape[1]} tokens and the text stream has {part.stop - part.start}; "
            f"the layer probe does not know which of them are valid"
        )
    return Part(part, mask_BS)


@rule
def image_after_text(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image | references], as long as the image stream was in its last block of its own."""
    return Part(slice(forward.lengths["text"], forward.lengths["text"] + forward.lengths["image"]))


@rule
def caption_last(forward: Forward, tokens: int) -> Part:
    """The caption in a text stream [registers | caption] of its own: as many tokens as the denoiser was given."""
    return text_part(forward, slice(tokens - forward.call["encoder_hidden_states"].shape[1], tokens))


@rule
def caption_before_image(forward: Forward, tokens: int) -> Part:
    """The caption in [registers | caption | image]."""
    return caption_last(forward, forward.lengths["text"])


@rule
def unpadded_first(forward: Forward, tokens: int) -> Part:
    """The image part of [image | ...], without the padding that the block's `image_tokens_masks` has as 0, if any."""
    assert forward.block is not None
    length = forward.lengths["image"]
    mask_BS = forward.block["image_tokens_masks"]
    if mask_BS is None:
        return Part(slice(0, length))
    return Part((mask_BS > 0.5) & (torch.arange(tokens, device=mask_BS.device) < length))


@rule
def kept_text(forward: Forward, tokens: int) -> Part:
    """The text that is carried on in [text | text of this block alone]."""
    return Part(slice(0, tokens - passing_tokens(forward)))


@rule
def kept_text_after_image(forward: Forward, tokens: int) -> Part:
    """The text that is carried on in [image | text | text of this block alone]."""
    return Part(slice(forward.lengths["image"], tokens - passing_tokens(forward)))


def passing_tokens(forward: Forward) -> int:
    """How many text tokens each block gets for itself alone: one layer of the Llama states."""
    return forward.call["llama_hidden_states"].shape[-2]


@rule
def attended_after_embeds(forward: Forward, tokens: int) -> Part:
    """The text in [image embeddings | text | padding]: what the block attends to after them, if they are not all 0."""
    assert forward.block is not None
    if "start of text" not in forward.notes:
        embeds_BSD = forward.call["image_embeds"]
        forward.notes["start of text"] = (embeds_BSD != 0).any() * embeds_BSD.shape[1]
    start = forward.notes["start of text"]
    return Part(forward.block["attention_mask"] & (torch.arange(tokens, device=start.device) >= start))


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
def own_prompt_first(forward: Forward, tokens: int) -> Part:
    """The text in [text | ...] of each sample, as long as its text mask says."""
    return Part(prefix_mask(own_prompt_lengths(forward), tokens))


@rule
def noised_last(forward: Forward, tokens: int) -> Part:
    """The noised latents in [references | noised latents | padding] of each sample."""
    assert forward.block is not None
    ends_B = forward.block["img_attention_mask"].sum(dim=1)
    return Part(between(ends_B - noised_lengths(forward, ends_B), ends_B, tokens))


@rule
def noised_last_after_prompt(forward: Forward, tokens: int) -> Part:
    """The noised latents in [text | references | noised latents | padding] of each sample."""
    assert forward.block is not None
    ends_B = forward.block["attention_mask"].sum(dim=1)
    return Part(between(ends_B - noised_lengths(forward, ends_B - own_prompt_lengths(forward)), ends_B, tokens))


def between(starts_B: torch.Tensor, ends_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens) bool, True from start to end of each sample."""
    position_S = torch.arange(tokens, device=starts_B.device)
    return (position_S >= starts_B.unsqueeze(1)) & (position_S < ends_B.unsqueeze(1))


def own_prompt_lengths(forward: Forward) -> torch.Tensor:
    """(B,) valid text tokens of each sample, by the mask of the denoiser's call."""
    return forward.call["instruction_attention_mask"].sum(dim=1)


def noised_lengths(forward: Forward, lengths_B: torch.Tensor) -> torch.Tensor:
    """(B,) how many of a sample's image tokens, references included, are of its noised latents: its share of area."""
    area = math.prod(forward.batch["noisy_latents"].shape[-2:])
    references = forward.call["ref_image_hidden_states"] or [None] * len(lengths_B)
    others = [sum(math.prod(one.shape[-2:]) for one in images or ()) for images in references]
    return torch.stack(
        [length * area // (area + other) for length, other in zip(lengths_B.unbind(), others, strict=True)]
    )


def packed_tokens(forward: Forward) -> int:
    """How many tokens one sample's noised latents make, where the model packs them before the denoiser's call."""
    latents = forward.batch["latents"]
    return latents.numel() // latents.shape[0] // forward.call["hidden_states"].shape[-1]


def prompt_tokens(forward: Forward) -> int:
    """How many tokens the batch's prompt embeddings have, padding included."""
    return forward.batch["encoder_hidden_states"].shape[1]


def unpadded(forward: Forward, tokens: int, part: slice) -> Part:
    """The text in these tokens without its padding.

    How much padding a sample has depends on the others of its batch, and where it is zero before the first block it has
    no direction.
    """
    valid_BS = text_part(forward, part).valid_BS
    if valid_BS is None:
        return Part(part)
    return Part(torch.nn.functional.pad(valid_BS, (part.start, tokens - part.stop)))


def spans(forward: Forward, tokens: int, ranges: tuple[tuple[tuple[int, int], ...], ...]) -> torch.Tensor:
    """(B, tokens) bool, True in the given ranges (start, stop) of each sample; made once a forward."""
    key = f"spans {tokens} {ranges}"
    if key not in forward.notes:
        position_S = torch.arange(tokens, device=forward.batch["latents"].device)
        rows = []
        for sample in ranges:
            row_S = torch.zeros_like(position_S, dtype=torch.bool)
            for start, stop in sample:
                row_S |= (position_S >= start) & (position_S < stop)
            rows.append(row_S)
        forward.notes[key] = torch.stack(rows)
    return forward.notes[key]


def with_padding(count: int, multiple: int = 32) -> int:
    """`count` tokens padded to a whole multiple."""
    return count + -count % multiple


@rule
def prompt_alone(forward: Forward, tokens: int) -> Part:
    """A text stream of its own without its padding."""
    return unpadded(forward, tokens, slice(0, tokens))


@rule
def packed_first(forward: Forward, tokens: int) -> Part:
    """The noised latents in [image | reference images], packed by the model."""
    return Part(slice(0, packed_tokens(forward)))


@rule
def packed_after_prompt(forward: Forward, tokens: int) -> Part:
    """The noised latents in [text | image | reference image], packed by the model."""
    start = prompt_tokens(forward)
    return Part(slice(start, start + packed_tokens(forward)))


@rule
def after_prompt(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image], where the text is as long as the batch's prompt embeddings."""
    return Part(slice(prompt_tokens(forward), tokens))


@rule
def prompt_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image ...] without its padding; with it, it is as long as the prompt embeddings."""
    return unpadded(forward, tokens, slice(0, prompt_tokens(forward)))


@rule
def grid_first(forward: Forward, tokens: int) -> Part:
    """The image part of [image | text | reference images], where each place of the latents is a token."""
    height, width = forward.call["hidden_states"].shape[-2:]
    return Part(slice(0, height * width))


@rule
def prompt_after_grid(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text | reference images] without its padding; each place of the latents is a token."""
    height, width = forward.call["hidden_states"].shape[-2:]
    return unpadded(forward, tokens, slice(height * width, height * width + prompt_tokens(forward)))


@rule
def before_cut_text(forward: Forward, tokens: int) -> Part:
    """The image part of [image | text], where the model cuts the text to the longest of the batch."""
    return Part(slice(0, tokens - forward.call["text_bth"].shape[1]))


@rule
def cut_text_last(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text], where the model cuts the text to the longest of the batch.

    Its padding is zero before the first block and has no direction: it does not belong to the part.
    """
    length = forward.call["text_bth"].shape[1]
    text_BT = prefix_mask(forward.call["text_lens"], length)
    return Part(torch.nn.functional.pad(text_BT, (tokens - length, 0)))


def own_text_mask(forward: Forward, tokens: int) -> torch.Tensor:
    """(B, tokens) bool, True for as many tokens as the mask in the denoiser's call gives each sample."""
    return prefix_mask(forward.call["encoder_attention_mask"].sum(dim=1), tokens)


@rule
def own_text_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image | padding], where each sample has the text length that its mask gives."""
    return Part(own_text_mask(forward, tokens))


@rule
def after_own_text(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image | padding]; if there is padding, the block's attention mask is False for it."""
    image_BS = ~own_text_mask(forward, tokens)
    assert forward.block is not None
    valid_BS = forward.block["attention_mask"]
    return Part(image_BS if valid_BS is None else image_BS & valid_BS)


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
    part_BS = spans(forward, tokens, tuple(((0, count),) for count in sizes_of_grids(forward, grids)))
    columns, noised_columns = grids[0].shape[-1] // patch, forward.batch["latents"].shape[-1] // patch
    if noised_columns == columns:
        return Part(part_BS)
    position_S = torch.arange(tokens, device=part_BS.device)
    return Part(part_BS & (position_S % columns >= columns - noised_columns))


@rule
def text_after_own_grid(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text] of each sample, both padded to whole multiples."""
    starts = [with_padding(count) for count in sizes_of_grids(forward, forward.call["x"])]
    texts = forward.call["cap_feats"]
    return Part(
        spans(forward, tokens, tuple(((start, start + len(text)),) for start, text in zip(starts, texts, strict=True)))
    )


@rule
def own_texts_first(forward: Forward, tokens: int) -> Part:
    """The texts in [texts | reference images | image | vision features] of each sample, all padded to multiples."""
    ranges = []
    for texts in forward.call["cap_feats"]:
        start, sample = 0, []
        for text in texts:
            sample.append((start, start + len(text)))
            start += with_padding(len(text))
        ranges.append(tuple(sample))
    return Part(spans(forward, tokens, tuple(ranges)))


@rule
def grid_after_own_references(forward: Forward, tokens: int) -> Part:
    """The noised latents in [texts | reference images | image | vision features] of each sample, all padded."""
    ranges = []
    sizes = sizes_of_grids(forward, forward.call["x"])
    for size, texts, references in zip(sizes, forward.call["cap_feats"], forward.call["cond_latents"], strict=True):
        start = sum(with_padding(len(text)) for text in texts)
        # A missing reference is a whole multiple of padding.
        start += sum(with_padding(count or 1) for count in sizes_of_grids(forward, references))
        ranges.append(((start, start + size),))
    return Part(spans(forward, tokens, tuple(ranges)))


@rule
def ids_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | time token | image], padded on the left; the last image token sees all valid ones."""
    length = forward.call["input_ids"].shape[1]
    return Part(slice(0, length), forward.call["attention_mask"][:, -1, :length] > 0)


@rule
def after_ids_and_time(forward: Forward, tokens: int) -> Part:
    """The image part of [text | time token | image]."""
    return Part(slice(forward.call["input_ids"].shape[1] + 1, tokens))


@rule
def valid_text(forward: Forward, tokens: int) -> Part:
    """A text stream of its own, without its padding: for families that set padding to zero, which has no direction."""
    part = text_part(forward, slice(0, tokens))
    return part if part.valid_BS is None else Part(part.valid_BS)


@rule
def attended(forward: Forward, tokens: int) -> Part:
    """The tokens that the denoiser's `attention_mask` keeps: the others pad the shorter samples of a batch."""
    mask_BS = forward.call["attention_mask"]
    if mask_BS.shape[1] != tokens:
        raise ProbeError(
            f"the denoiser's attention_mask is for {mask_BS.shape[1]} tokens and the hidden states have {tokens}; "
            f"the layer probe does not know which of them are padding"
        )
    return Part(mask_BS > 0.5)


@rule
def after_time_token(forward: Forward, tokens: int) -> Part:
    """All but the first token, which carries the time."""
    return Part(slice(1, tokens))


@rule
def vision_predicted(forward: Forward, tokens: int) -> Part:
    """The vision tokens of one sample that are predicted, not given, among those that follow its text."""
    rows = forward.call["vision_mse_loss_indexes"] - forward.call["und_len"]
    return Part(torch.zeros(1, tokens, dtype=torch.bool, device=rows.device).index_fill(1, rows, True))


@rule
def packed_video(forward: Forward, tokens: int) -> Part:
    """The noised video tokens of a packed sequence: their rows are in `video_indices`, after those of given frames.

    None in a sample that is audio alone, for which SimpleTuner makes an empty video.
    """
    rows = forward.call["video_indices"][forward.call["num_condition_video_rows"] or 0 :]
    mask_BS = torch.zeros(len(forward.call["hidden_states"]), tokens, dtype=torch.bool, device=rows.device)
    return in_samples(Part(mask_BS.index_fill(1, rows, True)), tokens, forward.batch.get("video_latent_mask"))


@rule
def packed_text(forward: Forward, tokens: int) -> Part:
    """The caption's tokens of a packed sequence: tagged 1 in `token_tags`; 0 is video, also in a prompt, 2 is audio."""
    text_BS = (forward.call["token_tags"] == 1).expand(len(forward.call["hidden_states"]), tokens)
    valid_BS = forward.call["packed_valid_mask"]
    return Part(text_BS if valid_BS is None else text_BS & valid_BS)


@rule
def noised_tokens(forward: Forward, tokens: int) -> Part:
    """The tokens whose timestep is not 0, where the denoiser gets one for each token (clean frames have 0); else all.

    A sample of which all tokens are at 0 keeps all.
    """
    timestep = forward.call["timestep"]
    if timestep.ndim < 2:
        return Part(slice(0, tokens))
    noised_BS = timestep.reshape(timestep.shape[0], -1) > 0
    return Part(noised_BS | ~noised_BS.any(dim=1, keepdim=True))


@rule
def after_condition_frames(forward: Forward, tokens: int) -> Part:
    """The video without its first `num_cond_latents` frames, which are given clean."""
    assert forward.block is not None
    frames = forward.block["latent_shape"][0]
    given = int(forward.call["num_cond_latents"] or 0)
    return Part(slice(given * (tokens // frames), tokens))


@rule
def before_reference_frames(forward: Forward, tokens: int) -> Part:
    """The video part of [video | reference image], in proportion to the sizes of their latents (B, C, T, H, W)."""
    video = math.prod(forward.call["hidden_states"].shape[2:])
    reference = math.prod(forward.call["image_latents"].shape[2:])
    return Part(slice(0, tokens * video // (video + reference)))


@rule
def noised_tokens_of_video(forward: Forward, tokens: int) -> Part:
    """The noised tokens; none in a sample that is audio alone, for which SimpleTuner makes an empty video."""
    return in_samples(noised_tokens(forward, tokens), tokens, forward.batch.get("video_latent_mask"))


@rule
def tokens_of_audio(forward: Forward, tokens: int) -> Part:
    """All tokens; none in a sample without audio, for which SimpleTuner makes an empty one."""
    return in_samples(Part(slice(0, tokens)), tokens, forward.batch.get("audio_latent_mask"))


def in_samples(part: Part, tokens: int, present_B: torch.Tensor | None) -> Part:
    """This part in the samples whose `present_B` is above 0, and no token in the others; None: in all samples."""
    if present_B is None:
        return part
    mask_BS = part.tokens
    if isinstance(mask_BS, slice):
        position_S = torch.arange(tokens, device=present_B.device)
        mask_BS = (position_S >= mask_BS.start) & (position_S < mask_BS.stop)
    return Part(mask_BS & (present_B.to(mask_BS.device, non_blocking=True) > 0).unsqueeze(1))


# How a state's dimensions become (B, S, D).
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BSD": lambda state: state,
    "SBD": lambda state: state.transpose(0, 1),
    "SD": lambda state: state.unsqueeze(0),
    "BDHW": lambda state: state.flatten(2).transpose(1, 2),
}


def readings(angles_BS: torch.Tensor, part: Part) -> dict[str, torch.Tensor]:
    """The readings of one stream from the angles of all tokens of a state: "last" and "mean" -> (B,) float32.

    NaN for a sample of which the mask has no token.
    """
    tokens = part.tokens
    if isinstance(tokens, slice):
        angles_BS = angles_BS[:, tokens]
        return {"last": last_token(angles_BS), "mean": mean_token(angles_BS, part.valid_BS)}
    angles_BS = angles_BS.expand(tokens.shape)
    position_S = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    last_B1 = (tokens * position_S).argmax(dim=1, keepdim=True)
    last_B = angles_BS.gather(1, last_B1).squeeze(1).masked_fill(~tokens.any(dim=1), math.nan)
    return {"last": last_B, "mean": mean_token(angles_BS, tokens)}
