"""A tiny but real Wan 2.1 pipeline (video, text by cross-attention), with parts of the tiny SD3 one, and clips."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_sd3

CLIPS = 4
FRAMES = 9
"""Latent frames: (FRAMES - 1) / 4 + 1."""
PIXELS = 64


def make(folder: Path) -> None:
    """Like `tiny_sd3.make`, with model_family wan in the environment `tiny-probe`, which reads `clips/`."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    tiny_sd3.make(folder, images=CLIPS)
    tokenizer = T5TokenizerFast.from_pretrained(folder / "pipeline" / "tokenizer_3")
    head = tiny_sd3.WIDTH // tiny_sd3.HEADS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=tiny_sd3.HEADS,
            attention_head_dim=head,
            in_channels=tiny_sd3.LATENT_CHANNELS,
            out_channels=tiny_sd3.LATENT_CHANNELS,
            text_dim=tiny_sd3.WIDTH,
            freq_dim=64,
            ffn_dim=2 * tiny_sd3.WIDTH,
            num_layers=4,
        )
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=tiny_sd3.WIDTH,
                d_kv=head,
                d_ff=2 * tiny_sd3.WIDTH,
                num_layers=2,
                num_heads=tiny_sd3.HEADS,
            )
        )
        vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=vae,
        transformer=torch.nn.Module.to(transformer, torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder / "pipeline-wan")
    make_clips(folder / "photographs", folder / "clips")
    tiny_sd3.make_environment(
        folder,
        model_family="wan",
        model_flavour="t2v-480p-1.3b-2.1",
        pretrained_model_name_or_path="pipeline-wan",
        pretrained_vae_model_name_or_path="pipeline-wan",
        seed=42,
    )
    path = folder / "config" / "tiny-probe" / "multidatabackend.json"
    clips, captions = json.loads(path.read_text())
    clips |= {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": "clips",
        "resolution": PIXELS,
        "video": {"num_frames": FRAMES, "min_frames": FRAMES},
    }
    path.write_text(json.dumps([clips, captions], indent=2) + "\n")


def make_clips(photographs: Path, clips: Path) -> None:
    """A clip for each photograph: its left part, panned to the right; with the photograph's captions."""
    import imageio.v3 as iio

    clips.mkdir()
    for captions in sorted(photographs.glob("*.txt")):
        (source,) = (path for path in photographs.glob(f"{captions.stem}.*") if path != captions)
        image = iio.imread(source)
        side = min(image.shape[:2]) // 3 * 2
        frames = [image[:side, 3 * frame : 3 * frame + side] for frame in range(2 * FRAMES)]
        iio.imwrite(clips / f"{captions.stem}.mp4", frames, fps=16)
        (clips / captions.name).write_text(captions.read_text())


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]))
