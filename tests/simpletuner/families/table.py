"""Every family under test: a tiny denoiser, its kind of batch, and which tokens of which state are whose.

To add a family, add an entry: its name and flavour in SimpleTuner, the class of its denoiser with what makes it tiny, a
builder of batches.py, where each stream goes through the blocks (streams.py), and the rule of noise.py if the timesteps
are not 1000 * sigma. Variants are further cases of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import batches
import bypassed
import models
import noise
import streams
import torch
from batches import BATCH, COLUMNS, IMAGE, ROWS, TEXT, WORDS, Batch, drawn, image, mask_of, video
from case import Case
from models import Denoiser, tiny
from streams import BLOCKS, Part, Streams, captions, image_alone, joint


def family(
    name: str,
    flavour: str,
    denoiser: Denoiser,
    batch: Batch,
    places: Streams,
    *variants: Mapping[str, Any],
    **rest: Any,
) -> list[Case]:
    """A family's first case and its variants.

    A variant names fields of Case that are other ones; `config` and `keys` add to the denoiser's config and to the
    batch's keys. rest: further fields of all cases.
    """
    base = Case(name, flavour, denoiser, batch, places, **rest)
    cases = [base]
    for variant in variants:
        fields = dict(variant)
        made = {
            "denoiser": partial(denoiser, **fields.pop("config", {})),
            "batch": partial(batch, **fields.pop("keys", {})),
        }
        cases.append(replace(base, **made, **fields))
    return cases


def flow_matching(flavour: str) -> dict[str, Any]:
    """The change that trains a DDPM family by flow matching."""
    options = {"prediction_type": "flow_matching"}
    return {
        "label": f"{flavour}, flow matching",
        "options": options,
        "prepare": (models.flow_schedule,),
        "noise": noise.FLOW,
    }


# fmt: off

# --- Denoisers of more than one family. ---

KANDINSKY = tiny(
    "kandinsky5_video.transformer_kandinsky5:Kandinsky5Transformer3DModel",
    redrawn=True, in_visual_dim=16, out_visual_dim=16, in_text_dim=20, in_text_dim2=14, time_dim=16, model_dim=24,
    ff_dim=40, num_visual_blocks=3, axes_dims=(4, 4, 4),
)
COSMOS3: dict[str, Any] = {
    "hidden_size": 48, "head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
    "num_hidden_layers": 3, "vocab_size": 64, "rope_axes_dim": (4, 4, 4),
}
UNET = "unet_flowmap:FlowMapUNet2DConditionModel"
UNET_SIZES: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (16, 32, 32), "layers_per_block": 1, "cross_attention_dim": 20,
    "norm_num_groups": 4,
}
# As in SDXL the first down block and the last up block have no attention, and the others several blocks.
SDXL = tiny(
    UNET,
    **UNET_SIZES, attention_head_dim=(2, 2, 2), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
    projection_class_embeddings_input_dim=6 * 8 + 14,  # six time ids and the pooled text
)
SDXL_STREAMS = streams.unet_levels(
    (60, "down_blocks.1.attentions.0.transformer_blocks.0"),
    (15, "down_blocks.2.attentions.0.transformer_blocks.0-1"),
    (15, "mid_block.attentions.0.transformer_blocks.0-1"),
    (15, "up_blocks.0.attentions.0-1.transformer_blocks.0-1"),
    (60, "up_blocks.1.attentions.0-1.transformer_blocks.0"),
)
TIME_IDS = torch.tensor([[160.0, 96.0, 0.0, 0.0, 160.0, 96.0]] * BATCH)

CASES: list[Case] = [
    # --- Image and text apart in each block, or first apart and then in one sequence. ---
    *family(
        "sd3", "large",
        tiny(
            "sd3.transformer:SD3Transformer2DModel",
            sample_size=16, num_layers=4, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=20,
            caption_projection_dim=24, pooled_projection_dim=14, pos_embed_max_size=16, qk_norm="rms_norm",
        ),
        image(16, length=13, pooled=14, mask=None),
        # The last block does not update the text.
        {
            "image": (Part("transformer_blocks.0-3", "image", 0),),
            "text": (Part("transformer_blocks.0-2", "text", 1, of=13),),
        },
        {"flavour": "medium", "config": {"dual_attention_layers": (0, 1)}},
        tape=bypassed.sd3,
        adds={"image": ("attn.to_out.0", "attn2.to_out.0", "ff"), "text": ("attn.to_add_out", "ff_context")},
    ),
    *family(
        "flux", "dev",
        tiny(
            "flux.transformer:FluxTransformer2DModel",
            num_layers=2, num_single_layers=3, attention_head_dim=24, num_attention_heads=2, joint_attention_dim=20,
            pooled_projection_dim=14, guidance_embeds=True, axes_dims_rope=(8, 8, 8),
        ),
        image(16, pooled=14),
        streams.apart_then_joint(*streams.DOUBLE_SINGLE),
        {
            "flavour": "kontext", "keys": {"conditioning_latents": [drawn(16, 4, 8)]},
            "streams": streams.apart_then_joint(*streams.DOUBLE_SINGLE, references=8),
        },
    ),
    *family(
        "flux2", "dev",
        tiny(
            "flux2.transformer:Flux2Transformer2DModel",
            redrawn=True, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=20, timestep_guidance_channels=16, axes_dims_rope=(8, 8, 8, 8),
        ),
        # Latents of the VAE: model_predict puts 2 x 2 of them into one.
        image(32),
        streams.apart_then_joint(*streams.DOUBLE_SINGLE),
        {
            "label": "dev with a reference image",
            "keys": {"latents": (128, ROWS, COLUMNS), "conditioning_latents": [drawn(128, 2, 4)]},
            "streams": streams.apart_then_joint(*streams.DOUBLE_SINGLE, references=8),
        },
    ),
    *family(
        "chroma", "base",
        tiny(
            "chroma.transformer:ChromaTransformer2DModel",
            redrawn=True, num_layers=2, num_single_layers=3, attention_head_dim=24, num_attention_heads=2,
            joint_attention_dim=20, axes_dims_rope=(8, 8, 8), approximator_num_channels=16, approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        image(16),
        streams.apart_then_joint(*streams.DOUBLE_SINGLE),
    ),
    *family(
        "auraflow", "v0.3",
        tiny(
            "auraflow.transformer:AuraFlowTransformer2DModel",
            redrawn=True, sample_size=16, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=12,
            num_attention_heads=2, joint_attention_dim=20, caption_projection_dim=24, pos_embed_max_size=64,
        ),
        image(4),
        streams.apart_then_joint("joint_transformer_blocks.0-1", "single_transformer_blocks.0-2", registers=8),
    ),
    *family(
        "longcat_image", "final",
        tiny(
            "longcat_image.transformer:LongCatImageTransformer2DModel",
            redrawn=True, num_layers=2, num_single_layers=3, attention_head_dim=24, num_attention_heads=2,
            joint_attention_dim=20, pooled_projection_dim=20, axes_dims_rope=[8, 8, 8],
        ),
        image(16, mask=None),
        streams.longcat(),
        {
            "flavour": "edit", "keys": {"conditioning_latents": [drawn(16, 4, 8)]},
            "streams": streams.longcat(references=8),
        },
        tape=bypassed.longcat_image,
        adds={"image": ("attn.to_out.0", "ff", "proj_out"), "text": ("attn.to_add_out", "ff_context", "proj_out")},
    ),
    *family(
        "flux3_image", "klein-base",
        tiny(
            "flux3_image.transformer:Flux3ImageTransformer2DModel",
            redrawn=True, joint_attention_dim=20, num_attention_heads=2, attention_head_dim=32, num_layers=2,
            num_single_layers=3, axes_dims_rope=(8, 8, 8, 8), timestep_channels=16,
        ),
        image(128, patch=1),
        streams.flux3(),
        {
            "label": "klein-base with a reference image", "keys": {"conditioning_latents": [drawn(128, 2, 4)]},
            "streams": streams.flux3(references=8),
        },
        {"flavour": "klein", "config": {"flow_map": True}},
    ),
    *family(
        "hidream", "full",
        tiny(
            "hidream.transformer:HiDreamImageTransformer2DModel",
            redrawn=True, patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=3,
            attention_head_dim=24, num_attention_heads=2, caption_channels=[20, 22], text_emb_dim=14,
            num_routed_experts=3, axes_dims_rope=(8, 8, 8), max_resolution=(12, 12), llama_layers=[0, 2, 1, 3, 3],
        ),
        image(16, text=0, mask=None, text_encoder_output=batches.two_encoders),
        # An image that is not square is padded to the 36 tokens of the largest.
        streams.hidream(IMAGE, padded=36),
        {"label": "full, square", "keys": {"latents": (16, 8, 8)}, "streams": streams.hidream(16, padded=16)},
    ),
    *family(
        "hunyuanvideo", "t2v-480p",
        tiny(
            "hunyuanvideo.transformer:HunyuanVideo15Transformer3DModel",
            redrawn=True, num_attention_heads=2, attention_head_dim=24, num_layers=3, num_refiner_layers=1,
            text_embed_dim=20, text_embed_2_dim=14, image_embed_dim=18, rope_axes_dim=(8, 8, 8),
        ),
        video(
            32,
            patch=1,
            frames=2,
            words=(7, 4),
            mask=torch.bool,
            text_encoder_output={"prompt_embeds_2": drawn(4, 14), "attention_masks_2": mask_of((3, 1), 4)},
        ),
        streams.hunyuan(),
        {
            "flavour": "i2v-480p",
            "keys": {"conditioning_latents": [drawn(32, 1, 3, 5)], "vision_states": drawn(6, 18)},
            "streams": streams.hunyuan(vision=6),
        },
    ),
    *family(
        "mageflow", "base",
        tiny(
            "mageflow.transformer:MageFlowTransformer2DModel",
            redrawn=True, context_in_dim=20, hidden_size=48, num_heads=2, depth=3, axes_dim=[8, 8, 8],
        ),
        image(128, patch=1, mask=torch.bool),
        streams.mageflow(),
        # The family's own switch, which works in place of `gradient_checkpointing`.
        {"label": "base, checkpointing", "config": {"checkpoint": True}},
        {
            "flavour": "edit-base", "keys": {"conditioning_latents": [drawn(128, 2, 4)]},
            "streams": streams.mageflow(references=8),
        },
    ),
    *family(
        "boogu_image", "v0.1-base",
        tiny(
            "boogu_image.transformer:BooguImageTransformer2DModel",
            redrawn=True, hidden_size=48, num_layers=5, num_double_stream_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8), axes_lens=(64, 64, 64),
            instruction_feature_configs={
                "instruction_feat_dim": 20, "reduce_type": "mean", "num_instruction_feat_layers": 1,
            },
        ),
        image(16, mask=torch.bool),
        streams.boogu((0, 0)),
        {"flavour": "v0.1-edit", "keys": {"conditioning_latents": [drawn(16, 4, 8)]}, "streams": streams.boogu((8, 8))},
        # References of different shapes come as a list; SimpleTuner 4.10.1 gives all of them to the first sample.
        {
            "flavour": "v0.1-edit", "label": "v0.1-edit, uneven references",
            "keys": {"conditioning_latents": [[lambda _: torch.randn(16, 4, 8), lambda _: torch.randn(16, 6, 6)]]},
            "streams": streams.boogu((8 + 9, 0)),
        },
        noise=noise.TIMESTEPS_ARE_CLEAN,
    ),
    *family(
        "qwen_image", "v1.0",
        tiny(
            "qwen_image.transformer:QwenImageTransformer2DModel",
            num_layers=3, attention_head_dim=24, num_attention_heads=2, joint_attention_dim=20,
            axes_dims_rope=(8, 8, 8),
        ),
        image(16),
        streams.apart(BLOCKS),
        {
            "flavour": "edit-v1", "keys": {"conditioning_latents": drawn(16, 4, 6)},
            "streams": streams.apart(BLOCKS, references=6),
        },
        # SimpleTuner 4.10.1 keeps the first of this list and takes it apart as a list of reference datasets. What
        # its collate function returns, a (B, C, H, W) tensor for each dataset, passes that only where B is 1.
        {
            "flavour": "edit-v2", "keys": {"conditioning_latents": [[drawn(16, 4, 6), drawn(16, 2, 4)]]},
            "streams": streams.apart(BLOCKS, references=6 + 2),
        },
    ),
    *family(
        "qwen_image", "v2.1",
        tiny(
            "qwen_image.transformer_21:QwenImage21Transformer2DModel",
            num_layers=3, attention_head_dim=24, num_attention_heads=2, context_in_dim=20, axes_dims_rope=(8, 8, 8),
        ),
        image(64, patch=1),
        joint(BLOCKS, "hidden_states"),
    ),
    *family(
        "zlab_i1", "3b",
        tiny(
            "zlab_i1.transformer:ZlabI1Transformer2DModel",
            input_size=16, image_resolution=128, hidden_size=48, depth=5, num_heads=2, mlp_ratio=2.0, text_embed_dim=20,
            text_num_tokens=TEXT,
        ),
        image(32, mask=torch.bool),
        # The blocks set the text's padding to zero, where an angle has no meaning.
        streams.then(
            *(
                streams.apart(blocks, "image_tokens", "text_tokens", image_first=True)
                for blocks in ("in_blocks.0-1", "mid_block", "out_blocks.0-1")
            )
        ),
        repositories=("black-forest-labs/FLUX.2-dev",),
    ),
    # --- One sequence of image and text in each block. ---
    *family(
        "lumina2", "2.0",
        tiny(
            "lumina2.transformer:Lumina2Transformer2DModel",
            redrawn=True, sample_size=16, hidden_size=48, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 8, 8), axes_lens=(30, 32, 32), cap_feat_dim=20,
        ),
        image(16, length=11, words=(4, 11)),
        # Each sample's text is followed by its image at once: there is no padding between them.
        joint(
            "layers.0-2",
            "hidden_states",
            image=(range(4, 4 + IMAGE), range(11, 11 + IMAGE)),
            text=captions(words=(4, 11)),
            of=11 + IMAGE,
        ),
        # The blocks get no attention mask.
        {
            "label": "2.0 equal texts", "keys": {"words": (7, 7)},
            "streams": joint("layers.0-2", "hidden_states", image=range(7, 7 + IMAGE), text=range(7), of=7 + IMAGE),
        },
    ),
    *family(
        "krea2", "raw",
        tiny(
            "krea2.transformer:Krea2Transformer2DModel",
            redrawn=True, num_layers=3, attention_head_dim=24, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=40, timestep_embed_dim=16, text_hidden_dim=20, num_text_layers=4,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=28,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(8, 8, 8),
        ),
        image(16, text=(4, 20)),
        joint("transformer_blocks.0-2", "hidden_states"),
        {
            "label": "raw with references", "options": {"krea2_reference_latents": True},
            "keys": {"conditioning_latents": [drawn(16, 6, 10)]},
            "streams": joint("transformer_blocks.0-2", "hidden_states", of=TEXT + 2 * IMAGE),
        },
    ),
    *family(
        "ernie", "base",
        tiny(
            "ernie.transformer:ErnieImageTransformer2DModel",
            redrawn=True, hidden_size=48, num_attention_heads=2, num_layers=3, ffn_hidden_size=40, text_in_dim=20,
            rope_axes_dim=(8, 8, 8),
        ),
        # SimpleTuner cuts the text to the longest of the batch.
        image(128, patch=1, length=13, words=(4, 9)),
        joint("layers.0-2", "x", image=range(IMAGE), text=captions(IMAGE, (4, 9)), layout="SBD"),
    ),
    *family(
        "ideogram", "fp8",
        partial(
            models.ideogram,
            emb_dim=48, num_layers=3, num_heads=2, intermediate_size=40, adanln_dim=16, llm_features_dim=20,
            mrope_section=(4, 4, 4),
        ),
        image(128, patch=1),
        joint("layers.0-2", "x"),
    ),
    *family(
        "moss_image", "base",
        tiny(
            "moss_image.transformer:MOSSImageTransformer",
            redrawn=True, dim=48, ffn_dim=40, num_heads=2, num_layers=3, text_dim=20, freq_dim=16,
        ),
        image(128, patch=1),
        joint("layers.0-2", "x", image=range(IMAGE), text=captions(IMAGE)),
        {
            "flavour": "base-edit", "keys": {"conditioning_latents": [drawn(128, 2, 3), drawn(128, 1, 2)]},
            "streams": joint("layers.0-2", "x", image=range(IMAGE), text=captions(IMAGE), of=TEXT + IMAGE + 8),
        },
    ),
    *family(
        "omnigen", "v1",
        tiny(
            "omnigen.transformer:OmniGenTransformer2DModel",
            hidden_size=48, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40, num_layers=3,
            pad_token_id=0, vocab_size=64, rope_scaling={"short_factor": [1.0] * 12, "long_factor": [1.0] * 12},
            pos_embed_max_size=16, time_step_dim=16,
        ),
        image(4, text=0, mask=None, prompts=list(models.OMNIGEN_PROMPTS)),
        # SimpleTuner puts 9 words before a prompt and 3 behind it, and pads on the left. A time token follows.
        joint(
            "layers.0-2", "hidden_states", image=range(22, 22 + IMAGE), text=(range(6, 21), range(21)), of=22 + IMAGE
        ),
        noise=noise.TIMESTEPS_ARE_CLEAN,
        prepare=(models.omnigen_processor, models.autocast),
    ),
    *family(
        "z_image", "turbo",
        # Redrawn, for its pad tokens are made without a value.
        tiny(
            "z_image.transformer:ZImageTransformer2DModel",
            redrawn=True, dim=48, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
            axes_dims=[8, 8, 8], axes_lens=[128, 32, 32],
        ),
        image(16, length=37, words=(37, 7)),
        # Image and text of each sample are padded to a whole multiple of 32; the longer text takes 64.
        joint("layers.0-2", "x", image=range(IMAGE), text=captions(32, (37, 7)), of=96),
        # Every row of the grid has the 2 columns of the reference image first.
        {
            "label": "turbo with references",
            "keys": {"conditioning_latents": [drawn(16, 6, 4)], "conditioning_type": "reference_strict"},
            "streams": joint(
                "layers.0-2", "x", of=96, text=captions(32, (37, 7)),
                image=[place for place in range(ROWS * (2 + COLUMNS)) if place % (2 + COLUMNS) >= 2],
            ),
        },
    ),
    *family(
        "z_image_omni", "base",
        # Redrawn, for its pad tokens are made without a value.
        tiny(
            "z_image_omni.transformer:ZImageOmniTransformer2DModel",
            redrawn=True, dim=48, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=20,
            siglip_feat_dim=12, axes_dims=[8, 8, 8], axes_lens=[128, 32, 32],
        ),
        image(16, length=37, words=(37, 7)),
        # Text and image of each sample are padded to a whole multiple of 32.
        joint(
            "layers.0-2",
            "x",
            image=(range(64, 64 + IMAGE), range(32, 32 + IMAGE)),
            text=captions(0, (37, 7)),
            of=96,
        ),
        {
            "flavour": "edit", "keys": {"conditioning_latents": [drawn(16, 10, 14)]}, "streams": streams.omni(),
            "prepare": (models.split_prompts,),
        },
        # They are padded to 32, and the noised image has 32 of padding for its missing ones.
        {
            "flavour": "edit", "label": "edit with vision features",
            "keys": {"conditioning_latents": [drawn(16, 10, 14)], "siglip_embeds": drawn(4, 4, 12)},
            "streams": streams.omni(vision=64), "prepare": (models.split_prompts,),
        },
    ),
    *family(
        "minimaxh3", "fl2va",
        tiny(
            "minimaxh3.transformer:MiniMaxH3Transformer3DModel",
            num_attention_heads=2, attention_head_dim=32, hidden_size=48, num_layers=3, num_refiner_layers=1,
            ffn_dim=64, audio_in_channels=8, text_dim=20, freq_dim=32, time_embed_hidden_dim=24, time_embed_dim=12,
            rope_freq_dim=4,
        ),
        partial(batches.tagged_text, latents=(24, 1, 6, 10)),
        streams.minimax_h3(frames=1),
        {
            "label": "video with sound and a given frame", "options": {"minimax_h3_target_mode": "av"},
            "keys": {"latents": (24, 2, 6, 10), "pictures": 3, "conditioning_latents": drawn(24, 1, 6, 10)},
            "streams": streams.minimax_h3(frames=2, given=1, sound=8, pictures=3),
        },
        {
            "label": "one sample of sound alone", "options": {"minimax_h3_target_mode": "av"},
            "keys": {"latents": (24, 2, 6, 10), "video_latent_mask": torch.tensor([1.0, 0.0])},
            "streams": streams.minimax_h3(frames=2, sound=8), "absent": {"image": (1,)},
        },
        noise=noise.TIMESTEPS_ARE_CLEAN,
        label="image",
        options={"minimax_h3_target_mode": "auto"},
        # As from_pretrained leaves them (`_keep_in_fp32_modules`).
        prepare=(models.in_float32("proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out"),),
    ),
    # --- Text by cross-attention or not at all: images. ---
    *family(
        "pixart", "900M-1024-v0.6",
        # With a sample size of 128 the model is also told the size of the image.
        tiny(
            "pixart.transformer:PixArtTransformer2DModel",
            num_attention_heads=2, attention_head_dim=12, num_layers=3, cross_attention_dim=24, caption_channels=20,
        ),
        image(4),
        image_alone(BLOCKS),
        {"flavour": "600M-512", "config": {"sample_size": 64}},
        flow_matching("900M-1024-v0.6"),
        noise=noise.ddpm(noise.LINEAR, beta_schedule="linear"),
    ),
    *family(
        "sana", "sana1.5-1.6b-1024",
        tiny(
            "sana.transformer:SanaTransformer2DModel",
            num_attention_heads=3, attention_head_dim=8, num_layers=3, num_cross_attention_heads=2,
            cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20, sample_size=8,
        ),
        image(32, patch=1),
        image_alone(BLOCKS),
        {"label": "patches of 2", "config": {"patch_size": 2}, "keys": {"latents": (32, 2 * ROWS, 2 * COLUMNS)}},
        label="1.5",
    ),
    *family(
        "anima", "preview-3",
        tiny(
            "anima.transformer:AnimaTransformerModel",
            num_attention_heads=2, attention_head_dim=24, num_layers=3, mlp_ratio=2.0, text_embed_dim=20,
            adaln_lora_dim=12, max_size=(8, 16, 16), adapter_vocab_size=32, adapter_dim=20, adapter_layers=2,
            adapter_heads=2,
        ),
        video(
            16,
            frames=1,
            mask=None,
            t5xxl_ids=lambda _: torch.randint(0, 32, (BATCH, 11)),
            # The second caption is shorter: its T5 tokens are padding with weight 0.
            t5xxl_weights=mask_of((11, 5), 11).float().unsqueeze(-1),
        ),
        image_alone("core.transformer_blocks.0-2"),
        noise=noise.TIMESTEPS_ARE_SIGMAS,
        prepare=(models.autocast,),
    ),
    *family(
        "cosmos", "2b",
        tiny(
            "cosmos.transformer:CosmosTransformer3DModel",
            num_attention_heads=2, attention_head_dim=24, num_layers=3, mlp_ratio=2.0, text_embed_dim=20,
            adaln_lora_dim=12, max_size=(8, 16, 16),
        ),
        video(16, frames=1, mask=None),
        image_alone(BLOCKS),
        noise=noise.EDM,
    ),
    *family(
        "cosmos3", "nano",
        # SimpleTuner loads a checkpoint that has only the generating half of each layer.
        tiny(
            "cosmos3.transformer:Cosmos3OmniTransformer",
            **COSMOS3, latent_channel=16, patch_latent_dim=64, sound_gen=True, sound_dim=8, load_reasoning_layers=False,
        ),
        # The language model gets prompts of two lengths.
        video(16, frames=1, text=0, mask=None, prompts=["a cat on the mat", "a cat"]),
        image_alone("layers.0-2", "gen_seq"),
        {
            "label": "nano video with sound", "config": {"load_reasoning_layers": True},
            "keys": {"latents": (16, 3, 6, 10), "audio_latent_batch": drawn(8, 7)},
            "streams": image_alone("layers.0-2", "gen_seq", of=3 * IMAGE + 7, at=range(3 * IMAGE)),
        },
        # The given first frame is not denoised.
        {
            "flavour": "super-i2v", "label": "super-i2v",
            "keys": {"latents": (16, 3, 6, 10), "conditioning_latents": drawn(16, 6, 10)},
            "streams": image_alone("layers.0-2", "gen_seq", of=3 * IMAGE, at=range(IMAGE, 3 * IMAGE)),
        },
        label="nano image",
        noise=noise.THOUSANDTHS_ARE_CLEAN,
        prepare=(models.cosmos3_reasoner(**COSMOS3), models.in_float32("time_embedder")),
        tape=bypassed.cosmos3,
        adds={"image": ("self_attn.to_add_out", "mlp_moe_gen")},
    ),
    *family(
        "kandinsky5_image", "t2i-lite-sft",
        KANDINSKY,
        image(16, pooled=14),
        image_alone("visual_transformer_blocks.0-2", "visual_embed"),
        # The source image is given as further channels of the same tokens.
        {
            "flavour": "i2i-lite-sft", "config": {"visual_cond": True},
            "keys": {"conditioning_latents": drawn(16, 6, 10)},
        },
        prepare=(models.autocast,),
    ),
    # --- Text by cross-attention or not at all: videos and sound. ---
    *family(
        "kandinsky5_video", "t2v-lite-sft-5s",
        KANDINSKY,
        video(16, pooled=14),
        image_alone("visual_transformer_blocks.0-2", "visual_embed", of=3 * IMAGE),
        # The first frame is given as further channels of the same tokens.
        {
            "flavour": "i2v-lite-5s", "config": {"visual_cond": True},
            "keys": {"conditioning_latents": [drawn(16, 6, 10)], "is_i2v_data": True},
        },
        prepare=(models.autocast,),
    ),
    *family(
        "wan", "t2v-480p-1.3b-2.1",
        tiny(
            "wan.transformer:WanTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, text_dim=20, freq_dim=16, ffn_dim=40, num_layers=3,
            rope_max_seq_len=32,
        ),
        video(16),
        image_alone("blocks.0-2", of=3 * IMAGE),
        # The mask and the clean first frame are further channels of the same tokens.
        {
            "flavour": "i2v-14b-2.1", "config": {"in_channels": 36, "image_dim": 14, "added_kv_proj_dim": 24},
            "keys": {"conditioning_image_embeds": drawn(7, 14)}, "prepare": (models.wan_vae,),
        },
        # The first frame is given clean, at timestep 0: its tokens are no part of the image stream.
        {
            "flavour": "ti2v-5b-2.2",
            "keys": {"conditioning_pixel_values": lambda _: torch.rand(BATCH, 3, 48, 80) * 2 - 1},
            "streams": image_alone("blocks.0-2", of=3 * IMAGE, at=range(IMAGE, 3 * IMAGE)),
            "prepare": (models.wan_vae, models.timesteps_of_tokens),
        },
        # A single frame is given as a whole: it goes in clean, at timestep 0, and is no sample of the sigma drawn.
        {
            "flavour": "ti2v-5b-2.2", "label": "ti2v-5b-2.2, all given",
            "keys": {
                "latents": (16, 1, 6, 10),
                "conditioning_pixel_values": lambda _: torch.rand(BATCH, 3, 48, 80) * 2 - 1,
            },
            "streams": image_alone("blocks.0-2"), "absent": {"image": (0, 1)},
            "prepare": (models.wan_vae, models.timesteps_of_tokens),
        },
    ),
    *family(
        "wan_s2v", "s2v-14b-2.2",
        # The audio is added to the video between the blocks.
        tiny(
            "wan_s2v.transformer:WanS2VTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, text_dim=20, freq_dim=16, audio_dim=14,
            audio_inject_layers=(0, 2), ffn_dim=40, num_layers=3, num_weighted_avg_layers=4, rope_max_seq_len=64,
        ),
        # The motion packer needs 8 x 8 latents, the audio encoder 4 frames.
        video(16, frames=5, rows=4, s2v_audio_embeds=drawn(4, 14, 11)),
        # [video | reference image]
        image_alone("blocks.0-2", of=(5 + 1) * 20, at=range(5 * 20)),
    ),
    *family(
        "infinitetalk", "single-14b-480p",
        # With the mask and the clean first frame as channels.
        tiny(
            "infinitetalk.transformer:InfiniteTalkTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, text_dim=20, freq_dim=16, ffn_dim=40, num_layers=3,
            image_dim=14, added_kv_proj_dim=24, rope_max_seq_len=32, audio_layers=2, audio_dim=16,
            audio_intermediate_dim=18, audio_output_dim=16, audio_context_tokens=5,
        ),
        video(16, conditioning_image_embeds=drawn(7, 14), s2v_audio_paths=["a.wav", "b.wav"]),
        image_alone("blocks.0-2", of=3 * IMAGE),
        options={"framerate": 25},
        # On a CPU no autocast helps that norm, which gets a float32 input.
        prepare=(models.wan_vae, models.speech(layers=2, width=16), models.in_float32("audio_proj.norm")),
    ),
    *family(
        "longcat_video", "final",
        tiny(
            "longcat_video.transformer:LongCatVideoTransformer3DModel",
            hidden_size=32, depth=3, num_heads=2, caption_channels=20, mlp_ratio=2, adaln_tembed_dim=16,
            frequency_embedding_size=16,
        ),
        video(16, conditioning_latent_count=0),
        image_alone("blocks.0-2", "x", of=3 * IMAGE),
        {
            "label": "final, first frame given", "keys": {"conditioning_latent_count": 1},
            "streams": image_alone("blocks.0-2", "x", of=3 * IMAGE, at=range(IMAGE, 3 * IMAGE)),
        },
        # On CUDA the family computes the modulation in float32 by an autocast that a CPU does not have.
        prepare=(models.in_float32("adaLN_modulation", "t_embedder"),),
    ),
    *family(
        "sanavideo", "2b-480p",
        tiny(
            "sanavideo.transformer:SanaVideoTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, num_layers=3, num_cross_attention_heads=2,
            cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20, sample_size=8,
        ),
        video(16),
        image_alone(BLOCKS, of=3 * IMAGE),
    ),
    *family(
        "ltxvideo", "0.9.5",
        # model_predict asks for 128 channels.
        tiny(
            "ltxvideo.transformer:LTXVideoTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=3, caption_channels=20,
        ),
        video(128, patch=1),
        image_alone(BLOCKS, of=3 * IMAGE),
    ),
    *family(
        "ltxvideo2", "dev",
        tiny(
            "ltxvideo2.transformer:LTX2VideoTransformer3DModel",
            num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, audio_num_attention_heads=2,
            audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=3, caption_channels=20,
            rope_type="split",
        ),
        video(
            128,
            patch=1,
            text=60,
            audio_latent_batch=drawn(8, 17, 16),
            encoder_attention_mask=mask_of(WORDS, TEXT).flip(1).float(),
        ),
        streams.ltx2(range(3 * IMAGE)),
        {
            "label": "dev, reference video",
            "keys": {"conditioning_latents": [drawn(128, 2, ROWS, COLUMNS)], "conditioning_type": "reference_strict"},
            "streams": streams.ltx2(range(2 * IMAGE, 5 * IMAGE)),
        },
        {
            "label": "dev, first frame given", "options": {"ltx2_first_frame_conditioning_probability": 1.0},
            "streams": streams.ltx2(range(IMAGE, 3 * IMAGE)),
        },
        # A still image has no other frame: it is given as a whole, clean, at timestep 0.
        {
            "label": "dev, still image given as first frame", "keys": {"latents": (128, 1, ROWS, COLUMNS)},
            "options": {"ltx2_intrinsic_conditioning": [{"type": "first_frame"}]},
            "streams": streams.ltx2(range(IMAGE), audio=1), "absent": {"image": (0, 1)},
        },
        {
            "label": "dev, still image given as prefix", "keys": {"latents": (128, 1, ROWS, COLUMNS)},
            "options": {"ltx2_intrinsic_conditioning": [{"type": "prefix"}]},
            "streams": streams.ltx2(range(IMAGE), audio=1), "absent": {"image": (0, 1)},
        },
        {
            "label": "dev, one sample without audio", "keys": {"audio_latent_mask": torch.tensor([1.0, 0.0])},
            "absent": {"audio": (1,)},
        },
        # SimpleTuner makes an empty video of three tokens.
        {
            "label": "dev, audio alone",
            "keys": {"latent_batch": None, "is_audio_only": True, "video_latent_mask": torch.zeros(BATCH)},
            "streams": streams.ltx2(range(3)), "absent": {"image": (0, 1)},
        },
        # It gates attention and modulates the text.
        {
            "flavour": "2.3-dev",
            "config": {
                "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
                "use_prompt_embeddings": False,
            },
            "prepare": (models.ltx2_parts(newer=True), models.autocast),
        },
        prepare=(models.ltx2_parts(newer=False), models.autocast),
    ),
    *family(
        "ace_step", "base",
        partial(
            models.ace_step,
            num_layers=3, inner_dim=48, attention_head_dim=24, num_attention_heads=2, mlp_ratio=2.0, max_position=64,
            speaker_embedding_dim=14, text_embedding_dim=20, ssl_encoder_depths=[1, 1], ssl_latent_dims=[8, 8],
            lyric_encoder_vocab_size=32, lyric_hidden_size=16, max_width=64,
        ),
        batches.song,
        image_alone(BLOCKS, of=max(batches.SONGS), at=tuple(range(frames) for frames in batches.SONGS)),
        noise=noise.Noise(noise.thousandths),  # the batch does not keep its noise
    ),
    *family(
        "minimaxmusic", "music3",
        tiny(
            "minimaxmusic.transformer:MiniMaxMusic3Transformer1DModel",
            in_channels=8, condition_dim=20, num_layers=3, num_attention_heads=2, attention_head_dim=24,
            ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=32,
        ),
        # A hidden state of the language model for each frame.
        batches.batch((8, 11), length=11, mask=None),
        # A time token is before the frames.
        image_alone(BLOCKS, of=1 + 11, at=range(1, 1 + 11)),
        noise=noise.TIMESTEPS_ARE_CLEAN,
    ),
    # --- U-Nets: the states change their size between the blocks. ---
    *family(
        "sd1x", "1.5",
        # The last down block and the first up block have no attention, as in Stable Diffusion 1.5.
        tiny(
            UNET,
            **UNET_SIZES, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        batches.unet(4, text=20),
        streams.unet_levels(
            (240, "down_blocks.0.attentions.0.transformer_blocks.0"),
            (60, "down_blocks.1.attentions.0.transformer_blocks.0"),
            (15, "mid_block.attentions.0.transformer_blocks.0"),
            (60, "up_blocks.1.attentions.0-1.transformer_blocks.0"),
            (240, "up_blocks.2.attentions.0-1.transformer_blocks.0"),
        ),
        {"label": "1.5, steps drawn alike", "options": {"disable_segmented_timestep_sampling": True}},
        flow_matching("1.5"),
        noise=noise.scaled_linear(0.0001, 0.02),
    ),
    *family(
        "sdxl", "base-1.0",
        SDXL,
        batches.unet(4, text=20, pooled=14, batch_time_ids=TIME_IDS),
        SDXL_STREAMS,
        # The refiner has attention in the middle blocks of its four, and five time ids.
        {
            "flavour": "refiner-1.0",
            "config": {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 5 * 8 + 14,
            },
            "keys": {"batch_time_ids": TIME_IDS[:, :5]},
            "streams": streams.unet_levels(
                (60, "down_blocks.1.attentions.0.transformer_blocks.0"),
                (15, "mid_block.attentions.0.transformer_blocks.0"),
                (60, "up_blocks.1.attentions.0-1.transformer_blocks.0"),
            ),
            "options": {"refiner_training": True, "prediction_type": "v_prediction"},
        },
        flow_matching("base-1.0"),
        noise=noise.scaled_linear(0.0001, 0.02),
    ),
    *family(
        "kolors", "1.0",
        # The text has the width of ChatGLM's states and is projected.
        partial(SDXL, encoder_hid_dim=26, encoder_hid_dim_type="text_proj"),
        batches.unet(4, text=26, pooled=14, batch_time_ids=TIME_IDS),
        SDXL_STREAMS,
        flow_matching("1.0"),
        noise=noise.scaled_linear(0.00085, 0.014, steps=1100),
    ),
    *family(
        "deepfloyd", "i-medium-400m",
        # The first down block and the last up block have no attention.
        tiny(
            UNET,
            sample_size=16, in_channels=3, out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", *2 * ["SimpleCrossAttnDownBlock2D"]),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*2 * ["SimpleCrossAttnUpBlock2D"], "ResnetUpsampleBlock2D"),
            block_out_channels=(16, 32, 32), layers_per_block=1, cross_attention_dim=24, attention_head_dim=8,
            norm_num_groups=4, act_fn="gelu", addition_embed_type="text", addition_embed_type_num_heads=2,
            encoder_hid_dim=20, encoder_hid_dim_type="text_proj", resnet_time_scale_shift="scale_shift",
        ),
        batches.unet(3, text=20),
        streams.unet_levels(
            (60, "down_blocks.1.attentions.0"),
            (15, "down_blocks.2.attentions.0"),
            (15, "mid_block.attentions.0"),
            (15, "up_blocks.0.attentions.0-1"),
            (60, "up_blocks.1.attentions.0-1"),
            layout="BDHW",
        ),
        # Stage II is given the small image beside the noised one, and its noise level as a class.
        {
            "flavour": "ii-medium-450m",
            "config": {"in_channels": 6, "class_embed_type": "timestep", "only_cross_attention": True},
        },
        noise=noise.ddpm(noise.cosine_betas(), beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
    ),
    *family(
        "stable_cascade", "stage-c",
        # Each level is a row of (residual, timestep, attention) blocks; two rows in the second.
        tiny(
            "stable_cascade.unet:StableCascadeUNet",
            timestep_ratio_embedding_dim=8, conditioning_dim=20, block_out_channels=(16, 24),
            num_attention_heads=(2, 2), down_num_layers_per_block=(1, 2), up_num_layers_per_block=(2, 1),
            clip_text_in_channels=26, clip_text_pooled_in_channels=14, clip_image_in_channels=18, switch_level=(False,),
        ),
        image(16, patch=1, text=26, pooled=14, mask=None),
        # Each level is a row of (residual, timestep, attention) blocks; two rows in the second.
        streams.unet_levels(
            (15, "down_blocks.0.2"), (15, "down_blocks.1.2"), (15, "down_blocks.1.5"),
            (15, "up_blocks.0.2"), (15, "up_blocks.0.5"), (15, "up_blocks.1.2"),
            argument="x", layout="BDHW",
        ),
        # SimpleTuner trains it with the schedule of a plain DDPMScheduler.
        noise=noise.ddpm(noise.LINEAR, _class_name="DDPMWuerstchenScheduler", s=0.008, scaler=1.0),
        options={"mixed_precision": "no"},  # the family refuses anything else
    ),
]
