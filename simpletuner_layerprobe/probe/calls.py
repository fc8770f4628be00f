"""The runs of a model's blocks, however the model runs them: their arguments before, their result after."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.probe.blocks import Block
from simpletuner_layerprobe.probe.wrappers import unwrapped


@cache
def positions(function: Callable[..., Any]) -> dict[str, int]:
    """Position of each parameter among the positional arguments after the first (self, or the block)."""
    names = list(inspect.signature(function).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


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


Enter = Callable[[Block, Call], None]
Leave = Callable[[Block, Any], None]


@contextmanager
def watched(blocks: Sequence[Block], enter: Enter, leave: Leave) -> Iterator[None]:
    """Inside, every run of a block calls `enter(block, call)` before it and `leave(block, result)` after it.

    Afterwards nothing of it is left on the model. Raises SeamError where the table names a function or a method that
    is not there.
    """
    functions = dict.fromkeys(block.entry.call for block in blocks if ":" in block.entry.call)
    with ExitStack() as stack:
        for block in blocks:
            if not block.entry.call:
                stack.enter_context(_module_watched(block, enter, leave))
            elif block.entry.call.startswith("."):
                stack.enter_context(_method_watched(block, enter, leave))
        for call in functions:
            through_it = [block for block in blocks if block.entry.call == call]
            stack.enter_context(_function_watched(call, through_it, enter, leave))
        yield


@contextmanager
def _module_watched(block: Block, enter: Enter, leave: Leave) -> Iterator[None]:
    """Blocks that the model calls as modules."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter(block, Call(type(module).forward, args, kwargs))

    def after(module: Any, args: tuple[Any, ...], result: Any) -> None:
        leave(block, result)

    with ExitStack() as stack:
        stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.module.register_forward_hook(after).remove)
        yield


@contextmanager
def _method_watched(block: Block, enter: Enter, leave: Leave) -> Iterator[None]:
    """A block of which the model calls a method: wrapped on the block itself."""
    name = block.entry.call.removeprefix(".")
    method = getattr(block.module, name, None)
    if method is None:
        raise _missing(f"{type(block.module).__name__}.{name}")

    def run_block(*args: Any, **kwargs: Any) -> Any:
        enter(block, Call(getattr(type(block.module), name), args, kwargs))
        result = method(*args, **kwargs)
        leave(block, result)
        return result

    with _replaced(block.module, name, run_block):
        yield


@contextmanager
def _function_watched(call: str, blocks: Sequence[Block], enter: Enter, leave: Leave) -> Iterator[None]:
    """Blocks that a function of the model's Python module runs, which gets the block as its first argument."""
    module_name, name = call.split(":")
    module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if function is None:
        raise _missing(call)
    by_id = {id(block.module): block for block in blocks}

    def run_block(module_of_block: Any, *args: Any, **kwargs: Any) -> Any:
        block = by_id.get(id(unwrapped(module_of_block)))
        if block is None:  # another model's
            return function(module_of_block, *args, **kwargs)
        enter(block, Call(function, args, kwargs))
        result = function(module_of_block, *args, **kwargs)
        leave(block, result)
        return result

    with _replaced(module, name, run_block):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute of `owner` is `value`; afterwards it is as it was."""
    absent = object()
    kept = vars(owner).get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if kept is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, kept)


def _missing(what: str) -> SeamError:
    return SeamError(
        f"{what} is missing; this SimpleTuner runs the blocks of the model in another way than the layer probe knows: "
        f"install versions that fit each other ('layerprobe doctor' shows them)"
    )
