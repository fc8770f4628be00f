"""Watches the blocks of a denoiser during a forward: hidden states in, angular distances out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.families import SAME_SHAPE, Block, Family, StreamSeam, find_blocks, stream_blocks
from simpletuner_layerprobe.record.distance import token_angles
from simpletuner_layerprobe.record.tokens import LAYOUTS, RULES, Call, Forward, readings

READINGS = ("last", "mean")


class Observer:
    """A context manager that hooks the blocks; between `begin` and `finish` it takes their distances.

    It keeps one hidden state a stream: the one before the running block. It starts no transfer from the device and
    makes no tensor that grows with the number of blocks beyond a (B,) distance.
    """

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        self.denoiser = denoiser
        self.family = family
        self.blocks = find_blocks(denoiser, family)
        self.streams = stream_blocks(self.blocks)
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
        self._forward = None
        self._before.clear()
        self._distances.clear()

    def finish(self) -> dict[tuple[str, str], torch.Tensor]:
        """The distances of the forward since `begin`: (stream, reading) -> (B, L) float32 on the device.

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
        result = {
            (stream, reading): torch.cat(
                [torch.stack([distances[stream, reading][path] for path in paths], dim=1) for distances in forwards]
            )
            for stream, paths in self.streams.items()
            for reading in READINGS
        }
        self._forward = None
        self._distances.clear()
        self._first = False
        return result

    def _forward_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._batch is None:
            return
        if self.family.forwards == "one":
            self._distances.clear()
        self._before.clear()
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
        angles: dict[tuple[str, int | None], torch.Tensor] = {}
        joint = len(states) < len(block.seams)
        for seam in block.seams:
            key = (seam.argument, seam.result)
            if key not in angles:
                before = states[seam.argument][1]
                after = self._result(block, seam, before, output)
                angles[key] = token_angles(layout(before), layout(after))
            if not joint:
                self._forward.lengths[seam.stream] = angles[key].shape[1]
            part = RULES[seam.tokens](self._forward, angles[key].shape[1])
            for reading, value_B in readings(angles[key], part).items():
                self._distances[-1].setdefault((seam.stream, reading), {})[block.path] = value_B
        self._forward.block = None  # it holds the state before the block

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
