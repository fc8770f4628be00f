"""The hidden states that blocks get, as they were then: copied only where somebody changes them in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from simpletuner_layerprobe.errors import ModelError


@dataclass(slots=True)  # a frozen one takes three times as long to make
class State:
    """One hidden state that a block got.

    value: as it was then, without its autograd graph. given: the tensor that the block got, if that is still looked at;
    version: how often it had been changed in place then.
    """

    value: torch.Tensor
    given: torch.Tensor | None
    version: int

    @property
    def changed(self) -> bool:
        """Whether the tensor that the block got was changed in place since then, as far as is known."""
        return self.given is not None and self.given._version != self.version


class States:
    """Keeps states, and knows of which blocks they have to be copied: the first forward copies all and finds out."""

    def __init__(self, blocks: Collection[str]) -> None:
        self._copied = set(blocks)
        self._learning = True

    def keep(self, block: str, tensor: torch.Tensor) -> State:
        """The state that the block with this path gets now."""
        if tensor.requires_grad:
            tensor = tensor.detach()
        # A tensor of inference mode does not tell whether it was changed.
        if tensor.is_inference():
            return State(tensor.clone(), None, 0)
        if block not in self._copied:
            return State(tensor, tensor, tensor._version)
        return State(tensor.clone(), tensor if self._learning else None, tensor._version)

    def after_block(self, block: str, states: Iterable[State]) -> None:
        """The block has run. Raises ModelError if it changed a state that was not copied."""
        if any(state.changed for state in states):
            if block not in self._copied:
                raise ModelError(f"{block} changed its input in place, which it did not do in the first step")
        elif self._learning:
            self._copied.discard(block)

    def changed_later(self, block: str) -> None:
        """The state of this block was changed after it ran, while it was kept for distances over several blocks.

        Raises ModelError after the first forward.
        """
        if not self._learning:
            raise ModelError(
                f"the state before {block} was changed in place after that block, which it was not in the first step; "
                f"layerprobe_block_pairs cannot be used with this model"
            )
        self._copied.add(block)

    def learned(self) -> None:
        """The first forward is over."""
        self._learning = False
