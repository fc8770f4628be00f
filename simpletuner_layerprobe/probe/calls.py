"""The runs of a model's blocks, however the model runs them: their arguments before, their result after."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.probe.blocks import Block
from simpletuner_layerprobe.probe.wrappers import unwrapped


@functools.cache
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
Run = Callable[[Block, Call, Callable[[], Any]], Any]
"""(block, its call, proceed) -> what the block is to return; `proceed()` runs it as it would have run."""


@contextmanager
def watched(blocks: Sequence[Block], enter: Enter, leave: Leave) -> Iterator[None]:
    """Inside, every run of a block calls `enter(block, call)` before it and `leave(block, result)` after it.

    Raises SeamError as `replaced` does.
    """

    def run(block: Block, call: Call, proceed: Callable[[], Any]) -> Any:
        enter(block, call)
        result = proceed()
        leave(block, result)
        return result

    with replaced(blocks, run):
        yield


@contextmanager
def replaced(blocks: Sequence[Block], run: Run) -> Iterator[None]:
    """Inside, `run` stands for every run of a block. Afterwards nothing of it is left on the model.

    Raises SeamError where the table names a function or a method that is not there.
    """
    functions = dict.fromkeys(block.entry.call for block in blocks if ":" in block.entry.call)
    with ExitStack() as stack:
        for block in blocks:
            if ":" not in block.entry.call:
                stack.enter_context(_method_replaced(block, run))
        for call in functions:
            through_it = [block for block in blocks if block.entry.call == call]
            stack.enter_context(_function_replaced(call, through_it, run))
        yield


@contextmanager
def _method_replaced(block: Block, run: Run) -> Iterator[None]:
    """A block that the model calls as a module, or of which it calls a method: on the block itself."""
    name = block.entry.call.removeprefix(".") or "forward"
    module = block.module
    if not hasattr(module, name):
        raise _missing(f"{type(module).__name__}.{name}")
    own = vars(module).get(name)  # as offloading leaves it on a module

    @functools.wraps(getattr(module, name))
    def run_block(*args: Any, **kwargs: Any) -> Any:
        of_class = getattr(type(module), name)  # looked up at each run, as Python does
        method = own or functools.partial(of_class, module)
        return run(block, Call(of_class, args, kwargs), lambda: method(*args, **kwargs))

    with _replaced(module, name, run_block):
        yield


@contextmanager
def _function_replaced(call: str, blocks: Sequence[Block], run: Run) -> Iterator[None]:
    """Blocks that a function of the model's Python module runs, which gets the block as its first argument."""
    module_name, name = call.split(":")
    module = importlib.import_module(module_name)
    function = getattr(module, name, None)
    if function is None:
        raise _missing(call)
    by_id = {id(block.module): block for block in blocks}
    signature_of = inspect.unwrap(function)

    @functools.wraps(function)
    def run_block(module_of_block: Any, *args: Any, **kwargs: Any) -> Any:
        block = by_id.get(id(unwrapped(module_of_block)))
        if block is None:  # another model's
            return function(module_of_block, *args, **kwargs)
        return run(block, Call(signature_of, args, kwargs), lambda: function(module_of_block, *args, **kwargs))

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
