"""A tiny but real Flux pipeline, from the parts of the tiny SD3 one."""

from __future__ import annotations

from pathlib import Path

import tiny_sd3


def make(folder: Path, double_blocks: int = 3, single_blocks: int = 4) -> None:
    """Like `tiny_sd3.make`, with model_family flux in the environment `tiny-probe`."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    tiny_sd3.make(folder, images=6)
    sd3 = folder / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * tiny_sd3.LATENT_CHANNELS,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=tiny_sd3.WIDTH // tiny_sd3.HEADS,
            num_attention_heads=tiny_sd3.HEADS,
            joint_attention_dim=tiny_sd3.WIDTH,
            pooled_projection_dim=tiny_sd3.CLIP_L_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=_rope(tiny_sd3.WIDTH // tiny_sd3.HEADS),
        ).to(torch.bfloat16)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(sd3 / "vae", torch_dtype=torch.bfloat16),
        text_encoder=CLIPTextModel.from_pretrained(sd3 / "text_encoder", dtype=torch.bfloat16),
        tokenizer=CLIPTokenizer.from_pretrained(sd3 / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(sd3 / "text_encoder_3", dtype=torch.bfloat16),
        tokenizer_2=T5TokenizerFast.from_pretrained(sd3 / "tokenizer_3"),
        transformer=transformer,
    ).save_pretrained(folder / "pipeline-flux")
    tiny_sd3.make_environment(
        folder,
        model_family="flux",
        model_flavour="dev",
        pretrained_model_name_or_path="pipeline-flux",
        seed=42,
    )


def make_assistant(folder: Path) -> None:
    """Writes `assistant/`, a LoRA for the attention of the double blocks, and the options that load it as one."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    weights = {}
    for block in range(3):
        for layer in ("to_q", "to_v"):
            name = f"transformer.transformer_blocks.{block}.attn.{layer}"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, tiny_sd3.WIDTH, generator=draw)
            weights[f"{name}.lora_B.weight"] = torch.randn(tiny_sd3.WIDTH, 4, generator=draw)
    (folder / "assistant").mkdir()
    save_file(weights, folder / "assistant" / "pytorch_lora_weights.safetensors")


def _rope(width: int) -> tuple[int, int, int]:
    """Flux splits a head's width over (reference, row, column) positions, all even."""
    axis = width // 6 * 2
    return width - 2 * axis, axis, axis


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]))
    make_assistant(Path(sys.argv[1]))
