"""Which tokens of a block's hidden states belong to a stream: the rules that the family table names.

A rule gets the running forward and the number of tokens S of the state, and returns the stream's Part of them.
Nothing here waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.record.distance import last_token, mean_token


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


# <G1>
# <G2>
# <G3>
# <G4>
# <G5>


# How a state's dimensions become (B, S, D).
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BSD": lambda state: state,
    "SBD": lambda state: state.transpose(0, 1),
    "SD": lambda state: state.unsqueeze(0),
    "BDHW": lambda state: state.flatten(2).transpose(1, 2),
}


def readings(angles_BS: torch.Tensor, part: Part) -> dict[str, torch.Tensor]:
    """The readings of one stream from the angles of all tokens of a state: "last" and "mean" -> (B,) float32."""
    tokens = part.tokens
    if isinstance(tokens, slice):
        angles_BS = angles_BS[:, tokens]
        return {"last": last_token(angles_BS), "mean": mean_token(angles_BS, part.valid_BS)}
    angles_BS = angles_BS.expand(tokens.shape)
    position_S = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    last_B1 = (tokens * position_S).argmax(dim=1, keepdim=True)
    return {"last": angles_BS.gather(1, last_B1).squeeze(1), "mean": mean_token(angles_BS, tokens)}
