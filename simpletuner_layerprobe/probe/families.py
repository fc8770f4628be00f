"""What the probe knows of each SimpleTuner model family: data, no branches.

Both halves read this table: the training process to find the blocks and their streams, the post-processor
to know which modules a weighted config covers. It imports neither torch nor SimpleTuner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner_layerprobe.errors import ProbeError

SAME_SHAPE = -1


@dataclass(frozen=True)
class StreamSeam:
    """Where one stream goes into a block and comes out of it.

    argument: the parameter of the block's call that carries the state before the block.
    result: its position in the tuple that the call returns; None if the call returns the state itself; SAME_SHAPE
    for the one tensor among them that has the shape of the state before.
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
    in a plan is 0). "none": there is none. "unknown": a discovered family.
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
# The same where reference images may follow the noised tokens.
TEXT_NOISED = (StreamSeam("image", "hidden_states", 1, "packed_first"), TEXT_IMAGE[1])
JOINT_TEXT_NOISED = (StreamSeam("image", "hidden_states", None, "packed_after_prompt"), JOINT_TEXT_IMAGE[1])

# The attention layers of a diffusers U-Net in the order in which it runs them, and their transformer blocks.
UNET_ATTENTION_PATHS = tuple(f"{part}.attentions.*" for part in ("down_blocks.*", "mid_block", "up_blocks.*"))
UNET_PATHS = tuple(f"{path}.transformer_blocks.*" for path in UNET_ATTENTION_PATHS)
UNET_BLOCKS = tuple(BlockList(path, (StreamSeam("image", "hidden_states"),)) for path in UNET_PATHS)
UNET_TARGETS = tuple(Target(path, ("ff*",), ("*",)) for path in UNET_PATHS)

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
            BlockList("transformer_blocks.*", TEXT_NOISED),
            BlockList("single_transformer_blocks.*", JOINT_TEXT_NOISED),
        ),
        targets=(
            Target("transformer_blocks.*", ("norm1*", "norm1_context*", "ff*"), ("*",)),
            Target("single_transformer_blocks.*", ("norm*", "proj_mlp*", "proj_out*"), ("*",)),
        ),
    ),
    Family(
        name="chroma",
        blocks=(
            BlockList("transformer_blocks.*", TEXT_IMAGE),
            BlockList("single_transformer_blocks.*", JOINT_TEXT_IMAGE),
        ),
        # The modulation of all blocks comes from one approximator outside of them.
        targets=(
            Target("transformer_blocks.*", ("ff*",), ("*",)),
            Target("single_transformer_blocks.*", ("proj_mlp*", "proj_out*"), ("*",)),
        ),
        noise="flow_mapped",
    ),
    Family(
        name="auraflow",
        blocks=(
            BlockList(
                "joint_transformer_blocks.*",
                (TEXT_IMAGE[0], StreamSeam("text", "encoder_hidden_states", 0, "caption_last")),
            ),
            BlockList(
                "single_transformer_blocks.*",
                (JOINT_TEXT_IMAGE[0], StreamSeam("text", "hidden_states", None, "caption_before_image")),
            ),
        ),
        targets=(
            Target("joint_transformer_blocks.*", ("norm1*", "ff*"), ("*",)),
            Target("single_transformer_blocks.*", ("norm1*", "ff*"), ("*",)),
        ),
    ),
    Family(
        name="flux2",
        blocks=(
            BlockList("transformer_blocks.*", TEXT_NOISED),
            BlockList("single_transformer_blocks.*", JOINT_TEXT_NOISED),
        ),
        # The modulation is shared by all blocks and outside of them. The attention of a single block has the
        # feed-forward in the same two projections.
        targets=(
            Target("transformer_blocks.*", ("ff*",), ("*",)),
            Target("single_transformer_blocks.*", ("attn*",), ()),
        ),
    ),
    Family(
        name="longcat_image",
        blocks=(
            # Both kinds of blocks are run by functions of the family, with the streams apart.
            BlockList(
                "transformer_blocks.*",
                TEXT_NOISED,
                call="simpletuner.helpers.models.longcat_image.transformer:_run_longcat_transformer_block",
            ),
            BlockList(
                "single_transformer_blocks.*",
                TEXT_NOISED,
                call="simpletuner.helpers.models.longcat_image.transformer:_run_longcat_single_transformer_block",
            ),
        ),
        targets=(
            Target("transformer_blocks.*", ("norm1*", "ff*"), ("*",)),
            Target("single_transformer_blocks.*", ("norm*", "proj_mlp*", "proj_out*"), ("*",)),
        ),
    ),
    Family(
        name="flux3_image",
        blocks=(
            # The streams meet in the single blocks only. References have blocks of their own, which are not probed.
            BlockList("mode_blocks.image.*", (StreamSeam("image", "hidden_states"),)),
            BlockList("txt_mode_blocks.*", (StreamSeam("text", "hidden_states", None, "text_alone"),)),
            BlockList(
                "single_transformer_blocks.*",
                (StreamSeam("image", "hidden_states", None, "image_after_text"), JOINT_TEXT_IMAGE[1]),
            ),
        ),
        targets=(
            Target("mode_blocks.image.*", ("ff*",), ("*",)),
            Target("txt_mode_blocks.*", ("ff*",), ("*",)),
            Target("single_transformer_blocks.*", ("ff*",), ("*",)),
        ),
    ),
    Family(
        name="hidream",
        blocks=(
            BlockList(
                "double_stream_blocks.*",
                (
                    StreamSeam("image", "image_tokens", 0, "unpadded_first"),
                    StreamSeam("text", "text_tokens", 1, "kept_text"),
                ),
            ),
            BlockList(
                "single_stream_blocks.*",
                (
                    StreamSeam("image", "image_tokens", None, "unpadded_first"),
                    StreamSeam("text", "image_tokens", None, "kept_text_after_image"),
                ),
            ),
        ),
        targets=(
            Target("double_stream_blocks.*", ("block.adaLN_modulation*", "block.ff_i*", "block.ff_t*"), ("*",)),
            Target("single_stream_blocks.*", ("block.adaLN_modulation*", "block.ff_i*"), ("*",)),
        ),
    ),
    Family(
        name="hunyuanvideo",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", 0),
                    StreamSeam("text", "encoder_hidden_states", 1, "attended_after_embeds"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("norm1*", "ff*"), ("*",)),),
    ),
    Family(
        name="mageflow",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", 1, "packed_row_noised"),
                    StreamSeam("text", "encoder_hidden_states", 0, "packed_row_text"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("img_mod*", "txt_mod*", "img_mlp*", "txt_mlp*"), ("*",)),),
    ),
    Family(
        name="boogu_image",
        blocks=(
            BlockList(
                "double_stream_layers.*",
                (
                    StreamSeam("image", "img_hidden_states", 0, "noised_last"),
                    StreamSeam("text", "instruct_hidden_states", 1, "own_prompt_first"),
                ),
            ),
            BlockList(
                "single_stream_layers.*",
                (
                    StreamSeam("image", "hidden_states", None, "noised_last_after_prompt"),
                    StreamSeam("text", "hidden_states", None, "own_prompt_first"),
                ),
            ),
        ),
        targets=(
            Target("double_stream_layers.*", ("img_norm*", "instruct_norm*", "*feed_forward*"), ("*",)),
            Target("single_stream_layers.*", ("norm1*", "feed_forward*"), ("*",)),
        ),
        noise="flow_in_clean",
    ),
    Family(
        name="qwen_image",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                # The edit flavours put reference images behind the noised latents.
                (
                    StreamSeam("image", "hidden_states", 1, "packed_first"),
                    StreamSeam("text", "encoder_hidden_states", 0, "prompt_alone"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("img_mod*", "img_mlp*", "txt_mod*", "txt_mlp*"), ("*",)),),
        denoisers=("QwenImageTransformer2DModel",),
    ),
    Family(
        name="qwen_image",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", None, "packed_after_prompt"),
                    StreamSeam("text", "hidden_states", None, "prompt_first"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("img_mlp*",), ("*",)),),
        denoisers=("QwenImage21Transformer2DModel",),
    ),
    Family(
        name="z_image",
        blocks=(
            BlockList(
                "layers.*",
                (
                    StreamSeam("image", "x", None, "own_grid_first"),
                    StreamSeam("text", "x", None, "text_after_own_grid"),
                ),
            ),
        ),
        targets=(Target("layers.*", ("adaLN_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="z_image_omni",
        blocks=(
            BlockList(
                "layers.*",
                (
                    StreamSeam("image", "x", None, "grid_after_own_references"),
                    StreamSeam("text", "x", None, "own_texts_first"),
                ),
            ),
        ),
        targets=(Target("layers.*", ("adaLN_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="lumina2",
        blocks=(
            BlockList(
                "layers.*",
                (
                    StreamSeam("image", "hidden_states", None, "after_own_text"),
                    StreamSeam("text", "hidden_states", None, "own_text_first"),
                ),
            ),
        ),
        targets=(Target("layers.*", ("norm1*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="krea2",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", None, "packed_after_prompt"),
                    StreamSeam("text", "hidden_states", None, "prompt_first"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
    ),
    Family(
        name="ernie",
        blocks=(
            BlockList(
                "layers.*",
                (StreamSeam("image", "x", None, "before_cut_text"), StreamSeam("text", "x", None, "cut_text_last")),
                layout="SBD",
            ),
        ),
        targets=(Target("layers.*", ("mlp*",), ("*",)),),
    ),
    Family(
        name="moss_image",
        blocks=(
            BlockList(
                "layers.*",
                (StreamSeam("image", "x", None, "grid_first"), StreamSeam("text", "x", None, "prompt_after_grid")),
            ),
        ),
        targets=(Target("layers.*", ("proj.ffn*",), ("*",)),),
    ),
    Family(
        name="omnigen",
        blocks=(
            BlockList(
                "layers.*",
                (
                    StreamSeam("image", "hidden_states", None, "after_ids_and_time"),
                    StreamSeam("text", "hidden_states", None, "ids_first"),
                ),
            ),
        ),
        targets=(Target("layers.*", ("mlp*",), ("*",)),),
        noise="flow_clean_ward",
    ),
    Family(
        name="ideogram",
        blocks=(
            BlockList(
                "layers.*",
                (StreamSeam("image", "x", None, "after_prompt"), StreamSeam("text", "x", None, "prompt_first")),
            ),
        ),
        targets=(Target("layers.*", ("adaln_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="cosmos",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("transformer_blocks.*", ("norm*", "ff*"), ("*",)),),
        noise="edm",
        text="cross",
    ),
    Family(
        name="anima",
        blocks=(BlockList("core.transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("core.transformer_blocks.*", ("norm*", "ff*"), ("*",)),),
        noise="flow_in_sigmas",
        text="cross",
    ),
    Family(
        name="zlab_i1",
        blocks=tuple(
            BlockList(
                path,
                (StreamSeam("image", "image_tokens", 0), StreamSeam("text", "text_tokens", 1, "valid_text")),
            )
            for path in ("in_blocks.*", "mid_block", "out_blocks.*")
        ),
        targets=(
            Target("in_blocks.*", ("mlp_*",), ("*",)),
            Target("mid_block", ("mlp_*",), ("*",)),
            # The projections that take in the long skip mix no tokens: they count as feed-forward.
            Target("out_blocks.*", ("mlp_*", "skip_linear_*"), ("*",)),
        ),
    ),
    Family(
        # The v1.5 flavours run a decoder from code that comes with their weights: its blocks are not known here.
        name="ace_step",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states", tokens="attended"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
        denoisers=("ACEStepTransformer2DModel",),
    ),
    Family(
        # The text reaches the blocks as channels of the latents. The language model that can be trained in place of the
        # transformer (minimax_music_train_component) is another class and has no noise level.
        name="minimaxmusic",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states", tokens="after_time_token"),)),),
        targets=(Target("transformer_blocks.*", ("ff_*",), ("*",)),),
        noise="flow_in_clean",
        text="none",
        denoisers=("MiniMaxMusic3Transformer1DModel",),
    ),
    Family(
        # The text takes part as keys and values that a frozen language model has made. Sound tokens are not recorded.
        name="cosmos3",
        blocks=(
            BlockList(
                "layers.*",
                (StreamSeam("image", "gen_seq", tokens="vision_predicted"),),
                # In training the layers are never called, only this part of them.
                call=".forward_gen_only",
                layout="SD",
            ),
        ),
        targets=(Target("layers.*", ("mlp_moe_gen*",), ("self_attn.*add_*",)),),
        noise="flow_in_clean_steps",
        text="cross",
        forwards="per sample",
    ),
    Family(
        # One sequence of text, given frames, sound and noised frames. Sound tokens are not recorded.
        name="minimaxh3",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", tokens="packed_video"),
                    StreamSeam("text", "hidden_states", tokens="packed_text"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("adaln_proj*", "ff*"), ("*",)),),
        noise="flow_in_clean",
    ),
    Family(
        name="wan",
        # The text conditions the blocks by cross attention. Wan 2.2 TI2V gives the first frame clean, at timestep 0.
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states", None, "noised_tokens"),)),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="ltxvideo",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
    ),
    # The visual blocks cross-attend to the text, which a tower of blocks of its own (text_transformer_blocks) made
    # before them. These blocks never meet the image, so they are no stream of the denoiser and are not recorded.
    *(
        Family(
            name=name,
            blocks=(BlockList("visual_transformer_blocks.*", (StreamSeam("image", "visual_embed"),)),),
            targets=(Target("visual_transformer_blocks.*", ("visual_modulation*", "feed_forward*"), ("*",)),),
            text="cross",
        )
        for name in ("kandinsky5_image", "kandinsky5_video")
    ),
    Family(
        name="longcat_video",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "x", None, "after_condition_frames"),)),),
        targets=(Target("blocks.*", ("adaLN_modulation*", "ffn*"), ("*",)),),
        text="cross",
    ),
    Family(
        name="wan_s2v",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states", None, "before_reference_frames"),)),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="infinitetalk",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="ltxvideo2",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", 0, "noised_tokens_of_video"),
                    StreamSeam("audio", "audio_hidden_states", 1, "tokens_of_audio"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("ff*", "audio_ff*"), ("*",)),),
        text="cross",
    ),
    Family(name="sd1x", blocks=UNET_BLOCKS, targets=UNET_TARGETS, noise="ddpm", text="cross"),
    Family(name="sdxl", blocks=UNET_BLOCKS, targets=UNET_TARGETS, noise="ddpm", text="cross"),
    Family(name="kolors", blocks=UNET_BLOCKS, targets=UNET_TARGETS, noise="ddpm", text="cross"),
    Family(
        name="pixart",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        noise="ddpm",
        text="cross",
    ),
    Family(
        name="sana",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="sanavideo",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
    ),
    # Its blocks are attention alone, on convolutional states.
    Family(
        name="deepfloyd",
        blocks=tuple(
            BlockList(path, (StreamSeam("image", "hidden_states"),), layout="BDHW") for path in UNET_ATTENTION_PATHS
        ),
        targets=tuple(Target(path, (), ("*",)) for path in UNET_ATTENTION_PATHS),
        noise="ddpm",
        text="cross",
    ),
    # Residual (convolution), timestep and attention blocks take turns in its lists.
    Family(
        name="stable_cascade",
        blocks=tuple(
            BlockList(path, (StreamSeam("image", "x"),), layout="BDHW", only=("SDCascadeAttnBlock",))
            for path in ("down_blocks.*.*", "up_blocks.*.*")
        ),
        targets=tuple(Target(path, (), ("*",)) for path in ("down_blocks.*.*", "up_blocks.*.*")),
        noise="ddpm",
        text="cross",
    ),
)

# Families that cannot be probed, and why.
REFUSED: dict[str, str] = {
    "heartmula": "it predicts tokens one after the other and has no noise level, so there is no sigma to sort by",
}


def family(name: str, denoiser: str = "") -> Family:
    """The table's entry for a SimpleTuner `model_family` and the class name of its denoiser ("" if not known yet).

    Raises ProbeError for a family that is not supported, with the reason if there is a known one.
    """
    if name in REFUSED:
        raise ProbeError(f"model family {name!r} cannot be probed: {REFUSED[name]}")
    entries = [entry for entry in FAMILIES if entry.name == name]
    for entry in entries:
        if not denoiser or not entry.denoisers or denoiser in entry.denoisers:
            return entry
    if entries:
        known = ", ".join(sorted(kind for entry in entries for kind in entry.denoisers))
        raise ProbeError(
            f"the denoiser {denoiser} of model family {name!r} is not supported by the layer probe; it knows: {known}"
        )
    known = ", ".join(sorted({entry.name for entry in FAMILIES}))
    raise ProbeError(
        f"model family {name!r} is not supported by the layer probe; it knows: {known}. "
        f"layerprobe_discover lets it guess where the blocks are"
    )


def is_known(name: str) -> bool:
    """Whether the table says something of this `model_family`: how to probe it, or why not."""
    return name in REFUSED or any(entry.name == name for entry in FAMILIES)


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


# Parameters that carry the image stream in the blocks of the families above, most common first.
IMAGE_PARAMETERS = ("hidden_states", "image_tokens", "img_hidden_states", "visual_embed", "x", "img")


def discover(denoiser: Any, name: str, parameters_of: Callable[[Any], Sequence[str]]) -> Family:
    """A guess at the entry of a family that the table does not have: behind `layerprobe_discover` only.

    The blocks are the lists (`ModuleList`s at any depth, not inside another block) of two or more modules of one class
    whose forward has a parameter of IMAGE_PARAMETERS. Only that stream is recorded: a text stream is not looked for,
    and the text of a joint sequence counts as image. parameters_of: the parameter names of a module's forward.
    Raises ProbeError if nothing fits.
    """
    found: list[BlockList] = []
    for path, module in denoiser.named_modules():
        children = list(module._modules.values())
        if not type(module).__name__.endswith("ModuleList") or len(children) < 2:
            continue
        if len({type(child) for child in children}) > 1:
            continue
        if any(path.startswith(entry.path.removesuffix("*")) for entry in found):
            continue
        parameters = parameters_of(children[0])
        image = next((one for one in IMAGE_PARAMETERS if one in parameters), None)
        if image is not None:
            found.append(BlockList(f"{path}.*", (StreamSeam("image", image, SAME_SHAPE),)))
    if not found:
        raise ProbeError(
            f"no list of transformer blocks was found in {type(denoiser).__name__} of model family {name!r}; "
            f"the layer probe cannot probe it"
        )
    targets = tuple(Target(entry.path, ("*",), ()) for entry in found)
    return Family(name=name, blocks=tuple(found), targets=targets, text="unknown")
