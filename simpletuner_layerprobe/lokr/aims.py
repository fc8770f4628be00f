"""What a LyCORIS config can aim at in a model: class names and name patterns, and how much each has.

target_module and module_algo_map take class names: a class stands for every layer in a module of it. target_name and
name_algo_map take patterns of names; these are for "use_fnmatch": true, whose * takes dots as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from simpletuner_layerprobe.lokr.groups import Model, layer_kind

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module

LONGEST = 50  # characters of a pattern that stays whole


@dataclass(frozen=True)
class Aim:
    """A class name or a name pattern. modules: the layers that LyCORIS adapts by it; weights: the numbers in them."""

    text: str
    modules: int
    weights: int


def classes(model: Model) -> tuple[Aim, ...]:
    """The class names, the model's own and those of the layers too, in the order of the model."""
    kinds = {"": model.model_class} | {module.name: module.type for module in model.modules}
    inside: dict[str, list[Module]] = {kind: [] for kind in kinds.values() if kind}
    for layer in _layers(model):
        for kind in {kinds.get(path, "") for path in _around(layer.name)} - {""}:
            inside[kind].append(layer)
    return tuple(_aim(kind, layers) for kind, layers in inside.items() if layers)


def names(model: Model) -> tuple[Aim, ...]:
    """A pattern for every kind of layer by its name: those that differ in the number of a block share one."""
    layers = _layers(model)
    lists = _lists(model)
    patterns = dict.fromkeys(_starred(layer.name, lists) for layer in layers)
    matched = {_shorter(pattern, layers): _matching(pattern, layers) for pattern in patterns}
    return tuple(_aim(pattern, found) for pattern, found in matched.items())


def _layers(model: Model) -> list[Module]:
    return [module for module in model.modules if layer_kind(module) in ("linear", "conv")]


def _aim(text: str, layers: Iterable[Module]) -> Aim:
    sizes = [prod(layer.shape) for layer in layers]
    return Aim(text, len(sizes), sum(sizes))


def _around(name: str) -> list[str]:
    """The paths of a module, of those around it, and of the whole model ("")."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _lists(model: Model) -> set[str]:
    """The paths of lists of blocks: those at the top, those of one class, and those in which a few take turns."""
    kinds: dict[str, list[str]] = {}
    for module in model.modules:
        parent, _, child = module.name.rpartition(".")
        if child.isdigit():
            kinds.setdefault(parent, []).append(module.type)
    of_blocks = {path for path, found in kinds.items() if len(set(found)) == 1 or len(found) > 2 * len(set(found))}
    return of_blocks | {path for path in kinds if "." not in path}


def _starred(name: str, lists: set[str]) -> str:
    """A name with * for the numbers in lists."""
    parts = name.split(".")
    return ".".join(
        "*" if part.isdigit() and ".".join(parts[:place]) in lists else part for place, part in enumerate(parts)
    )


def _matching(pattern: str, layers: Iterable[Module]) -> list[Module]:
    return [layer for layer in layers if fnmatchcase(layer.name, pattern)]


def _shorter(pattern: str, layers: Sequence[Module]) -> str:
    """A long pattern with one * for what is between its first and its last, or for more; if that matches the same."""
    if len(pattern) <= LONGEST:
        return pattern
    parts, wanted = pattern.split("."), _matching(pattern, layers)
    first, last = pattern.partition("*")[0], pattern.rpartition("*")[2]
    tails = [".".join(parts[start:]) for start in range(1, len(parts))]
    heads = (f"{head}*.{tail}" for tail in tails for head in ("", f"{parts[0]}."))
    for shorter in (f"{first}*{last}", *heads) if "*" in pattern else heads:
        if len(shorter) <= LONGEST and _matching(shorter, layers) == wanted:
            return shorter
    return pattern
