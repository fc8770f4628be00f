"""The modules of a model in groups that share a factor: those of one kind in one block, and of one stream if asked.

Which block a module belongs to is asked in many places and answered in one, `owning_block`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import Adapter, planned_adapter

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module, Stream, Target

FEED_FORWARD, ATTENTION, MODULATION = "feed-forward", "attention", "modulation"
RATIOS = {FEED_FORWARD: 1, ATTENTION: 2, MODULATION: 1}
"""The kinds, and what the factor of a block is multiplied by for each: the article's."""
JOINT = "joint"
"""The contributions of all streams combined: those of the modules that work on all of them at once."""

NOT_ADAPTED = frozenset(
    {
        "CPUBouncingLinear",  # RamTorch
        "CPUBouncingFp8Linear",
        "Fp8NativeLinear",
        "SVDQW4A4Linear",  # Nunchaku
        "AWQW4A16Linear",
    }
)
"""Linear layers of SimpleTuner 4.10.1 and diffusers 0.42.1 that LyCORIS skips: no subclasses of torch's."""

LAYER_NORMS = frozenset(
    {
        "LayerNorm",
        "FP32LayerNorm",
        "LayerNorm_FP32",  # LongCat-Video
        "SDCascadeLayerNorm",
        "QLayerNorm",  # Quanto
    }
)
"""torch's LayerNorm and its subclasses in the denoisers of SimpleTuner 4.10.1: LyCORIS's train_norm takes them."""

_CONV = re.compile(r"Conv([123])d")
_MODULATION_WORDS = re.compile(r"norm|mod|adaln", re.IGNORECASE)
# Parts of module names that say which stream a module of a double-stream block works on.
_IMAGE_WORDS = frozenset({"img", "image", "i"})
_STREAM_WORDS = {
    "text": frozenset({"context", "txt", "text", "add", "added", "instruct", "t"}),
    "audio": frozenset({"audio"}),
}


class Model(Protocol):
    """What a plan needs to know of a model: a run's Manifest has it, and an Architecture."""

    @property
    def model_class(self) -> str: ...
    @property
    def streams(self) -> tuple[Stream, ...]: ...
    @property
    def targets(self) -> tuple[Target, ...]: ...
    @property
    def modules(self) -> tuple[Module, ...]: ...


@dataclass(frozen=True)
class Group:
    """The modules of one kind in one block, which share a factor.

    number: the block's, counted from 0. stream: whose contributions it goes by, JOINT for those of all streams
    combined. chain: what tells its monotone chain from others.
    """

    number: int
    block: str
    kind: str
    stream: str
    chain: tuple[str, str, str]
    modules: tuple[Module, ...]

    @property
    def size(self) -> int:
        """The weights of its modules."""
        return sum(prod(module.shape) for module in self.modules)

    def adapters(self, algo: str, number: int) -> tuple[Adapter, ...]:
        """What trains beside its modules at this factor or rank."""
        return tuple(planned_adapter(algo, module.shape, number) for module in self.modules)

    def parameters(self, algo: str, number: int) -> int:
        """Trainable numbers at this factor or rank."""
        return sum(adapter.parameters for adapter in self.adapters(algo, number))

    def first_alike(self, algo: str, numbers: Sequence[int]) -> NDArray[np.intp]:
        """For each of these factors or ranks, the place of the first one that trains the same."""
        trained = [[adapter.tensors for adapter in self.adapters(algo, number)] for number in numbers]
        return np.array([trained.index(tensors) for tensors in trained], dtype=np.intp)


def owning_block(name: str, blocks: Collection[str]) -> str | None:
    """The block that a module belongs to: the innermost of `blocks` around it, None if there is none."""
    parts = name.split(".")
    parents = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((path for path in parents if path in blocks), None)


def layer_kind(module: Module) -> str:
    """What LyCORIS sees in a module of the table: "linear", "conv", "norm", "weight" (of another kind), or "".

    Goes by the class name and the weight's shape, which is all that the table has: quantised linear layers
    are subclasses of torch's with "Linear" in their name, those that are not are listed in NOT_ADAPTED.
    Source: LyCORIS 4.1.3, modules/base.py, `is_supported_linear_module`.
    """
    conv = _CONV.search(module.type)
    if conv and "Transpose" not in module.type and len(module.shape) == 2 + int(conv.group(1)):
        return "conv"
    if "Linear" in module.type and module.type not in NOT_ADAPTED and len(module.shape) == 2:
        return "linear"
    if module.type in LAYER_NORMS or module.type == "GroupNorm":
        return "norm"
    return "weight" if module.shape else ""


def require_table(model: Model) -> None:
    """Raises ConfigError for a model without a module table."""
    if not model.modules:
        raise ConfigError(
            "there is no module table (the run was imported without --model), so nothing can be planned; "
            "import it again with --model"
        )


def module_groups(
    model: Model,
    blocks: Sequence[str],
    *,
    streams: Mapping[str, Sequence[str]] | None = None,
    freeze: Collection[int] = (),
    kinds: Collection[str] = ("linear", "conv"),
) -> tuple[Group, ...]:
    """The groups of a model, in the order of its blocks.

    blocks: block paths, in order; their targets say what is covered: a module that the first level matches is
    feed-forward, or modulation if the pattern says so (norm, mod, adaln), one that the second matches is attention.
    streams: None, or for each recorded stream the blocks that update it: then image and text modules of a block are
    groups of their own, told apart by their names. A block whose modules do not differ so goes by its only stream, or
    by JOINT. freeze: numbers of blocks to leave out. kinds: of layers that can be adapted. Raises ConfigError without
    a module table, for a block without a target or without modules, and if all blocks are frozen.
    """
    require_table(model)
    inside: dict[str, list[tuple[str, Module]]] = {block: [] for block in blocks}
    for module in model.modules:
        block = owning_block(module.name, inside)
        if block is not None and layer_kind(module) in kinds:
            inside[block].append((module.name[len(block) + 1 :], module))
    groups = []
    for number, block in enumerate(blocks):
        if number in freeze:
            continue
        target = target_of(block, model.targets)
        stream_of = _streams_of(block, [name for name, _ in inside[block]], streams)
        members: dict[tuple[str, str], list[Module]] = {}
        for name, module in inside[block]:
            kind = _kind(name, target)
            if kind:
                members.setdefault((kind, stream_of[name]), []).append(module)
        if not members:
            raise ConfigError(
                f"the module table has no {' or '.join(kinds)} layer that can be adapted in block {block!r}; "
                "the run and the model do not fit together"
            )
        order = list(RATIOS)
        for kind, stream in sorted(members, key=lambda key: (order.index(key[0]), key[1])):
            chain = (target.blocks, kind, stream)
            groups.append(Group(number, block, kind, stream, chain, tuple(members[kind, stream])))
    if not groups:
        raise ConfigError("all blocks are frozen, so nothing would train; leave at least one out of --freeze")
    return tuple(groups)


def target_of(block: str, targets: Sequence[Target]) -> Target:
    """The target whose block list a block lies in; "*" in its path stands for one name. Raises ConfigError."""
    names = block.split(".")
    for target in targets:
        wanted = target.blocks.split(".")
        if len(names) == len(wanted) and all(one in ("*", name) for name, one in zip(names, wanted, strict=True)):
            return target
    raise ConfigError(
        f"block {block!r} lies in none of the block lists that the config has rules for: "
        f"{', '.join(target.blocks for target in targets) or 'none'}"
    )


def _kind(name: str, target: Target) -> str:
    """The kind of a module by its name inside the block, "" if the target leaves it out."""
    for pattern in target.at_factor:
        if fnmatchcase(name, pattern):
            return MODULATION if _MODULATION_WORDS.search(pattern) else FEED_FORWARD
    return ATTENTION if any(fnmatchcase(name, pattern) for pattern in target.at_double) else ""


def _streams_of(block: str, names: Sequence[str], streams: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    """Whose contributions each module of a block goes by, by the module's name inside the block."""
    if streams is None:
        return dict.fromkeys(names, JOINT)
    said = {name: _named_stream(name, streams) for name in names}
    if any(stream != "image" for stream in said.values()):
        return said
    updated = [stream for stream, blocks in streams.items() if block in blocks]
    return dict.fromkeys(names, updated[0] if len(updated) == 1 else JOINT)


def _named_stream(name: str, streams: Mapping[str, Sequence[str]]) -> str:
    """The stream that a module's name tells of, the innermost part first; "image" if none does."""
    for part in reversed(name.split(".")):
        words = set(part.lower().split("_"))
        words |= {word.rstrip("0123456789") for word in words}
        told = [stream for stream, known in _STREAM_WORDS.items() if stream in streams and words & known]
        if words & _IMAGE_WORDS:
            if not told:
                return "image"
        elif told:
            return told[0]
    return "image"
