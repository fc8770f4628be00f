"""A stream's own tokens among those of a hidden state, and the two readings of what they have. Pure.

Shapes: B batch, S tokens; values may have further dimensions before these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Part:
    """The tokens of a state that belong to a stream.

    tokens: a slice (the same for all samples) or a bool mask (B, S). Where samples are packed one after the other into
    one row, the mask has a row for each sample and the state one row in all. valid_BS: for a slice, which of its tokens
    are not padding, (B, length) bool; None if all are.
    """

    tokens: slice | torch.Tensor
    valid_BS: torch.Tensor | None = None

    def last(self, values_BS: torch.Tensor) -> torch.Tensor:
        """The article's reading: the value of the stream's last token, padding included. (B,) of the same dtype.

        NaN for a sample of which a mask has no token.
        """
        if isinstance(self.tokens, slice):
            return values_BS[..., self.tokens.stop - 1]
        last_B1, absent_B = self._last
        further = values_BS.shape[:-2]
        values_BS = values_BS.expand(*further, *self.tokens.shape)
        return values_BS.gather(-1, last_B1.expand(*further, -1, -1)).squeeze(-1).masked_fill(absent_B, math.nan)

    def mean(self, values_BS: torch.Tensor, among_BS: torch.Tensor | None = None) -> torch.Tensor:
        """The mean value over the stream's valid tokens, (B,): among those where `among_BS` (bool) is true, if given.

        NaN for a sample without such a token.
        """
        counted_BS = self.valid_BS
        if not isinstance(self.tokens, slice):
            counted_BS = self.tokens
        elif (self.tokens.start, self.tokens.stop) != (0, values_BS.shape[-1]):
            values_BS = values_BS[..., self.tokens]
            among_BS = None if among_BS is None else among_BS[..., self.tokens]
        if among_BS is not None:
            counted_BS = among_BS if counted_BS is None else counted_BS & among_BS
        if counted_BS is None:
            return values_BS.mean(dim=-1)
        return torch.where(counted_BS, values_BS, 0.0).sum(dim=-1) / counted_BS.sum(dim=-1)

    def readings(self, values_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both readings by name, (B,) each."""
        return {"last": self.last(values_BS), "mean": self.mean(values_BS)}

    def mask(self, samples: int, tokens: int, device: torch.device) -> torch.Tensor:
        """The stream's tokens as a bool mask (samples, tokens), padding included."""
        if not isinstance(self.tokens, slice):
            return self.tokens
        mask_BS = torch.zeros(samples, tokens, dtype=torch.bool, device=device)
        mask_BS[:, self.tokens] = True
        return mask_BS

    @cached_property
    def _last(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a mask, the position of its last token in each sample, (B, 1), and whether it has none, (B,)."""
        assert not isinstance(self.tokens, slice)
        position_S = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        return (self.tokens * position_S).argmax(dim=1, keepdim=True), ~self.tokens.any(dim=1)


def between(starts_B: torch.Tensor, stops_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens) bool, True from start to stop of each sample."""
    position_S = torch.arange(tokens, device=starts_B.device)
    return (position_S >= starts_B.unsqueeze(1)) & (position_S < stops_B.unsqueeze(1))


def prefix(lengths_B: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens) bool, True for the first `lengths_B[b]` tokens of each sample."""
    return torch.arange(tokens, device=lengths_B.device) < lengths_B.unsqueeze(1)
