"""What the probe knows of each SimpleTuner model family: data, no branches.

Both halves read this table: the training process to find the blocks and their streams, the post-processor
to know which modules a weighted config covers. It imports neither torch nor SimpleTuner.
"""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner_layerprobe import ProbeError


@dataclass(frozen=True)
class StreamSeam:
    """Where one stream goes into a block and comes out of it.

    argument: the parameter of the block's call that carries the state before the block.
    result: its position in the tuple that the call returns; None if the call returns the state itself.
    part: which tokens of that tensor belong to the stream: "all", or the "text" or "image" part of a joint
    sequence [text | image] (its text length is `Family.text_argument`'s).
    unless: an attribute of the block; where it is true, the block does not update this stream.
    """

    stream: str
    argument: str
    result: int | None
    part: str = "all"
    unless: str = ""


@dataclass(frozen=True)
class BlockList:
    """A ModuleList of blocks at `path` in the denoiser, and the streams that each block updates.

    call: empty if the blocks are called as modules, so that forward hooks fire; else "package.module:function",
    the function that SimpleTuner calls with the block as its first argument instead.
    """

    path: str
    streams: tuple[StreamSeam, ...]
    call: str = ""


@dataclass(frozen=True)
class Target:
    """The modules of one block list that a weighted LoKr config covers, in two levels.

    `at_factor` and `at_double` are fnmatch patterns relative to one block (`ff*` under
    `transformer_blocks.7` is `transformer_blocks.7.ff*`). The first pattern that matches a module decides,
    `at_factor` before `at_double`: feed-forward and modulation get the block's factor, attention twice the
    factor, as in the article.
    """

    blocks: str
    at_factor: tuple[str, ...]
    at_double: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One SimpleTuner `model_family`.

    text_argument: the parameter of the denoiser's forward that carries the text, (B, S, D).
    """

    name: str
    blocks: tuple[BlockList, ...]
    text_argument: str
    targets: tuple[Target, ...]


# Double-stream blocks with diffusers' names that return (text, image).
DOUBLE_STREAMS = (
    StreamSeam("image", "hidden_states", 1),
    StreamSeam("text", "encoder_hidden_states", 0, unless="context_pre_only"),
)
# Single-stream blocks over the joint sequence [text | image].
JOINT_STREAMS = (
    StreamSeam("image", "hidden_states", None, part="image"),
    StreamSeam("text", "hidden_states", None, part="text"),
)

FAMILIES: dict[str, Family] = {
    entry.name: entry
    for entry in (
        Family(
            name="sd3",
            blocks=(
                BlockList(
                    "transformer_blocks",
                    DOUBLE_STREAMS,
                    # SD3's forward calls the parts of a block and never the block itself.
                    call="simpletuner.helpers.models.sd3.transformer:_sd3_apply_joint_transformer_block",
                ),
            ),
            text_argument="encoder_hidden_states",
            targets=(Target("transformer_blocks", ("norm1*", "norm1_context*", "ff*"), ("*",)),),
        ),
        Family(
            name="flux",
            blocks=(
                BlockList("transformer_blocks", DOUBLE_STREAMS),
                BlockList("single_transformer_blocks", JOINT_STREAMS),
            ),
            text_argument="encoder_hidden_states",
            targets=(
                Target("transformer_blocks", ("norm1*", "norm1_context*", "ff*"), ("*",)),
                Target("single_transformer_blocks", ("norm*", "proj_mlp*", "proj_out*"), ("*",)),
            ),
        ),
    )
}


def family(name: str) -> Family:
    """The table's entry for a SimpleTuner `model_family`. Raises ProbeError for one that is not supported."""
    try:
        return FAMILIES[name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ProbeError(f"model family {name!r} is not supported by the layer probe; it knows: {known}") from None
