"""What others put around a model's modules: the compiler, data parallelism, activation checkpointing.

A wrapper is a module that holds the real one as a child and calls it. Names and classes given here are the model's own,
whatever is around it. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

INNER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Under which a wrapper holds the real module: torch.compile's, activation checkpointing's, FSDP's."""
PARALLEL = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")
"""Classes of wrappers that hold it as `module`, a name that a model may use for a part of its own."""


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers around `module` (a `torch.nn.Module`): the one whose own forward runs."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: Any) -> Any:
    """The module that this one wraps; None if it is no wrapper.

    Children and not attributes: accelerate's regional compilation keeps the uncompiled model in an attribute
    `_orig_mod` of one that is no wrapper, and that runs instead.
    """
    for name in INNER_NAMES:
        if name in module._modules:
            return module._modules[name]
    return module._modules.get("module") if type(module).__name__ in PARALLEL else None


def named_children(module: Any) -> Iterator[tuple[str, Any]]:
    """The children of a module without their wrappers, by name.

    `_modules` and not iteration: SimpleTuner's DiffusionBlocks changes what a block list yields.
    """
    for name, child in unwrapped(module)._modules.items():
        if child is not None:
            yield name, unwrapped(child)


def named_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """As `torch.nn.Module.named_modules`, but without wrappers: the model itself as "", then all below, each once.

    Regional compilation makes other lists for the blocks; the model that it was made of has those of the model's own
    classes.
    """
    model = unwrapped(model)
    met: set[int] = set()

    def below(path: str, module: Any) -> Iterator[tuple[str, Any]]:
        if id(module) in met:
            return
        met.add(id(module))
        yield path, module
        for name, child in named_children(module):
            yield from below(f"{path}.{name}" if path else name, child)

    yield from below("", vars(model).get("_orig_mod", model))


def own_name(name: str) -> str:
    """The name of a weight in the model's own words: "proj_out._orig_mod.weight" is "proj_out.weight"."""
    return ".".join(part for part in name.split(".") if part not in INNER_NAMES)


def is_compiled(model: Any) -> bool:
    """Whether the model or a part of it was given to torch.compile: as a wrapper, in place, or its forward alone."""
    return any(
        module._compiled_call_impl or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
