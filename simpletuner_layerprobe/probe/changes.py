"""What a block did to one hidden state.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.blocks import Block
from simpletuner_layerprobe.probe.calls import Call
from simpletuner_layerprobe.probe.distances import token_changes
from simpletuner_layerprobe.probe.families import SAME_SHAPE, StreamSeam
from simpletuner_layerprobe.probe.tokens import LAYOUTS


@dataclass(slots=True)
class Change:
    """All tokens of a state before and after a block; the angles between them, once `take` was called.

    earlier_BSD: the states before earlier blocks with which the state after is to be compared too, by the blocks'
    paths; spans_BS: their angles. updates: the norms and cosines of what the block added, if asked for.
    """

    before_BSD: torch.Tensor
    after_BSD: torch.Tensor
    earlier_BSD: dict[str, torch.Tensor] = field(default_factory=dict)
    angles_BS: torch.Tensor = field(init=False)
    updates: list[torch.Tensor] = field(init=False)
    spans_BS: dict[str, torch.Tensor] = field(init=False)

    @property
    def tokens(self) -> int:
        """Number of tokens S."""
        return self.before_BSD.shape[1]

    def take(self, updates: bool) -> None:
        """Take the angles, and if asked for the updates. Raises ModelError if the block changed the state's shape."""
        earlier_BSD = [*self.earlier_BSD.values()]
        self.angles_BS, *values = token_changes(self.before_BSD, self.after_BSD, updates, earlier_BSD)
        self.updates, angles = values[: 2 * updates], values[2 * updates :]
        self.spans_BS = dict(zip(self.earlier_BSD, angles, strict=True))


def change(block: Block, seam: StreamSeam, before: torch.Tensor, result: Any) -> Change:
    """What the block made of the seam's state `before`, by what it returned.

    Raises ModelError if the block returned no such state, and for a state without tokens.
    """
    layout = LAYOUTS[block.entry.layout]
    before_BSD, after_BSD = layout(before), layout(state_after(block, seam, before, result))
    if before_BSD.shape[1] == 0:
        raise no_tokens(block, seam, 0, slice(0, 0))
    return Change(before_BSD, after_BSD)


def state_before(block: Block, argument: str, call: Call) -> torch.Tensor:
    """The state that the block gets by this parameter. Raises ModelError if that is no tensor."""
    state = call[argument]
    if not torch.is_tensor(state):
        raise _unfit(block, f"got {type(state).__name__} as {argument!r}")
    return state


def state_after(block: Block, seam: StreamSeam, before: torch.Tensor, result: Any) -> torch.Tensor:
    """The state of the seam's stream in what the block returned. Raises ModelError if there is none."""
    if seam.result is None:
        state = result
    elif seam.result == SAME_SHAPE:
        state = _of_shape(block, seam, before.shape, result)
    else:
        state = result[seam.result] if isinstance(result, (tuple, list)) and len(result) > seam.result else None
    if not torch.is_tensor(state):
        raise _unfit(block, f"returned {type(result).__name__} without the {seam.stream} stream")
    return state


def _of_shape(block: Block, seam: StreamSeam, shape: torch.Size, result: Any) -> torch.Tensor:
    """The one state of this shape."""
    states = result if isinstance(result, (tuple, list)) else [result]
    fitting = [state for state in states if torch.is_tensor(state) and state.shape == shape]
    if len(fitting) != 1:
        raise ModelError(
            f"{block.path} returns {len(fitting)} states of shape {tuple(shape)}, so the {seam.stream} stream cannot "
            f"be told; its model family needs an entry in the layer probe's table"
        )
    return fitting[0]


def no_tokens(block: Block, seam: StreamSeam, tokens: int, part: slice) -> ModelError:
    """That this part of a state of so many tokens is none of which a distance can be taken."""
    return ModelError(
        f"{block.path} got hidden states of {tokens} tokens, and those of the {seam.stream} stream would be "
        f"{part.start} to {part.stop}; a distance needs at least one token: look at the size of the image and the "
        f"length of the text in this batch"
    )


def _unfit(block: Block, what: str) -> ModelError:
    return ModelError(
        f"{block.path} ({type(block.module).__name__}) {what}; this version of the model runs its blocks in another "
        f"way than the layer probe's table says"
    )
