"""Watches the blocks of a denoiser during a forward: hidden states in, angular distances out.

Shapes: B batch, S tokens, D width, L blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.blocks import Block, find_blocks, stream_blocks
from simpletuner_layerprobe.probe.calls import Call, watched
from simpletuner_layerprobe.probe.changes import Change, change, no_tokens, state_before
from simpletuner_layerprobe.probe.families import Family, StreamSeam
from simpletuner_layerprobe.probe.pairs import Before, Pair, Trail, moved_angles
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.side_stream import STREAM_SWITCH, SideStream
from simpletuner_layerprobe.probe.states import State, States
from simpletuner_layerprobe.probe.taken import Taken, Values
from simpletuner_layerprobe.probe.token_masks import RULES
from simpletuner_layerprobe.probe.tokens import Forward
from simpletuner_layerprobe.probe.wrappers import is_compiled, unwrapped
from simpletuner_layerprobe.readings import TOKENS, extra_readings, parse_reading

Reads = tuple[str, Change, Part, list[Pair]]
"""What to read of a stream after a block: its name, what became of its state, its tokens in it, the pairs that end."""


class Observer:
    """A context manager that hooks the blocks; between `begin` and `finish` it takes their distances.

    It keeps one hidden state a stream: the one before the running block. With pairs it keeps those before the last
    blocks, as many as the longest span has; in the first forward up to twice as many. It starts no transfer from the
    device, and of each block keeps a number a token until they are read. A compiled model runs uncompiled inside.

    residual: also what each block adds. pairs: also the distances over 2 .. `pairs` blocks in a row, below 2 for none.
    denoiser: the model inside its wrappers. streams: the paths of each stream's blocks, image first, in the model's own
    names. extra: the names of the further readings.

    Raises ModelError if the model does not have the blocks that the family's table says.
    """

    def __init__(self, denoiser: nn.Module, family: Family, residual: bool = False, pairs: int = 0) -> None:
        self.denoiser: nn.Module = unwrapped(denoiser)
        self.family = family
        self.blocks = find_blocks(denoiser, family)
        self.streams = stream_blocks(self.blocks)
        self._residual = residual
        self._longest = min(pairs, max(map(len, self.streams.values())))
        self.extra = extra_readings(residual, self._longest)
        self._compiled = is_compiled(denoiser)
        self._numbers = {
            (stream, path): number for stream, paths in self.streams.items() for number, path in enumerate(paths)
        }
        self._trails = {stream: Trail(self._longest, len(paths)) for stream, paths in self.streams.items()}
        self._states = States([block.path for block in self.blocks])
        self._side = SideStream(os.environ.get(STREAM_SWITCH) == "1")
        self._stack = ExitStack()
        self._batch: Mapping[str, Any] | None = None
        self._text_mask_BS: torch.Tensor | None = None
        self._forward: Forward | None = None
        self._entered: dict[str, dict[str, State]] = {}
        self._parts: dict[tuple[str, str], Part] = {}
        self._taken: list[Taken] = []

    def __enter__(self) -> Observer:
        with ExitStack() as stack:
            if self._compiled:  # hooks do not fire in a compiled forward, or stay in it for good
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(self.denoiser.register_forward_pre_hook(self._forward_starts, with_kwargs=True).remove)
            stack.callback(self.denoiser.register_forward_hook(self._forward_ends, always_call=True).remove)
            stack.enter_context(watched(self.blocks, self._enter_block, self._leave_block))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._batch = None
        self._forget()
        self._stack.close()

    def begin(self, batch: Mapping[str, Any], text_mask_BS: torch.Tensor | None = None) -> None:
        """Take the distances of the next forward of the denoiser; what was taken before is dropped.

        batch: SimpleTuner's prepared batch, for the token rules. text_mask_BS: bool, True for a valid text token;
        None if all are, or if the family has it in the forward's arguments.
        """
        self._batch = batch
        self._text_mask_BS = text_mask_BS
        self._forget()
        self._taken.clear()

    def finish(self) -> dict[tuple[str, str], torch.Tensor]:
        """The distances of the forward since `begin`, and an end to it: see `distances`."""
        self._batch = None
        self._forget()
        try:
            return self.distances()
        finally:
            self._taken.clear()

    def distances(self) -> dict[tuple[str, str], torch.Tensor]:
        """The distances of the last forward since `begin`: (stream, reading) -> (B, L) float32 on the device.

        Those of all forwards, one after the other, for a family that has one for each sample. A pair over n blocks has
        L - n + 1 columns, NaN where the stream does not go on in between. Raises ModelError if a block of a stream did
        not report, and names the blocks.
        """
        found = [taken.read() for taken in self._taken]
        self._check_complete(found)
        result = {}
        for name in (*TOKENS, *self.extra):
            reading = parse_reading(name)
            for stream, paths in self.streams.items():
                firsts = [first for first, _ in reading.columns(paths)]
                if firsts:
                    parts = [_columns(values, stream, name, firsts) for values in found]
                    result[stream, name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result

    def part(self, path: str, stream: str) -> Part | None:
        """The stream's tokens in the state that a block has just made, while the forward runs; None if not known."""
        return self._parts.get((path, stream))

    def _check_complete(self, found: list[Values]) -> None:
        model = type(self.denoiser).__name__
        if not found:
            raise ModelError(f"no forward of {model} was seen, so there are no distances; the model has to be called")
        missing = [
            f"{path} ({stream})"
            for values in found
            for stream, paths in self.streams.items()
            for path in paths
            if path not in values.get((stream, "mean"), {})
        ]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(self._numbers) * len(found)} block states were not reported in this "
                f"step: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; the forward of {model} did not "
                f"run them, nothing of this step was recorded"
            )

    def _forget(self) -> None:
        """Let go of the running forward and of every state."""
        self._forward = None
        self._entered.clear()
        self._parts.clear()
        for trail in self._trails.values():
            trail.clear()

    def _forward_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is None:
            return
        if self.family.forwards == "one":
            self._taken.clear()
        self._forget()
        self._taken.append(Taken())
        call = Call(type(module).forward, args, kwargs)
        mask_BS = self._text_mask_BS
        if self.family.text_mask and call[self.family.text_mask] is not None:
            mask_BS = call[self.family.text_mask] > 0.5
        self._forward = Forward(call, self._batch, mask_BS)

    def _forward_ends(self, *_: Any) -> None:
        """Blocks that gradient checkpointing runs again in the backward are not observed."""
        if self._forward is not None:
            self._side.learned()
            self._states.learned()
            self._forget()

    def _enter_block(self, block: Block, call: Call) -> None:
        if self._forward is None:
            return
        self._forward.block = call
        self._entered[block.path] = {
            argument: self._states.keep(block.path, state_before(block, argument, call))
            for argument in dict.fromkeys(seam.argument for seam in block.seams)
        }

    def _leave_block(self, block: Block, result: Any) -> None:
        states = self._entered.pop(block.path, None)
        if self._forward is None or states is None:
            return
        self._states.after_block(block.path, states.values())
        changes: dict[tuple[str, int | None], Change] = {}  # once for all streams of one state
        streams: list[Reads] = []
        shared = []  # states that others can change
        for seam in block.seams:
            state = states[seam.argument]
            key = seam.argument, seam.result
            if key not in changes:
                changes[key] = change(block, seam, state.value, result)
            tokens = changes[key].tokens
            if len(states) == len(block.seams):  # each stream has a state of its own
                self._forward.lengths[seam.stream] = tokens
            part = self._parts[block.path, seam.stream] = self._part(block, seam, tokens)
            pairs = self._pairs(block, seam, state, changes[key], part) if self._longest > 1 else []
            streams.append((seam.stream, changes[key], part, pairs))
            given = [kept.given for kept in (state, *(pair.first.state for pair in pairs))]
            shared += [changes[key].after_BSD, *(tensor for tensor in given if tensor is not None)]
        self._side.run(block.path, shared, partial(self._take, block.path, changes.values(), streams))
        self._forward.block = self._forward.call  # that of the block holds the states

    def _part(self, block: Block, seam: StreamSeam, tokens: int) -> Part:
        """The stream's tokens in a state of so many. Raises ModelError if there are none or they lie outside."""
        assert self._forward is not None
        part = self._forward.part(RULES[seam.tokens], tokens)
        if isinstance(part.tokens, slice) and not 0 <= part.tokens.start < part.tokens.stop <= tokens:
            raise no_tokens(block, seam, tokens, part.tokens)
        return part

    def _pairs(self, block: Block, seam: StreamSeam, state: State, change: Change, part: Part) -> list[Pair]:
        """The pairs of the stream that end with this block; those in place are compared with the state after it."""
        number = self._numbers[seam.stream, block.path]
        last = Before(number, block.path, state, change.before_BSD, part, seam.tokens)
        pairs = self._trails[seam.stream].follow(last)
        for pair in pairs:
            if pair.first.state.changed:
                self._states.changed_later(pair.first.path)
            if pair.in_place:
                change.earlier_BSD[pair.first.path] = pair.first.state_BSD
        return pairs

    def _take(self, path: str, changes: Iterable[Change], streams: Iterable[Reads]) -> None:
        """Take every distance after a block."""
        for made in changes:
            made.take(self._residual)
        for stream, made, part, pairs in streams:
            self._keep(stream, path, made, part, pairs)

    def _keep(self, stream: str, path: str, change: Change, part: Part, pairs: list[Pair]) -> None:
        """Keep all that was taken of one stream."""
        taken = self._taken[-1]
        taken.put(stream, "", path, part, change.angles_BS)
        if change.updates:
            taken.put(stream, "update", path, part, *change.updates)
        for pair in pairs:
            if pair.in_place:
                angles_BS, own = change.spans_BS[pair.first.path], part
            else:
                angles_BS, own = moved_angles(pair, change.after_BSD)
            taken.put(stream, f"pair{pair.span}_", pair.first.path, own, angles_BS)


def _columns(values: Values, stream: str, name: str, firsts: list[str]) -> torch.Tensor:
    """(B, len(firsts)), NaN in the columns of which nothing was taken."""
    taken = values.get((stream, name), {})
    if len(taken) < len(firsts):
        absent_B = torch.full_like(next(iter(values[stream, "mean"].values())), math.nan)
        taken = dict.fromkeys(firsts, absent_B) | taken
    return torch.stack([taken[first] for first in firsts], dim=1)
