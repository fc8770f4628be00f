"""Finds the blocks of a model and the streams that each of them updates. Torch is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.families import SAME_SHAPE, BlockList, Family, StreamSeam, Target
from simpletuner_layerprobe.probe.wrappers import named_children, named_modules, unwrapped


@dataclass(frozen=True)
class Block:
    """One block of a denoiser and the streams that it updates.

    path: its own name in the model. module: the `torch.nn.Module` whose forward runs, inside all wrappers.
    """

    path: str
    module: Any
    entry: BlockList
    seams: tuple[StreamSeam, ...]


def find_blocks(denoiser: Any, family: Family) -> list[Block]:
    """The blocks of a denoiser (a `torch.nn.Module`) in the order of its family's table.

    Raises ModelError if the denoiser lacks a block list of its family.
    """
    denoiser = unwrapped(denoiser)
    blocks = []
    for entry in family.blocks:
        for path, module in _modules_at(denoiser, entry.path, family.name):
            if not entry.only or type(module).__name__ in entry.only:
                seams = tuple(
                    seam for seam in entry.streams if not (seam.unless and getattr(module, seam.unless, False))
                )
                blocks.append(Block(path, module, entry, seams))
    if not blocks:
        raise ModelError(f"{type(denoiser).__name__} has no transformer blocks; there is nothing to probe")
    return blocks


def _modules_at(denoiser: Any, pattern: str, family: str) -> list[tuple[str, Any]]:
    """(path, module) of all modules that a BlockList's path names, in the model's order."""
    modules = [("", denoiser)]
    names = pattern.split(".")
    for depth, name in enumerate(names):
        modules = [
            (f"{path}.{child}" if path else child, below)
            for path, module in modules
            for child, below in named_children(module)
            if name in ("*", child)
        ]
        if not modules and "*" not in names[: depth + 1]:
            raise ModelError(
                f"{type(denoiser).__name__} has no {name!r}; the layer probe expects {pattern} in family {family!r}"
            )
    return modules


def stream_blocks(blocks: Sequence[Block]) -> dict[str, tuple[str, ...]]:
    """For each stream the paths of the blocks that update it, in order; the image stream first, the text last."""
    paths: dict[str, list[str]] = {}
    for block in blocks:
        for seam in block.seams:
            paths.setdefault(seam.stream, []).append(block.path)
    order = sorted(paths, key=lambda name: (name != "image", name == "text", name))
    return {stream: tuple(paths[stream]) for stream in order}


# Parameters that carry the image stream in the blocks of the families in the table, most common first.
IMAGE_PARAMETERS = ("hidden_states", "image_tokens", "img_hidden_states", "visual_embed", "x", "img")


def discover(denoiser: Any, name: str) -> Family:
    """A guess at the entry of a family that the table does not have: behind `layerprobe_discover` only.

    The blocks are the lists (`ModuleList`s at any depth, not inside another block) of two or more modules of one class
    whose forward has a parameter of IMAGE_PARAMETERS. Only that stream is recorded: a text stream is not looked for,
    and the text of a joint sequence counts as image. Raises ModelError if nothing fits.
    """
    lists: list[BlockList] = []
    for path, parameter in _lists_of_blocks(denoiser):
        if not any(path.startswith(entry.path.removesuffix("*")) for entry in lists):
            lists.append(BlockList(f"{path}.*", (StreamSeam("image", parameter, SAME_SHAPE),)))
    if not lists:
        raise ModelError(
            f"{type(unwrapped(denoiser)).__name__} of model family {name!r} has no list of modules that look like "
            f"transformer blocks; the layer probe cannot probe it"
        )
    targets = tuple(Target(entry.path, ("*",), ()) for entry in lists)
    return Family(name=name, blocks=tuple(lists), targets=targets, text="unknown")


def _lists_of_blocks(denoiser: Any) -> Iterator[tuple[str, str]]:
    """Path of every list of modules that could be blocks, and the parameter with their image stream."""
    for path, module in named_modules(denoiser):
        kinds = [type(child) for _, child in named_children(module)]
        if not type(module).__name__.endswith("ModuleList") or len(kinds) < 2 or len(set(kinds)) > 1:
            continue
        parameters = inspect.signature(kinds[0].forward).parameters
        names = [name for name in IMAGE_PARAMETERS if name in parameters]
        if names:
            yield path, names[0]
