"""Watches the blocks of a denoiser during a forward: hidden states in, angular distances out."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.families import BlockList, Family, StreamSeam
from simpletuner_layerprobe.record.distance import last_token, mean_token, token_angles

READINGS = ("last", "mean")


@dataclass(frozen=True)
class Block:
    """One block of the denoiser and the streams that it updates."""

    path: str
    module: nn.Module
    seams: tuple[StreamSeam, ...]
    call: str


def find_blocks(denoiser: nn.Module, family: Family) -> list[Block]:
    """The blocks of a denoiser in the order of the family's table.

    Raises ProbeError if the denoiser lacks a block list of its family.
    """
    blocks = []
    for entry in family.blocks:
        try:
            modules = denoiser.get_submodule(entry.path)
        except AttributeError:
            raise ProbeError(
                f"{type(denoiser).__name__} has no {entry.path!r}; the layer probe expects it in family {family.name!r}"
            ) from None
        # By index: SimpleTuner's DiffusionBlocks changes what iteration over such a list yields.
        blocks += [_block(entry, index, modules[index]) for index in range(len(modules))]
    if not blocks:
        raise ProbeError(f"{type(denoiser).__name__} has no transformer blocks; there is nothing to probe")
    return blocks


def _block(entry: BlockList, index: int, module: nn.Module) -> Block:
    seams = tuple(seam for seam in entry.streams if not (seam.unless and getattr(module, seam.unless, False)))
    return Block(f"{entry.path}.{index}", module, seams, entry.call)


def stream_blocks(blocks: list[Block]) -> dict[str, tuple[str, ...]]:
    """For each stream the paths of the blocks that update it, in order; the image stream first."""
    paths: dict[str, list[str]] = {}
    for block in blocks:
        for seam in block.seams:
            paths.setdefault(seam.stream, []).append(block.path)
    return {stream: tuple(paths[stream]) for stream in sorted(paths, key=lambda name: (name == "text", name))}


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
        self._parameters = {block.path: _parameters(block) for block in self.blocks}
        # Blocks that change their input in place get a copy; the first forward finds out which do.
        self._copies = {block.path for block in self.blocks}
        self._first = True
        self._stack = ExitStack()
        self._active = False
        self._before: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]] = {}
        self._distances: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        self._text_tokens = 0
        self._text_mask_BS: torch.Tensor | None = None

    def __enter__(self) -> Observer:
        with ExitStack() as stack:
            handle = self.denoiser.register_forward_pre_hook(self._forward_starts, with_kwargs=True)
            stack.callback(handle.remove)
            for block in self.blocks:
                if block.call:
                    continue
                before, after = self._hooks(block)
                stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.module.register_forward_hook(after, with_kwargs=True).remove)
            for call in {block.call for block in self.blocks if block.call}:
                stack.callback(self._wrap_function(call))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        self._stack.close()

    def begin(self, text_mask_BS: torch.Tensor | None = None) -> None:
        """Take the distances of the next forward of the denoiser; what was taken before is dropped.

        text_mask_BS: bool, True for a valid text token; None if all are.
        """
        self._active = True
        self._text_mask_BS = text_mask_BS
        self._clear()

    def finish(self) -> dict[tuple[str, str], torch.Tensor]:
        """The distances of the forward since `begin`: (stream, reading) -> (B, L) float32 on the device.

        Raises ProbeError if a block of a stream did not report, and names the blocks.
        """
        self._active = False
        missing = [
            f"{path} ({stream})"
            for stream, paths in self.streams.items()
            for path in paths
            if path not in self._distances.get((stream, "mean"), {})
        ]
        if missing:
            raise ProbeError(
                f"{len(missing)} of {sum(map(len, self.streams.values()))} block states were not reported in this "
                f"step: "
                f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}; "
                f"the forward of {type(self.denoiser).__name__} did not run them, nothing of this step was recorded"
            )
        result = {
            (stream, reading): torch.stack([self._distances[stream, reading][path] for path in paths], dim=1)
            for stream, paths in self.streams.items()
            for reading in READINGS
        }
        self._clear()
        self._first = False
        return result

    def _clear(self) -> None:
        self._before.clear()
        self._distances.clear()

    def _forward_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._active:
            return
        self._clear()
        text = kwargs.get(self.family.text_argument)
        self._text_tokens = 0 if text is None else text.shape[1]

    def _hooks(self, block: Block) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active:
                self._enter_block(block, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._active:
                self._leave_block(block, output)

        return before, after

    def _wrap_function(self, call: str) -> Callable[[], None]:
        """Wrap the module-level function that runs a block. Returns the function that takes the wrapper off."""
        module_name, function_name = call.split(":")
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if function is None:
            raise ProbeError(
                f"{module_name} has no {function_name}; this SimpleTuner runs the blocks of family "
                f"{self.family.name!r} in another way than the layer probe knows"
            )
        blocks = {id(block.module): block for block in self.blocks if block.call == call}

        def run_block(module_of_block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            block = blocks.get(id(module_of_block)) if self._active else None
            if block is None:
                return function(module_of_block, *args, **kwargs)
            self._enter_block(block, args, kwargs)
            output = function(module_of_block, *args, **kwargs)
            self._leave_block(block, output)
            return output

        setattr(module, function_name, run_block)
        return lambda: setattr(module, function_name, function)

    def _enter_block(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = []
        for seam in block.seams:
            name, position = seam.argument, self._parameters[block.path][seam.argument]
            state_BSD = kwargs[name] if name in kwargs else args[position]
            kept_BSD = state_BSD.clone() if block.path in self._copies else state_BSD
            states.append((state_BSD, kept_BSD, state_BSD._version))
        self._before[block.path] = states

    def _leave_block(self, block: Block, output: Any) -> None:
        states = self._before.pop(block.path)
        if all(state_BSD._version == version for state_BSD, _, version in states):
            if self._first:
                self._copies.discard(block.path)
        elif block.path not in self._copies:
            raise ProbeError(f"{block.path} changed its input in place, which it did not do in the first step")
        for seam, (_, kept_BSD, _) in zip(block.seams, states, strict=True):
            after_BSD = output if seam.result is None else output[seam.result]
            if not torch.is_tensor(after_BSD):
                continue
            angles_BS = token_angles(self._part(seam, kept_BSD), self._part(seam, after_BSD))
            for reading, value_B in self._readings(seam, angles_BS).items():
                self._distances.setdefault((seam.stream, reading), {})[block.path] = value_B

    def _part(self, seam: StreamSeam, state_BSD: torch.Tensor) -> torch.Tensor:
        if seam.part == "all":
            return state_BSD
        text, image = state_BSD[:, : self._text_tokens], state_BSD[:, self._text_tokens :]
        return text if seam.part == "text" else image

    def _readings(self, seam: StreamSeam, angles_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        valid_BS = self._text_mask_BS if seam.stream == "text" else None
        if valid_BS is not None and valid_BS.shape != angles_BS.shape:
            raise ProbeError(
                f"the batch's text mask has shape {tuple(valid_BS.shape)}, the text stream {tuple(angles_BS.shape)}; "
                f"the layer probe does not know which text tokens of family {self.family.name!r} are valid"
            )
        return {"last": last_token(angles_BS), "mean": mean_token(angles_BS, valid_BS)}


def _parameters(block: Block) -> dict[str, int]:
    """Position of each of the call's parameters among the positional arguments after the block itself."""
    if block.call:
        module_name, function_name = block.call.split(":")
        function = getattr(importlib.import_module(module_name), function_name, None)
        if function is None:
            return {}
    else:
        function = type(block.module).forward
    names = list(inspect.signature(function).parameters)[1:]
    return {name: position for position, name in enumerate(names)}
