"""What the probe knows of each SimpleTuner model family: data, no branches.

Both halves read this table: the training process to find the blocks and their streams, the post-processor
to know which modules a weighted config covers. It imports neither torch nor SimpleTuner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simpletuner_layerprobe import ProbeError


@dataclass(frozen=True)
class StreamSeam:
    """Where one stream goes into a block and comes out of it.

    argument: the parameter of the block's call that carries the state before the block.
    result: its position in the tuple that the call returns; None if the call returns the state itself.
    tokens: the rule in record/tokens.py that says which tokens of that state belong to the stream.
    unless: an attribute of the block; where it is true, the block does not update this stream.
    """

    stream: str
    argument: str
    result: int | None = None
    tokens: str = "all_tokens"
    unless: str = ""


@dataclass(frozen=True)
class BlockList:
    """Blocks of the denoiser, and the streams that each of them updates.

    path: the blocks' module paths; `*` stands for every child, in order ("transformer_blocks.*").
    call: empty if the blocks are called as modules, so that forward hooks fire; else what SimpleTuner calls instead:
    ".method" of the block, or "package.module:function" with the block as its first argument.
    layout: the dimensions of the states, a key of record/tokens.py's LAYOUTS.
    only: class names; blocks of other classes at that path are left out. Empty: all.
    """

    path: str
    streams: tuple[StreamSeam, ...]
    call: str = ""
    layout: str = "BSD"
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """The modules of one block list that a weighted LoKr config covers, in two levels.

    blocks: the path of a BlockList. `at_factor` and `at_double` are fnmatch patterns relative to one block (`ff*` under
    `transformer_blocks.7` is `transformer_blocks.7.ff*`). The first pattern that matches a module decides,
    `at_factor` before `at_double`: feed-forward and modulation get the block's factor, attention twice the
    factor, as in the article.
    """

    blocks: str
    at_factor: tuple[str, ...]
    at_double: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One SimpleTuner `model_family`, or those of its flavours that share a denoiser class.

    noise: the rule in record/noise.py for the sigma of a prepared batch and for drawing it.
    text: where the text is. "stream": the blocks update it. "cross": it only conditions the image stream (its weight
    in a plan is 0). "none": there is none.
    forwards: "one" forward of the denoiser per step; "per sample": one for each sample of the batch, in order.
    root: module path, inside SimpleTuner's trained component, of the module that is called; empty: the component.
    denoisers: class names of the denoisers that this entry is for; empty: all of the family.
    """

    name: str
    blocks: tuple[BlockList, ...]
    targets: tuple[Target, ...]
    noise: str = "flow"
    text: str = "stream"
    forwards: str = "one"
    root: str = ""
    denoisers: tuple[str, ...] = ()


# Double-stream blocks with diffusers' parameter names that return (text, image).
TEXT_IMAGE = (
    StreamSeam("image", "hidden_states", 1),
    StreamSeam("text", "encoder_hidden_states", 0, "text_alone", unless="context_pre_only"),
)
# Single-stream blocks over the joint sequence [text | image].
JOINT_TEXT_IMAGE = (
    StreamSeam("image", "hidden_states", None, "after_text"),
    StreamSeam("text", "hidden_states", None, "text_first"),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="sd3",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                TEXT_IMAGE,
                # SD3's forward calls the parts of a block and never the block itself.
                call="simpletuner.helpers.models.sd3.transformer:_sd3_apply_joint_transformer_block",
            ),
        ),
        targets=(Target("transformer_blocks.*", ("norm1*", "norm1_context*", "ff*"), ("*",)),),
    ),
    Family(
        name="flux",
        blocks=(
            BlockList("transformer_blocks.*", TEXT_IMAGE),
            BlockList("single_transformer_blocks.*", JOINT_TEXT_IMAGE),
        ),
        targets=(
            Target("transformer_blocks.*", ("norm1*", "norm1_context*", "ff*"), ("*",)),
            Target("single_transformer_blocks.*", ("norm*", "proj_mlp*", "proj_out*"), ("*",)),
        ),
    ),
    # <G1>
    # <G2>
    # <G3>
    # <G4>
    # <G5>
)

# Families that cannot be probed, and why.
REFUSED: dict[str, str] = {}


def family(name: str, denoiser: str = "") -> Family:
    """The table's entry for a SimpleTuner `model_family` and the class name of its denoiser ("" if not known yet).

    Raises ProbeError for a family that is not supported, with the reason if there is a known one.
    """
    entries = [entry for entry in FAMILIES if entry.name == name]
    for entry in entries:
        if not denoiser or not entry.denoisers or denoiser in entry.denoisers:
            return entry
    if entries:
        known = ", ".join(sorted(kind for entry in entries for kind in entry.denoisers))
        raise ProbeError(
            f"the denoiser {denoiser} of model family {name!r} is not supported; the layer probe knows: {known}"
        )
    if name in REFUSED:
        raise ProbeError(f"model family {name!r} cannot be probed: {REFUSED[name]}")
    known = ", ".join(sorted({entry.name for entry in FAMILIES}))
    raise ProbeError(f"model family {name!r} is not supported by the layer probe; it knows: {known}")


@dataclass(frozen=True)
class Block:
    """One block of a denoiser and the streams that it updates. module: a `torch.nn.Module`."""

    path: str
    module: Any
    entry: BlockList
    seams: tuple[StreamSeam, ...]


def find_blocks(denoiser: Any, family: Family) -> list[Block]:
    """The blocks of a denoiser (a `torch.nn.Module`) in the order of its family's table.

    Raises ProbeError if the denoiser lacks a block list of its family.
    """
    blocks = []
    for entry in family.blocks:
        for path, module in _modules_at(denoiser, entry.path, family.name):
            if not entry.only or type(module).__name__ in entry.only:
                seams = tuple(one for one in entry.streams if not (one.unless and getattr(module, one.unless, False)))
                blocks.append(Block(path, module, entry, seams))
    if not blocks:
        raise ProbeError(f"{type(denoiser).__name__} has no transformer blocks; there is nothing to probe")
    return blocks


def _modules_at(denoiser: Any, pattern: str, family: str) -> list[tuple[str, Any]]:
    found = [("", denoiser)]
    before_star = True
    for name in pattern.split("."):
        before_star = before_star and name != "*"
        # `_modules` and not iteration: SimpleTuner's DiffusionBlocks changes what a block list yields.
        children = [
            (f"{path}.{child}" if path else child, below)
            for path, module in found
            for child, below in module._modules.items()
            if below is not None and name in ("*", child)
        ]
        if before_star and not children:
            raise ProbeError(
                f"{type(denoiser).__name__} has no {name!r}; the layer probe expects {pattern} in family {family!r}"
            )
        found = children
    return found


def stream_blocks(blocks: list[Block]) -> dict[str, tuple[str, ...]]:
    """For each stream the paths of the blocks that update it, in order; the image stream first, the text last."""
    paths: dict[str, list[str]] = {}
    for block in blocks:
        for seam in block.seams:
            paths.setdefault(seam.stream, []).append(block.path)
    order = sorted(paths, key=lambda name: (name != "image", name == "text", name))
    return {stream: tuple(paths[stream]) for stream in order}


def lies_at(path: str, pattern: str) -> bool:
    """Whether a module path fits a BlockList's path, in which `*` stands for one name."""
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(one in ("*", name) for name, one in zip(names, wanted, strict=True))
