"""Ablation: the forward again with one block's update left out, without running again what ran before that block.

A plain forward is kept (`keep`): what every block returned. In the forwards after it (`without`) the blocks before the
one that is left out hand on what they returned, that one hands on what it got, and only those after it run. With L
blocks and one forward for each of them that is (L + 1) / 2 forwards in block runs, the plain one included. What a model
does outside of its blocks (embedders, head) runs again each time.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.blocks import Block
from simpletuner_layerprobe.probe.calls import Call, replaced
from simpletuner_layerprobe.probe.changes import state_after, state_before
from simpletuner_layerprobe.probe.draws import Draws
from simpletuner_layerprobe.probe.families import SAME_SHAPE, StreamSeam
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.tokens import LAYOUTS

MISSING = object()
PartOf = Callable[[str, str], Part | None]
"""(block's path, stream) -> the stream's tokens in the state that the block has just made; None if all are."""


@dataclass(frozen=True)
class _Kept:
    """One run of a block in the plain forward.

    result: what it returned, MISSING where there was no room for it. parts: stream -> its tokens. drawn: where the
    random generators stood after it; None if it drew nothing.
    """

    path: str
    result: Any
    parts: Mapping[str, Part | None]
    drawn: Draws | None


class Ablation:
    """The runs of a model's blocks, kept and handed on. One object for all steps of a run.

    blocks: in the order in which the model runs them. budget_bytes: how much of the device's memory the kept results
    may take; a block whose result has no room runs again. runs: how often blocks ran since `keep` began.
    kept_bytes: what the last plain forward keeps. missing: how many of its results had no room.
    """

    def __init__(self, blocks: Sequence[Block], budget_bytes: float = float("inf")) -> None:
        self.blocks = tuple(blocks)
        self.budget_bytes = budget_bytes
        self.runs = 0
        self.kept_bytes = 0
        self.missing = 0
        self._kept: list[_Kept] = []
        # Results that the model changes in place later are copied; the first plain forward finds out which.
        self._copied = {block.path for block in blocks}
        self._learning = True

    @contextmanager
    def keep(self, part_of: PartOf = lambda path, stream: None) -> Iterator[None]:
        """Inside, the plain forward runs, and what its blocks return is kept until `forget`.

        Raises ModelError if a block cannot be left out because its states change their shape in it.
        """
        self.forget()
        self.runs = 0
        given: list[tuple[str, torch.Tensor, int]] = []

        def run(block: Block, call: Call, proceed: Callable[[], Any]) -> Any:
            shapes = {seam: state_before(block, seam.argument, call).shape for seam in block.seams}
            start = Draws()
            result = self._ran(proceed)
            end = Draws()
            for seam, shape in shapes.items():
                _check_shape(block, seam, shape, result)
            given.extend((block.path, tensor, tensor._version) for tensor in _tensors(result) if _tells(tensor))
            parts = {seam.stream: part_of(block.path, seam.stream) for seam in block.seams}
            drawn = None if end.same(start) else end
            self._kept.append(_Kept(block.path, self._room_for(block, result), parts, drawn))
            return result

        with replaced(self.blocks, run):
            yield
        changed = {path for path, tensor, version in given if tensor._version != version}
        if self._learning:
            silent = {block.path for block in self.blocks} - {path for path, _, _ in given}
            self._copied, self._learning = changed | silent, False
        elif not changed <= self._copied:
            raise ModelError(
                f"what {min(changed - self._copied)} returned was changed in place after it, which it was not in the "
                f"first step; blocks of this model cannot be left out: set layerprobe_ablation to none"
            )

    @contextmanager
    def without(self, left_out: str, stream: str = "") -> Iterator[None]:
        """Inside, the kept forward runs again with the update of the block at this path left out.

        stream: its update of this stream alone, "" for all of them. Raises ModelError if the forward runs other blocks
        than before.
        """
        place = 0
        after = False

        def run(block: Block, call: Call, proceed: Callable[[], Any]) -> Any:
            nonlocal place, after
            kept = self._kept[place] if place < len(self._kept) else None
            if kept is None or kept.path != block.path:
                raise ModelError(f"the forward ran {block.path} where it had not run before; it cannot be repeated")
            if kept.path == self._kept[0].path:
                after = False  # another forward of the same step begins
            place += 1
            if block.path == left_out:
                after = True
                result = self._left_out(block, call, kept, stream, proceed)
            elif after or kept.result is MISSING:
                return self._ran(proceed)
            else:
                result = _copy(kept.result) if block.path in self._copied else kept.result
            if kept.drawn is not None:  # those after it draw what they drew before
                kept.drawn.restore()
            return result

        with replaced(self.blocks, run):
            yield
        if place != len(self._kept):
            raise ModelError(f"the forward ran {place} blocks and {len(self._kept)} before; it cannot be repeated")

    def forget(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self.kept_bytes = self.missing = 0

    def _ran(self, proceed: Callable[[], Any]) -> Any:
        self.runs += 1
        return proceed()

    def _room_for(self, block: Block, result: Any) -> Any:
        """What is kept of a result. The first ones come first: they are handed on most often."""
        size_bytes = sum(tensor.nbytes for tensor in _tensors(result))
        if self.kept_bytes + size_bytes > self.budget_bytes:
            self.missing += 1
            return MISSING
        self.kept_bytes += size_bytes
        return _copy(result) if block.path in self._copied else result

    def _left_out(self, block: Block, call: Call, kept: _Kept, stream: str, proceed: Callable[[], Any]) -> Any:
        """What the block returns if it leaves its states, or those of one stream, as they are."""
        befores = {seam: state_before(block, seam.argument, call) for seam in block.seams}
        copied = block.path in self._copied
        if kept.result is MISSING or copied:  # the block, or who gets its result, may work in place
            befores = {seam: before.clone() for seam, before in befores.items()}
        result = kept.result
        if result is MISSING:
            result = self._ran(proceed)
        elif copied:
            result = _copy(result)
        for seam, before in befores.items():
            part = kept.parts[seam.stream]
            if not stream:
                result = _with_state(result, seam, before)
            elif seam.stream == stream:
                if part is not None:
                    before = _mixed(block, before, state_after(block, seam, before, result), part)
                result = _with_state(result, seam, before)
        return result


def _mixed(block: Block, before: torch.Tensor, after: torch.Tensor, part: Part) -> torch.Tensor:
    """The state after the block, with the tokens of a stream as they were before it."""
    mixed = after.clone(memory_format=torch.contiguous_format)
    mixed_BSD, before_BSD = (LAYOUTS[block.entry.layout](state) for state in (mixed, before))  # a view of it
    mask_BS = part.mask(mixed_BSD.shape[0], mixed_BSD.shape[1], mixed.device)
    if len(mask_BS) != len(mixed_BSD):  # samples packed into one row
        mask_BS = mask_BS.any(dim=0, keepdim=True)
    mixed_BSD.copy_(torch.where(mask_BS.unsqueeze(-1), before_BSD, mixed_BSD))
    return mixed


def _with_state(result: Any, seam: StreamSeam, state: torch.Tensor) -> Any:
    """The block's result with this state in the seam's place."""
    if torch.is_tensor(result):
        return state

    def holds_it(place: int, value: Any) -> bool:
        if seam.result == SAME_SHAPE:
            return torch.is_tensor(value) and value.shape == state.shape
        return place == seam.result

    values = [state if holds_it(place, value) else value for place, value in enumerate(result)]
    return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)


def _check_shape(block: Block, seam: StreamSeam, before: torch.Size, result: Any) -> None:
    after = state_after(block, seam, torch.empty(before, device="meta"), result).shape
    if after != before:
        raise ModelError(
            f"{block.path} makes hidden states of shape {tuple(after)} from {tuple(before)}, so it cannot be left out: "
            f"set layerprobe_ablation to none for this model"
        )


def _tensors(result: Any) -> list[torch.Tensor]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [value for value in values if torch.is_tensor(value)]


def _tells(tensor: torch.Tensor) -> bool:
    """Whether a tensor tells that it was changed in place; one of inference mode does not."""
    return not tensor.is_inference()


def _copy(result: Any) -> Any:
    if torch.is_tensor(result):
        return result.clone()
    if isinstance(result, (tuple, list)):
        values = [_copy(value) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return result
