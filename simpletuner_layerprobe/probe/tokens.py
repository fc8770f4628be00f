"""Which tokens of a block's hidden states belong to a stream: the rules that the family table names.

A rule gets the running forward and the number of tokens S of the state, and returns the stream's Part of them. Here are
those whose tokens stand at the same places in all samples; token_masks.py has the others. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.calls import Call
from simpletuner_layerprobe.probe.parts import Part


class Forward:
    """One running forward of the denoiser.

    call: its arguments. batch: SimpleTuner's prepared batch. text_mask_BS: the mask of valid text tokens, or None.
    lengths: tokens of each stream in the last block that had the stream to itself. block: the arguments of the block
    that runs now; a rule that looks at them is asked anew for each. notes: what a rule wants to keep until the forward
    ends.
    """

    def __init__(self, call: Call, batch: Mapping[str, Any], text_mask_BS: torch.Tensor | None) -> None:
        self.call = call
        self.batch = batch
        self.text_mask_BS = text_mask_BS
        self.lengths: dict[str, int] = {}
        self.notes: dict[str, Any] = {}
        self._block = call
        self._looked_at_block = False
        self._parts: dict[tuple[Any, ...], Part] = {}

    @property
    def block(self) -> Call:
        self._looked_at_block = True
        return self._block

    @block.setter
    def block(self, call: Call) -> None:
        self._block = call

    def part(self, rule: Rule, tokens: int) -> Part:
        """What the rule says of a state of so many tokens; the same Part for blocks that are alike."""
        key = rule, tokens, *self.lengths.items()
        part = self._parts.get(key)
        if part is None:
            self._looked_at_block = False
            part = rule(self, tokens)
            if not self._looked_at_block:
                self._parts[key] = part
        return part

    @property
    def device(self) -> torch.device:
        """The device of the batch."""
        return self.batch["latents"].device


Rule = Callable[[Forward, int], Part]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule under its name, as the family table calls it."""
    RULES[function.__name__] = function
    return function


# How a state's dimensions become (B, S, D).
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BSD": lambda state: state,
    "SBD": lambda state: state.transpose(0, 1),
    "SD": lambda state: state.unsqueeze(0),
    "BDHW": lambda state: state.flatten(2).transpose(1, 2),
}

# A state, or a text, of one stream alone.


@rule
def all_tokens(forward: Forward, tokens: int) -> Part:
    """The whole state."""
    return Part(slice(0, tokens))


@rule
def text_alone(forward: Forward, tokens: int) -> Part:
    """A text stream of its own; the batch's mask says which tokens are valid, if there is one."""
    return text_part(forward, slice(0, tokens))


@rule
def valid_text(forward: Forward, tokens: int) -> Part:
    """A text stream of its own without its padding."""
    return valid_part(forward, tokens, slice(0, tokens))


def text_part(forward: Forward, part: slice) -> Part:
    """These tokens, with the batch's text mask for the valid ones. Raises ModelError if the mask does not fit."""
    mask_BS = forward.text_mask_BS
    if mask_BS is not None and mask_BS.shape[1] != part.stop - part.start:
        raise ModelError(
            f"the batch's text mask is for {mask_BS.shape[1]} tokens and the text stream has {part.stop - part.start}; "
            f"the layer probe does not know which of them are valid"
        )
    return Part(part, mask_BS)


def valid_part(forward: Forward, tokens: int, part: slice) -> Part:
    """The text in these tokens without its padding.

    How much padding a sample has depends on the others of its batch, and where it is zero before the first block it has
    no direction.
    """
    valid_BS = text_part(forward, part).valid_BS
    return Part(part) if valid_BS is None else Part(pad(valid_BS, (part.start, tokens - part.stop)))


# [text | image], where double-stream blocks came before.


@rule
def text_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image ...], as long as the text stream was in the last double-stream block."""
    return text_part(forward, slice(0, forward.lengths["text"]))


@rule
def image_after_text(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image ...], as long as the image stream was in its last block of its own."""
    return Part(slice(forward.lengths["text"], forward.lengths["text"] + forward.lengths["image"]))


@rule
def caption_last(forward: Forward, tokens: int) -> Part:
    """The caption in a text stream [registers | caption] of its own: as many tokens as the denoiser was given."""
    return text_part(forward, slice(tokens - forward.call["encoder_hidden_states"].shape[1], tokens))


@rule
def caption_before_image(forward: Forward, tokens: int) -> Part:
    """The caption in [registers | caption | image]."""
    return caption_last(forward, forward.lengths["text"])


# Image tokens that the model packs before the denoiser's call, with references after them.


def packed_tokens(forward: Forward) -> int:
    """How many tokens one sample's noised latents make."""
    latents = forward.batch["latents"]
    return latents.numel() // latents.shape[0] // forward.call["hidden_states"].shape[-1]


@rule
def packed_first(forward: Forward, tokens: int) -> Part:
    """The noised latents in [image | reference images]."""
    return Part(slice(0, packed_tokens(forward)))


@rule
def packed_after_prompt(forward: Forward, tokens: int) -> Part:
    """The noised latents in [text | image | reference image]."""
    start = prompt_tokens(forward)
    return Part(slice(start, start + packed_tokens(forward)))


# Texts as long as the batch's prompt embeddings.


def prompt_tokens(forward: Forward) -> int:
    """How many tokens the batch's prompt embeddings have, padding included."""
    return forward.batch["encoder_hidden_states"].shape[1]


@rule
def prompt_first(forward: Forward, tokens: int) -> Part:
    """The text part of [text | image ...] without its padding."""
    return valid_part(forward, tokens, slice(0, prompt_tokens(forward)))


@rule
def after_prompt(forward: Forward, tokens: int) -> Part:
    """The image part of [text | image]."""
    return Part(slice(prompt_tokens(forward), tokens))


def grid_tokens(forward: Forward) -> int:
    """How many tokens one sample's latents make where each of their places is one."""
    return math.prod(forward.call["hidden_states"].shape[-2:])


@rule
def grid_first(forward: Forward, tokens: int) -> Part:
    """The image part of [image | text | reference images], where each place of the latents is a token."""
    return Part(slice(0, grid_tokens(forward)))


@rule
def prompt_after_grid(forward: Forward, tokens: int) -> Part:
    """The text part of [image | text | reference images] without its padding; each place of the latents is a token."""
    start = grid_tokens(forward)
    return valid_part(forward, tokens, slice(start, start + prompt_tokens(forward)))


# Texts of other lengths, and what is not noised.


@rule
def before_cut_text(forward: Forward, tokens: int) -> Part:
    """The image part of [image | text], where the model cuts the text to the longest of the batch."""
    return Part(slice(0, tokens - forward.call["text_bth"].shape[1]))


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
def after_time_token(forward: Forward, tokens: int) -> Part:
    """All but the first token, which carries the time."""
    return Part(slice(1, tokens))


@rule
def after_condition_frames(forward: Forward, tokens: int) -> Part:
    """The video without its first `num_cond_latents` frames, which are given clean."""
    frames = forward.block["latent_shape"][0]
    given = int(forward.call["num_cond_latents"] or 0)
    return Part(slice(given * (tokens // frames), tokens))


@rule
def before_reference_frames(forward: Forward, tokens: int) -> Part:
    """The video part of [video | reference image], in proportion to the sizes of their latents (B, C, T, H, W)."""
    video = math.prod(forward.call["hidden_states"].shape[2:])
    reference = math.prod(forward.call["image_latents"].shape[2:])
    return Part(slice(0, tokens * video // (video + reference)))
