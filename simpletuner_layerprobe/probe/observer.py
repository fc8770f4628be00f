"""Watches the blocks of a denoiser during a forward: hidden states in, angular distances out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.probe.angles import token_angles
from simpletuner_layerprobe.probe.families import SAME_SHAPE, Block, Family, StreamSeam, find_blocks, stream_blocks
from simpletuner_layerprobe.probe.pairs import Kept, Trail, moved_angles
from simpletuner_layerprobe.probe.tokens import LAYOUTS, RULES, Call, Forward, Part, readings
from simpletuner_layerprobe.probe.update import token_updates, update_readings
from simpletuner_layerprobe.readings import TOKENS, extra_readings, parse_reading

READINGS = TOKENS


@dataclass(frozen=True)
class _Taken:
    """What was taken of one state of a block: the angles of all tokens, norms and cosines of their updates if asked.

    pairs_BS: the angles over several blocks in a row, by the path of the first.
    """

    before_BSD: torch.Tensor
    after_BSD: torch.Tensor
    angles_BS: torch.Tensor
    updates: tuple[torch.Tensor, torch.Tensor] | None
    pairs_BS: dict[str, torch.Tensor] = field(default_factory=dict)


class Observer:
    """A context manager that hooks the blocks; between `begin` and `finish` it takes their distances.

    It keeps one hidden state a stream: the one before the running block. With pairs it keeps those before the last
    blocks, as many as the longest span has; in the first forward up to twice as many. It starts no transfer from the
    device and makes no tensor that grows with the number of blocks beyond a (B,) distance.

    residual: also what each block adds. pairs: also the distances over 2 .. `pairs` blocks in a row, below 2 for none.
    extra: the names of these further readings.
    """

    def __init__(self, denoiser: nn.Module, family: Family, residual: bool = False, pairs: int = 0) -> None:
        self.denoiser = denoiser
        self.family = family
        self.blocks = find_blocks(denoiser, family)
        self.streams = stream_blocks(self.blocks)
        self._residual = residual
        self._longest = min(pairs, max(map(len, self.streams.values())))
        self.extra = extra_readings(residual, self._longest)
        self._trails = {stream: Trail(self._longest, len(paths)) for stream, paths in self.streams.items()}
        self._numbers = {
            stream: {path: number for number, path in enumerate(paths)} for stream, paths in self.streams.items()
        }
        # Blocks that change their input in place get a copy; the first forward finds out which do.
        self._copies = {block.path for block in self.blocks}
        self._first = True
        self._stack = ExitStack()
        self._batch: Mapping[str, Any] | None = None
        self._text_mask_BS: torch.Tensor | None = None
        self._forward: Forward | None = None
        self._before: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor, int]]] = {}
        self._distances: list[dict[tuple[str, str], dict[str, torch.Tensor]]] = []

    def __enter__(self) -> Observer:
        with ExitStack() as stack:
            root = self.denoiser.get_submodule(self.family.root)
            stack.callback(root.register_forward_pre_hook(self._forward_starts, with_kwargs=True).remove)
            functions = set()
            for block in self.blocks:
                call = block.entry.call
                if not call:
                    before, after = self._hooks(block)
                    stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(block.module.register_forward_hook(after, with_kwargs=True).remove)
                elif call.startswith("."):
                    stack.callback(self._wrap_method(block, call[1:]))
                else:
                    functions.add(call)
            for call in sorted(functions):
                stack.callback(self._wrap_function(call))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batch = None
        self._stack.close()

    def begin(self, batch: Mapping[str, Any], text_mask_BS: torch.Tensor | None = None) -> None:
        """Take the distances of the next forward of the denoiser; what was taken before is dropped.

        batch: SimpleTuner's prepared batch, for the token rules. text_mask_BS: bool, True for a valid text token;
        None if all are.
        """
        self._batch = batch
        self._text_mask_BS = text_mask_BS
        self._forget()
        self._distances.clear()

    def _forget(self) -> None:
        """Let go of the running forward and of every state."""
        self._forward = None
        self._before.clear()
        for trail in self._trails.values():
            trail.clear()

    def finish(self) -> dict[tuple[str, str], torch.Tensor]:
        """The distances of the forward since `begin`: (stream, reading) -> (B, L) float32 on the device.

        A pair over n blocks has L - n + 1 columns, NaN where the stream does not go on in between.
        Raises ProbeError if a block of a stream did not report, and names the blocks.
        """
        self._batch = None
        forwards = self._distances or [{}]
        missing = [
            f"{path} ({stream})"
            for distances in forwards
            for stream, paths in self.streams.items()
            for path in paths
            if path not in distances.get((stream, "mean"), {})
        ]
        if missing:
            raise ProbeError(
                f"{len(missing)} of {sum(map(len, self.streams.values())) * len(forwards)} block states were not "
                f"reported in this step: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
                f"the forward of {type(self.denoiser).__name__} did not run them, nothing of this step was recorded"
            )
        result = {}
        for name in (*READINGS, *self.extra):
            reading = parse_reading(name)
            for stream, paths in self.streams.items():
                firsts = [first for first, _ in reading.columns(paths)]
                if firsts:
                    result[stream, name] = torch.cat(
                        [self._columns(distances, stream, name, firsts) for distances in forwards]
                    )
        self._forget()
        self._distances.clear()
        self._first = False
        return result

    @staticmethod
    def _columns(
        distances: Mapping[tuple[str, str], Mapping[str, torch.Tensor]], stream: str, name: str, firsts: list[str]
    ) -> torch.Tensor:
        """(B, len(firsts)), NaN in the columns of which nothing was taken."""
        values = distances.get((stream, name), {})
        if len(values) < len(firsts):
            absent_B = torch.full_like(next(iter(distances[stream, "mean"].values())), math.nan)
            values = dict.fromkeys(firsts, absent_B) | dict(values)
        return torch.stack([values[first] for first in firsts], dim=1)

    def _forward_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is None:
            return
        if self.family.forwards == "one":
            self._distances.clear()
        self._forget()
        self._distances.append({})
        self._forward = Forward(Call(type(module).forward, args, kwargs), self._batch, self._text_mask_BS)

    def _hooks(self, block: Block) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter_block(block, Call(type(module).forward, args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._leave_block(block, output)

        return before, after

    def _wrap_method(self, block: Block, name: str) -> Callable[[], None]:
        """Wrap a method of one block, on the block. Returns the function that takes the wrapper off."""
        method = getattr(block.module, name, None)
        if method is None:
            raise self._another_way(f"{type(block.module).__name__}.{name}")

        def run_block(*args: Any, **kwargs: Any) -> Any:
            self._enter_block(block, Call(getattr(type(block.module), name), args, kwargs))
            output = method(*args, **kwargs)
            self._leave_block(block, output)
            return output

        setattr(block.module, name, run_block)
        return lambda: delattr(block.module, name)

    def _wrap_function(self, call: str) -> Callable[[], None]:
        """Wrap the module-level function that runs a block. Returns the function that takes the wrapper off."""
        module_name, function_name = call.split(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if function is None:
            raise self._another_way(call)
        blocks = {id(block.module): block for block in self.blocks if block.entry.call == call}

        def run_block(module_of_block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            block = blocks.get(id(module_of_block))
            if block is None:
                return function(module_of_block, *args, **kwargs)
            self._enter_block(block, Call(function, args, kwargs))
            output = function(module_of_block, *args, **kwargs)
            self._leave_block(block, output)
            return output

        setattr(module, function_name, run_block)
        return lambda: setattr(module, function_name, function)

    def _another_way(self, missing: str) -> ProbeError:
        return ProbeError(
            f"{missing} is missing; this SimpleTuner runs the blocks of family {self.family.name!r} in another way "
            f"than the layer probe knows"
        )

    def _enter_block(self, block: Block, call: Call) -> None:
        if self._forward is None:
            return
        self._forward.block = call
        copy = block.path in self._copies
        states = {}
        for argument in dict.fromkeys(seam.argument for seam in block.seams):
            state = call[argument]
            states[argument] = (state, state.clone() if copy else state, state._version)
        self._before[block.path] = states

    def _leave_block(self, block: Block, output: Any) -> None:
        states = self._before.pop(block.path, None)
        if self._forward is None or states is None:
            return
        if all(state._version == version for state, _, version in states.values()):
            if self._first:
                self._copies.discard(block.path)
        elif block.path not in self._copies:
            raise ProbeError(f"{block.path} changed its input in place, which it did not do in the first step")
        layout = LAYOUTS[block.entry.layout]
        # One computation for all streams of one state.
        taken: dict[tuple[str, int | None], _Taken] = {}
        joint = len(states) < len(block.seams)
        for seam in block.seams:
            key = (seam.argument, seam.result)
            if key not in taken:
                before = states[seam.argument][1]
                after = self._result(block, seam, before, output)
                before_BSD, after_BSD = layout(before), layout(after)
                taken[key] = _Taken(
                    before_BSD,
                    after_BSD,
                    token_angles(before_BSD, after_BSD),
                    token_updates(before_BSD, after_BSD) if self._residual else None,
                )
            one = taken[key]
            tokens = one.angles_BS.shape[1]
            if not joint:
                self._forward.lengths[seam.stream] = tokens
            part = RULES[seam.tokens](self._forward, tokens)
            self._keep(seam.stream, "", block.path, readings(one.angles_BS, part))
            if one.updates is not None:
                self._keep(seam.stream, "", block.path, update_readings(*one.updates, part))
            if self._longest > 1:
                self._take_pairs(block, seam, states[seam.argument], one, part)
        self._forward.block = None  # it holds the state before the block

    def _keep(self, stream: str, prefix: str, path: str, values: Mapping[str, torch.Tensor]) -> None:
        for name, value_B in values.items():
            self._distances[-1].setdefault((stream, prefix + name), {})[path] = value_B

    def _take_pairs(
        self, block: Block, seam: StreamSeam, state: tuple[torch.Tensor, torch.Tensor, int], taken: _Taken, part: Part
    ) -> None:
        """The distances of the pairs that end with this block, and its own state before for those to come."""
        original, copy, version = state
        last = Kept(
            number=self._numbers[seam.stream][block.path],
            path=block.path,
            state_BSD=taken.before_BSD,
            part=part,
            rule=seam.tokens,
            # A copy is nobody else's; in the first forward its original tells whether it was needed.
            original=original if self._first or copy is original else None,
            version=version,
        )
        for span, first in self._trails[seam.stream].follow(last):
            if first.changed:
                if not self._first:
                    raise ProbeError(
                        f"the state before {first.path} was changed in place after that block, which it was not in the "
                        f"first step; layerprobe_block_pairs cannot be used with this model"
                    )
                self._copies.add(first.path)
            if first.in_place_with(last):
                # The streams of one joint state share the angles.
                if first.path not in taken.pairs_BS:
                    taken.pairs_BS[first.path] = token_angles(first.state_BSD, taken.after_BSD)
                angles_BS, within = taken.pairs_BS[first.path], part
            else:
                angles_BS, within = moved_angles(first, last, taken.after_BSD)
            self._keep(seam.stream, f"pair{span}_", first.path, readings(angles_BS, within))

    def _result(self, block: Block, seam: StreamSeam, before: torch.Tensor, output: Any) -> torch.Tensor:
        """The state of the seam's stream in what the block returned."""
        if seam.result is None:
            return output
        if seam.result != SAME_SHAPE:
            return output[seam.result]
        states = [one for one in (output if isinstance(output, (tuple, list)) else [output]) if torch.is_tensor(one)]
        fitting = [one for one in states if one.shape == before.shape]
        if len(fitting) != 1:
            raise ProbeError(
                f"{block.path} returns {len(fitting)} states of shape {tuple(before.shape)}, so the {seam.stream} "
                f"stream cannot be told; model family {self.family.name!r} needs an entry in the layer probe's table"
            )
        return fitting[0]
