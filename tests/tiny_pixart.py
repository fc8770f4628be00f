"""A tiny but real PixArt Sigma pipeline (DDPM steps, text by cross-attention), with parts of the tiny SD3 one."""

from __future__ import annotations

from pathlib import Path

import tiny_sd3


def make(folder: Path) -> None:
    """Like `tiny_sd3.make`, with model_family pixart in the environment `tiny-probe`."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5EncoderModel, T5TokenizerFast

    tiny_sd3.make(folder, images=6)
    sd3 = folder / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=tiny_sd3.HEADS,
            attention_head_dim=tiny_sd3.WIDTH // tiny_sd3.HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            norm_num_groups=8,
            cross_attention_dim=tiny_sd3.WIDTH,
            sample_size=16,
            patch_size=2,
            caption_channels=tiny_sd3.WIDTH,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            latent_channels=4,
        )
    PixArtSigmaPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(sd3 / "tokenizer_3"),
        text_encoder=T5EncoderModel.from_pretrained(sd3 / "text_encoder_3", dtype=torch.bfloat16),
        vae=vae.to(torch.bfloat16),
        transformer=transformer.to(torch.bfloat16),
        scheduler=DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    ).save_pretrained(folder / "pipeline-pixart")
    tiny_sd3.make_environment(
        folder,
        model_family="pixart",
        model_flavour="900M-1024-v0.6",
        pretrained_model_name_or_path="pipeline-pixart",
        pretrained_vae_model_name_or_path="pipeline-pixart",
        seed=42,
    )


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]))
