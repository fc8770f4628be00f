"""The architectures that --model knows by name, as their makers published them. Data alone.

Each entry has what its transformer's or unet's config.json sets otherwise than SimpleTuner's class does by itself, and
the number of parameters that its source gives, to which a test holds the model that is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model that was published.

    family, flavour: SimpleTuner's names. source: its repository at Hugging Face. parameters: as published, exact
    ("11,901,408,320", of the weights' files there) or rounded ("8.9 B", by its makers). config: what its config.json
    sets. class_name: of the config.json, where a family has several classes.
    """

    family: str
    flavour: str
    source: str
    parameters: str
    config: Mapping[str, Any]
    class_name: str = ""


_SD35 = {
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": [64, 32, 32],
    "llama_layers": [*range(32), *[31] * 16],
}
_WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_SANA_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_REFINER = _SDXL | {
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
}
_KOLORS = _SDXL | {
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}
_CASCADE = {
    "clip_text_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": [False],
}
_PIXART = {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}

NAMED: dict[str, Published] = {
    "sd35-large": Published("sd3", "large", "stabilityai/stable-diffusion-3.5-large", "8.1 B", _SD35 | _SD35_LARGE),
    "sd35-medium": Published("sd3", "medium", "stabilityai/stable-diffusion-3.5-medium", "2.5 B", _SD35 | _SD35_MEDIUM),
    "flux-dev": Published("flux", "dev", "black-forest-labs/FLUX.1-dev", "11,901,408,320", {"guidance_embeds": True}),
    "flux-schnell": Published("flux", "schnell", "black-forest-labs/FLUX.1-schnell", "11,891,178,560", {}),
    "flux2-dev": Published("flux2", "dev", "black-forest-labs/FLUX.2-dev", "32,223,281,152", {}),
    "flux2-klein-4b": Published(
        "flux2", "klein-4b", "black-forest-labs/FLUX.2-klein-base-4B", "3,875,544,576", _KLEIN_4B
    ),
    "flux2-klein-9b": Published(
        "flux2", "klein-9b", "black-forest-labs/FLUX.2-klein-base-9B", "9,078,581,248", _KLEIN_9B
    ),
    "qwen-image": Published(
        "qwen_image", "v1.0", "Qwen/Qwen-Image", "20,430,401,088", {}, "QwenImageTransformer2DModel"
    ),
    "qwen-image-2.1": Published(
        "qwen_image", "v2.1", "Qwen/Qwen-Image-2.1", "7,115,124,736", {}, "QwenImage21Transformer2DModel"
    ),
    "wan21-1.3b": Published("wan", "t2v-480p-1.3b-2.1", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "1.4 B", _WAN_1_3B),
    "wan21-14b": Published("wan", "t2v-480p-14b-2.1", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "14,288,491,584", {}),
    "wan22-5b": Published("wan", "ti2v-5b-2.2", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "4,999,787,712", _WAN_5B),
    "pixart-sigma": Published("pixart", "600M-1024", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "610,856,096", _PIXART),
    "sana-1.6b": Published(
        "sana", "sana1.0-1.6b-1024", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "1.604 B", {}
    ),
    "sana-600m": Published(
        "sana", "sana1.0-600m-1024", "Efficient-Large-Model/Sana_600M_1024px_diffusers", "0.59 B", _SANA_600M
    ),
    "lumina2": Published("lumina2", "2.0", "Alpha-VLLM/Lumina-Image-2.0", "2,609,769,152", {"cap_feat_dim": 2304}),
    "hidream": Published("hidream", "full", "HiDream-ai/HiDream-I1-Full", "17,105,733,184", _HIDREAM),
    "chroma": Published("chroma", "base", "lodestones/Chroma1-Base", "8.9 B", {}),
    "auraflow": Published("auraflow", "v0.3", "fal/AuraFlow-v0.3", "6.8 B", {}),
    "z-image": Published("z_image", "base", "Tongyi-MAI/Z-Image", "6,154,908,736", {}),
    "krea2": Published("krea2", "turbo", "krea/Krea-2-Turbo", "12,820,073,036", {}),
    "sd15": Published("sd1x", "1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "859,520,964", _SD15),
    "sdxl": Published("sdxl", "base-1.0", "stabilityai/stable-diffusion-xl-base-1.0", "2,567,463,684", _SDXL),
    "sdxl-refiner": Published(
        "sdxl", "refiner-1.0", "stabilityai/stable-diffusion-xl-refiner-1.0", "2,259,526,660", _SDXL_REFINER
    ),
    "kolors": Published("kolors", "1.0", "Kwai-Kolors/Kolors-diffusers", "2.58 B", _KOLORS),
    "stable-cascade": Published("stable_cascade", "stage-c", "stabilityai/stable-cascade-prior", "3.6 B", _CASCADE),
    "hunyuanvideo-1.5": Published(
        "hunyuanvideo", "t2v-480p", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", "8,326,608,160", {}
    ),
    "ltx-video": Published("ltxvideo", "0.9.5", "Lightricks/LTX-Video-0.9.5", "1.92 B", {}),
    "ltx2": Published("ltxvideo2", "dev", "Lightricks/LTX-2", "18,876,174,592", {}),
    "longcat-video": Published("longcat_video", "final", "meituan-longcat/LongCat-Video", "13.6 B", {}),
}
