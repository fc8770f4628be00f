"""Distances over several blocks in a row: the states before a stream's last few blocks, kept for a while.

A pair is a first and a last block of one stream; its distance is that of the state before the first and the state
after the last (arXiv 2403.17887 has it as the distance of the inputs of layers l and l + n).

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

from simpletuner_layerprobe.probe.angles import chunks
from simpletuner_layerprobe.probe.distances import token_angles
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.states import State


@dataclass(frozen=True)
class Before:
    """The state of one stream before one block.

    number: the block's position in the stream. path: its path. state: what the block got; state_BSD: the same with all
    tokens in order. part: the stream's own. rule: the name of the rule that says which they are.
    """

    number: int
    path: str
    state: State
    state_BSD: torch.Tensor
    part: Part
    rule: str

    def leads_to(self, other: Before) -> bool:
        """Whether the stream goes on in `other` with as many tokens of the same width, as far as the host knows."""
        if other.number != self.number + 1 or other.state_BSD.shape[2] != self.state_BSD.shape[2]:
            return False
        ours, theirs = self.part.tokens, other.part.tokens
        if isinstance(ours, slice) and isinstance(theirs, slice):
            return ours.stop - ours.start == theirs.stop - theirs.start
        return True

    def own_tokens(self) -> torch.Tensor:
        """The stream's tokens as a bool mask (samples, S)."""
        samples, tokens, _ = self.state_BSD.shape
        return self.part.mask(samples, tokens, self.state_BSD.device)


@dataclass(frozen=True)
class Pair:
    """The blocks from the one after `first` to the one after `last`, `span` in number."""

    span: int
    first: Before
    last: Before

    @property
    def in_place(self) -> bool:
        """Whether the stream's tokens stand at the same positions of both states."""
        return self.first.rule == self.last.rule and self.first.state_BSD.shape == self.last.state_BSD.shape


class Trail:
    """The states before the last blocks of one stream, as many as the longest span has blocks.

    Where the stream does not go on (a U-Net between two resolutions), the states before are dropped: no pair is over
    such a seam. The host knows the number of tokens only where a slice cuts them out; where masks do, `moved_angles`
    gives NaN for a sample whose number of tokens is another.
    """

    def __init__(self, longest: int, blocks: int) -> None:
        self._kept: deque[Before] = deque(maxlen=longest)
        self._blocks = blocks

    def clear(self) -> None:
        self._kept.clear()

    def follow(self, last: Before) -> list[Pair]:
        """Every pair that ends with the block of `last`, shortest first; `last` is kept for those to come."""
        if self._kept and not self._kept[-1].leads_to(last):
            self._kept.clear()
        self._kept.append(last)
        pairs = [Pair(span, first, last) for span, first in enumerate(list(self._kept)[-2::-1], start=2)]
        if last.number == self._blocks - 1:
            self._kept.clear()
        elif len(self._kept) == self._kept.maxlen:
            self._kept.popleft()
        return pairs


def moved_angles(pair: Pair, after_BSD: torch.Tensor) -> tuple[torch.Tensor, Part]:
    """The angles of a stream's tokens before the first and after the last block, where they are at other positions.

    Returns (B, S) float32 as `token_angles` does, and the stream's Part of these S.
    """
    first, last = pair.first, pair.last
    before, after = first.part.tokens, last.part.tokens
    if isinstance(before, slice) and isinstance(after, slice):
        angles_BS = token_angles(first.state_BSD[:, before], after_BSD[:, after])
        return angles_BS, Part(slice(0, angles_BS.shape[1]), last.part.valid_BS)
    return _gathered_angles(first.state_BSD, first.own_tokens(), after_BSD, last.own_tokens())


def _gathered_angles(
    before_BSD: torch.Tensor, before_BS: torch.Tensor, after_BSD: torch.Tensor, after_BS: torch.Tensor
) -> tuple[torch.Tensor, Part]:
    """The angles of the k-th token of one mask and the k-th of the other; NaN in a sample with unequal numbers."""
    count = min(before_BS.shape[1], after_BS.shape[1])
    # Positions of the masked tokens first, without waiting for the device to count them.
    where = [(~mask_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :count] for mask_BS in (before_BS, after_BS)]
    samples, width = len(after_BS), after_BSD.shape[2]
    parts = []
    for tokens in chunks((samples, count, width), after_BSD.device.type):
        u_BSD, v_BSD = (
            state_BSD.expand(samples, -1, -1).gather(1, index_BS[:, tokens, None].expand(-1, -1, width))
            for state_BSD, index_BS in zip((before_BSD, after_BSD), where, strict=True)
        )
        parts.append(token_angles(u_BSD, v_BSD))
    tokens_B, expected_B = after_BS.sum(dim=1), before_BS.sum(dim=1)
    angles_BS = torch.cat(parts, dim=1).masked_fill_((tokens_B != expected_B).unsqueeze(1), math.nan)
    return angles_BS, Part(torch.arange(count, device=tokens_B.device) < tokens_B.unsqueeze(1))
