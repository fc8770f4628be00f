"""What the probe knows of each model family: data, no branches. It imports neither torch nor SimpleTuner.

FAMILIES has SimpleTuner's families, DIFFUSERS diffusers' own classes. A new family is one entry: its block lists, the
streams that each block updates, the rule for their tokens, and what a weighted config covers.
"""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner_layerprobe.errors import ModelError

SAME_SHAPE = -1


@dataclass(frozen=True)
class StreamSeam:
    """Where one stream goes into a block and comes out of it.

    argument: the parameter of the block's call that carries the state before the block.
    result: its position in the tuple that the call returns; None if the call returns the state itself; SAME_SHAPE
    for the one tensor among them that has the shape of the state before.
    tokens: the rule in tokens.py that says which tokens of that state belong to the stream.
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
    call: empty if the blocks are called as modules, so that forward hooks fire; else what is called instead:
    ".method" of the block, or "package.module:function" with the block as its first argument.
    layout: the dimensions of the states, a key of tokens.py's LAYOUTS.
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
    """One SimpleTuner `model_family`, or those of its flavours that share a denoiser class; or a class of diffusers.

    source: where SimpleTuner has the denoiser's class, "folder.module:Class" below simpletuner.helpers.models; ""
    for a class of diffusers.
    noise: the rule in training/noise.py for the sigma of a prepared batch and for drawing it.
    text: where the text is. "stream": the blocks update it. "cross": it only conditions the image stream (its weight
    in a plan is 0). "none": there is none. "unknown": a discovered family.
    forwards: "one" forward of the denoiser per step; "per sample": one for each sample of the batch, in order.
    denoisers: class names of the denoisers that this entry is for; empty: all of the family.
    text_mask: the parameter of the forward that has the mask of the valid text tokens; empty: a training batch has it.
    target: the rule in training/losses.py for what the model should predict.
    """

    name: str
    blocks: tuple[BlockList, ...]
    targets: tuple[Target, ...] = ()
    source: str = ""
    noise: str = "flow"
    text: str = "stream"
    forwards: str = "one"
    denoisers: tuple[str, ...] = ()
    text_mask: str = ""
    target: str = "prediction"


# The image stream alone, in and out as it is.
IMAGE = (StreamSeam("image", "hidden_states"),)
# Double-stream blocks with diffusers' parameter names that return (text, image).
TEXT_IMAGE = (
    StreamSeam("image", "hidden_states", 1),
    StreamSeam("text", "encoder_hidden_states", 0, "text_alone", unless="context_pre_only"),
)
# Single-stream blocks over the joint sequence [text | image].
JOINT_TEXT_IMAGE = (
    StreamSeam("image", "hidden_states", None, "image_after_text"),
    StreamSeam("text", "hidden_states", None, "text_first"),
)
# The same where reference images may follow the noised tokens.
TEXT_NOISED = (StreamSeam("image", "hidden_states", 1, "packed_first"), TEXT_IMAGE[1])
JOINT_TEXT_NOISED = (StreamSeam("image", "hidden_states", None, "packed_after_prompt"), JOINT_TEXT_IMAGE[1])


def joint(argument: str, image: str, text: str) -> tuple[StreamSeam, StreamSeam]:
    """Both streams in one state of the block, told apart by these two rules."""
    return StreamSeam("image", argument, None, image), StreamSeam("text", argument, None, text)


# The attention layers of a diffusers U-Net in the order in which it runs them, and their transformer blocks.
UNET_ATTENTION_PATHS = tuple(f"{part}.attentions.*" for part in ("down_blocks.*", "mid_block", "up_blocks.*"))
UNET_PATHS = tuple(f"{path}.transformer_blocks.*" for path in UNET_ATTENTION_PATHS)
UNET_BLOCKS = tuple(BlockList(path, IMAGE) for path in UNET_PATHS)
UNET = "unet_flowmap:FlowMapUNet2DConditionModel"
UNET_TARGETS = tuple(Target(path, ("ff*",), ("*",)) for path in UNET_PATHS)

# Stable Cascade's blocks of all kinds: those of attention are among them.
CASCADE_PATHS = ("down_blocks.*.*", "up_blocks.*.*")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="sd3",
        source="sd3.transformer:SD3Transformer2DModel",
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
        source="flux.transformer:FluxTransformer2DModel",
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
        source="chroma.transformer:ChromaTransformer2DModel",
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
        source="auraflow.transformer:AuraFlowTransformer2DModel",
        blocks=(
            BlockList(
                "joint_transformer_blocks.*",
                (TEXT_IMAGE[0], StreamSeam("text", "encoder_hidden_states", 0, "caption_last")),
            ),
            BlockList(
                "single_transformer_blocks.*", joint("hidden_states", "image_after_text", "caption_before_image")
            ),
        ),
        targets=(
            Target("joint_transformer_blocks.*", ("norm1*", "ff*"), ("*",)),
            Target("single_transformer_blocks.*", ("norm1*", "ff*"), ("*",)),
        ),
    ),
    Family(
        name="flux2",
        source="flux2.transformer:Flux2Transformer2DModel",
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
        source="longcat_image.transformer:LongCatImageTransformer2DModel",
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
        source="flux3_image.transformer:Flux3ImageTransformer2DModel",
        blocks=(
            # The streams meet in the single blocks only. References have blocks of their own, which are not probed.
            BlockList("mode_blocks.image.*", IMAGE),
            BlockList("txt_mode_blocks.*", (StreamSeam("text", "hidden_states", None, "text_alone"),)),
            BlockList("single_transformer_blocks.*", JOINT_TEXT_IMAGE),
        ),
        targets=(
            Target("mode_blocks.image.*", ("ff*",), ("*",)),
            Target("txt_mode_blocks.*", ("ff*",), ("*",)),
            Target("single_transformer_blocks.*", ("ff*",), ("*",)),
        ),
    ),
    Family(
        name="hidream",
        source="hidream.transformer:HiDreamImageTransformer2DModel",
        blocks=(
            BlockList(
                "double_stream_blocks.*",
                (
                    StreamSeam("image", "image_tokens", 0, "unpadded_first"),
                    StreamSeam("text", "text_tokens", 1, "kept_text"),
                ),
            ),
            BlockList(
                "single_stream_blocks.*", joint("image_tokens", image="unpadded_first", text="kept_text_after_image")
            ),
        ),
        targets=(
            Target("double_stream_blocks.*", ("block.adaLN_modulation*", "block.ff_i*", "block.ff_t*"), ("*",)),
            Target("single_stream_blocks.*", ("block.adaLN_modulation*", "block.ff_i*"), ("*",)),
        ),
    ),
    Family(
        name="hunyuanvideo",
        source="hunyuanvideo.transformer:HunyuanVideo15Transformer3DModel",
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
        source="mageflow.transformer:MageFlowTransformer2DModel",
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
        source="boogu_image.transformer:BooguImageTransformer2DModel",
        blocks=(
            BlockList(
                "double_stream_layers.*",
                (
                    StreamSeam("image", "img_hidden_states", 0, "noised_last"),
                    StreamSeam("text", "instruct_hidden_states", 1, "own_prompt_first"),
                ),
            ),
            BlockList(
                "single_stream_layers.*", joint("hidden_states", "noised_last_after_prompt", text="own_prompt_first")
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
        source="qwen_image.transformer:QwenImageTransformer2DModel",
        # The edit flavours put reference images behind the noised latents.
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (
                    StreamSeam("image", "hidden_states", 1, "packed_first"),
                    StreamSeam("text", "encoder_hidden_states", 0, "valid_text"),
                ),
            ),
        ),
        targets=(Target("transformer_blocks.*", ("img_mod*", "img_mlp*", "txt_mod*", "txt_mlp*"), ("*",)),),
        denoisers=("QwenImageTransformer2DModel",),
    ),
    Family(
        name="qwen_image",
        source="qwen_image.transformer_21:QwenImage21Transformer2DModel",
        blocks=(BlockList("transformer_blocks.*", joint("hidden_states", "packed_after_prompt", "prompt_first")),),
        targets=(Target("transformer_blocks.*", ("img_mlp*",), ("*",)),),
        denoisers=("QwenImage21Transformer2DModel",),
    ),
    Family(
        name="z_image",
        source="z_image.transformer:ZImageTransformer2DModel",
        blocks=(BlockList("layers.*", joint("x", "own_grid_first", "text_after_own_grid")),),
        targets=(Target("layers.*", ("adaLN_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="z_image_omni",
        source="z_image_omni.transformer:ZImageOmniTransformer2DModel",
        blocks=(BlockList("layers.*", joint("x", "grid_after_own_references", "own_texts_first")),),
        targets=(Target("layers.*", ("adaLN_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="lumina2",
        source="lumina2.transformer:Lumina2Transformer2DModel",
        blocks=(BlockList("layers.*", joint("hidden_states", "after_own_text", "own_text_first")),),
        targets=(Target("layers.*", ("norm1*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="krea2",
        source="krea2.transformer:Krea2Transformer2DModel",
        blocks=(BlockList("transformer_blocks.*", joint("hidden_states", "packed_after_prompt", "prompt_first")),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
    ),
    Family(
        name="ernie",
        source="ernie.transformer:ErnieImageTransformer2DModel",
        blocks=(BlockList("layers.*", joint("x", "before_cut_text", "cut_text_last"), layout="SBD"),),
        targets=(Target("layers.*", ("mlp*",), ("*",)),),
    ),
    Family(
        name="moss_image",
        source="moss_image.transformer:MOSSImageTransformer",
        blocks=(BlockList("layers.*", joint("x", "grid_first", "prompt_after_grid")),),
        targets=(Target("layers.*", ("proj.ffn*",), ("*",)),),
    ),
    Family(
        name="omnigen",
        source="omnigen.transformer:OmniGenTransformer2DModel",
        blocks=(BlockList("layers.*", joint("hidden_states", "after_ids_and_time", "ids_first")),),
        targets=(Target("layers.*", ("mlp*",), ("*",)),),
        noise="flow_clean_ward",
    ),
    Family(
        name="ideogram",
        source="ideogram.transformer:Ideogram4Transformer",
        blocks=(BlockList("layers.*", joint("x", "after_prompt", "prompt_first")),),
        targets=(Target("layers.*", ("adaln_modulation*", "feed_forward*"), ("*",)),),
    ),
    Family(
        name="cosmos",
        source="cosmos.transformer:CosmosTransformer3DModel",
        blocks=(BlockList("transformer_blocks.*", IMAGE),),
        targets=(Target("transformer_blocks.*", ("norm*", "ff*"), ("*",)),),
        noise="edm",
        text="cross",
        target="latents",
    ),
    Family(
        name="anima",
        source="anima.transformer:AnimaTransformerModel",
        blocks=(BlockList("core.transformer_blocks.*", IMAGE),),
        targets=(Target("core.transformer_blocks.*", ("norm*", "ff*"), ("*",)),),
        noise="flow_in_sigmas",
        text="cross",
    ),
    Family(
        name="zlab_i1",
        source="zlab_i1.transformer:ZlabI1Transformer2DModel",
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
        source="ace_step.transformer:ACEStepTransformer2DModel",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states", tokens="attended"),)),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
        denoisers=("ACEStepTransformer2DModel",),
        target="song",
    ),
    Family(
        # The text reaches the blocks as channels of the latents. The language model that can be trained in place of the
        # transformer (minimax_music_train_component) is another class and has no noise level.
        name="minimaxmusic",
        source="minimaxmusic.transformer:MiniMaxMusic3Transformer1DModel",
        blocks=(BlockList("transformer_blocks.*", (StreamSeam("image", "hidden_states", tokens="after_time_token"),)),),
        targets=(Target("transformer_blocks.*", ("ff_*",), ("*",)),),
        noise="flow_in_clean",
        text="none",
        denoisers=("MiniMaxMusic3Transformer1DModel",),
    ),
    Family(
        # The text takes part as keys and values that a frozen language model has made. Sound tokens are not recorded.
        name="cosmos3",
        source="cosmos3.transformer:Cosmos3OmniTransformer",
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
        target="masked_video",
    ),
    Family(
        # One sequence of text, given frames, sound and noised frames. Sound tokens are not recorded.
        name="minimaxh3",
        source="minimaxh3.transformer:MiniMaxH3Transformer3DModel",
        blocks=(BlockList("transformer_blocks.*", joint("hidden_states", "packed_video", "packed_text")),),
        targets=(Target("transformer_blocks.*", ("adaln_proj*", "ff*"), ("*",)),),
        noise="flow_in_clean",
        target="video_and_reversed_audio",
    ),
    Family(
        # Wan 2.2 TI2V gives the first frame clean, at timestep 0.
        name="wan",
        source="wan.transformer:WanTransformer3DModel",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states", tokens="noised_tokens"),)),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="ltxvideo",
        source="ltxvideo.transformer:LTXVideoTransformer3DModel",
        blocks=(BlockList("transformer_blocks.*", IMAGE),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        text="cross",
    ),
    # The visual blocks cross-attend to the text, which a tower of blocks of its own (text_transformer_blocks) made
    # before them. These blocks never meet the image, so they are no stream of the denoiser and are not recorded.
    *(
        Family(
            name=name,
            source="kandinsky5_video.transformer_kandinsky5:Kandinsky5Transformer3DModel",
            blocks=(BlockList("visual_transformer_blocks.*", (StreamSeam("image", "visual_embed"),)),),
            targets=(Target("visual_transformer_blocks.*", ("visual_modulation*", "feed_forward*"), ("*",)),),
            text="cross",
        )
        for name in ("kandinsky5_image", "kandinsky5_video")
    ),
    Family(
        name="longcat_video",
        source="longcat_video.transformer:LongCatVideoTransformer3DModel",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "x", tokens="after_condition_frames"),)),),
        targets=(Target("blocks.*", ("adaLN_modulation*", "ffn*"), ("*",)),),
        text="cross",
        target="last_frames",
    ),
    Family(
        name="wan_s2v",
        source="wan_s2v.transformer:WanS2VTransformer3DModel",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states", tokens="before_reference_frames"),)),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="infinitetalk",
        source="infinitetalk.transformer:InfiniteTalkTransformer3DModel",
        blocks=(BlockList("blocks.*", IMAGE),),
        targets=(Target("blocks.*", ("ffn*",), ("*",)),),
        text="cross",
    ),
    Family(
        name="ltxvideo2",
        source="ltxvideo2.transformer:LTX2VideoTransformer3DModel",
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
        target="video_and_audio",
    ),
    *(
        Family(name=name, source=UNET, blocks=UNET_BLOCKS, targets=UNET_TARGETS, noise="ddpm", text="cross")
        for name in ("sd1x", "sdxl", "kolors")
    ),
    Family(
        name="pixart",
        source="pixart.transformer:PixArtTransformer2DModel",
        blocks=(BlockList("transformer_blocks.*", IMAGE),),
        targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
        noise="ddpm",
        text="cross",
    ),
    *(
        Family(
            name=name,
            source=source,
            blocks=(BlockList("transformer_blocks.*", IMAGE),),
            targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
            text="cross",
        )
        for name, source in (
            ("sana", "sana.transformer:SanaTransformer2DModel"),
            ("sanavideo", "sanavideo.transformer:SanaVideoTransformer3DModel"),
        )
    ),
    Family(
        # Its blocks are attention alone, on convolutional states.
        name="deepfloyd",
        source=UNET,
        blocks=tuple(BlockList(path, IMAGE, layout="BDHW") for path in UNET_ATTENTION_PATHS),
        targets=tuple(Target(path, (), ("*",)) for path in UNET_ATTENTION_PATHS),
        noise="ddpm",
        text="cross",
    ),
    Family(
        # Residual (convolution), timestep and attention blocks take turns in its lists.
        name="stable_cascade",
        source="stable_cascade.unet:StableCascadeUNet",
        blocks=tuple(
            BlockList(path, (StreamSeam("image", "x"),), layout="BDHW", only=("SDCascadeAttnBlock",))
            for path in CASCADE_PATHS
        ),
        targets=tuple(Target(path, (), ("*",)) for path in CASCADE_PATHS),
        noise="ddpm",
        text="cross",
    ),
)

DIFFUSERS: dict[str, Family] = {
    "SD3Transformer2DModel": Family(name="sd3", blocks=(BlockList("transformer_blocks.*", TEXT_IMAGE),)),
    "FluxTransformer2DModel": Family(
        # The single blocks put the two streams together and take them apart again.
        name="flux",
        blocks=(BlockList("transformer_blocks.*", TEXT_IMAGE), BlockList("single_transformer_blocks.*", TEXT_IMAGE)),
    ),
    "QwenImageTransformer2DModel": Family(
        name="qwen_image",
        blocks=(
            BlockList(
                "transformer_blocks.*",
                (TEXT_IMAGE[0], StreamSeam("text", "encoder_hidden_states", 0, "valid_text")),
            ),
        ),
        text_mask="encoder_hidden_states_mask",
    ),
    "WanTransformer3DModel": Family(
        name="wan",
        blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states", tokens="noised_tokens"),)),),
        text="cross",
    ),
    "PixArtTransformer2DModel": Family(
        name="pixart", blocks=(BlockList("transformer_blocks.*", IMAGE),), noise="ddpm", text="cross"
    ),
    "UNet2DConditionModel": Family(name="sdxl", blocks=UNET_BLOCKS, noise="ddpm", text="cross"),
}
"""diffusers' own classes, by name: their forwards call the blocks in another way than SimpleTuner's, and there is no
training batch, so that all of the image stream counts, reference images included."""

# Families that cannot be probed, and why.
REFUSED: dict[str, str] = {
    "heartmula": "it predicts tokens one after the other and has no noise level, so there is no sigma to sort by",
}


def family(name: str, denoiser: str = "") -> Family:
    """The table's entry for a SimpleTuner `model_family` and the class name of its denoiser ("" if not known yet).

    Raises ModelError for a family that is not supported, with the reason if there is a known one.
    """
    if name in REFUSED:
        raise ModelError(f"model family {name!r} cannot be probed: {REFUSED[name]}")
    entries = [entry for entry in FAMILIES if entry.name == name]
    for entry in entries:
        if not denoiser or not entry.denoisers or denoiser in entry.denoisers:
            return entry
    if entries:
        known = ", ".join(sorted(kind for entry in entries for kind in entry.denoisers))
        raise ModelError(
            f"the denoiser {denoiser} of model family {name!r} is not supported by the layer probe; it knows: {known}"
        )
    known = ", ".join(sorted({entry.name for entry in FAMILIES}))
    raise ModelError(
        f"model family {name!r} is not supported by the layer probe; it knows: {known}. "
        f"layerprobe_discover lets it guess where the blocks are"
    )


def is_known(name: str) -> bool:
    """Whether the table says something of this `model_family`: how to probe it, or why not."""
    return name in REFUSED or any(entry.name == name for entry in FAMILIES)
