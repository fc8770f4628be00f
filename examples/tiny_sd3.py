#!/usr/bin/env python3
"""Make a tiny but real SD3.5-shaped pipeline, a set of photographs and a SimpleTuner environment for them.

    python examples/tiny_sd3.py --out tiny
    cd tiny && simpletuner train env=tiny-probe

Every part is the class that Stable Diffusion 3.5 uses (two CLIP text models with projection, a T5 encoder, an
AutoencoderKL with 16 latent channels, an SD3Transformer2DModel with RMS-normed queries and keys, a
flow-matching scheduler), only narrow and shallow, with random weights from a seed. Nothing is downloaded: the
photographs lie inside the wheels of scikit-image and scikit-learn. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BLOCKS = 6
WIDTH = 96  # 2^5 * 3: LoKr can split it by 1, 2, 3, 4, 6, 8, 12, 16 and 24, so that different factors differ
HEADS = 6
CLIP_L_WIDTH = 32
CLIP_G_WIDTH = 48
LATENT_CHANNELS = 16

# With equal random blocks every row of the heatmap would look like the next and the recipe would have nothing
# to tell apart. So each block's writes to a stream (the last projections of its attention and its
# feed-forward) are scaled: block 0 dominates, as it does in the trained SD3.5 Large, the middle does little,
# the end rises again.
IMAGE_GAIN = (8.0, 4.0, 2.0, 0.8, 3.0, 4.0)
TEXT_GAIN = (3.0, 2.0, 0.5, 1.2, 2.2)
# The default initialisation of the timestep embedder leaves the gates nearly independent of sigma. This gain
# on its last projection makes the heatmap change along the bins too; and as in a trained model the change is
# smooth, because only the slow half of the sines and cosines of the timestep is read.
TIMESTEP_GAIN = 16.0
# A random encoder gives flat means under a posterior of unit variance, so that every photograph would be
# cached as noise. The gain brings the scaled means near unit variance, the log variance makes the posterior
# narrow (std 0.02).
LATENT_GAIN = 2.0
LATENT_LOG_VARIANCE = -8.0

SHORT_SIDE_PIXELS = 192

# name -> (package, path inside it, captions from short to long). All lie inside the wheels (nothing is
# downloaded) and are public domain, CC0, without known restrictions or, china and flower, CC BY 2.0.
PHOTOGRAPHS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "astronaut": (
        "skimage",
        "data/astronaut.png",
        (
            "an astronaut",
            "a portrait of a smiling astronaut in an orange suit",
            "a studio portrait of astronaut Eileen Collins in an orange launch suit, with a flag to her "
            "right and a model of the space shuttle behind her, soft light from the front",
        ),
    ),
    "chelsea": (
        "skimage",
        "data/chelsea.png",
        (
            "a cat",
            "the face of a ginger cat, looking past the camera",
            "a close photograph of the face of a ginger tabby cat with green eyes, white whiskers and a pink "
            "nose; the cat looks past the camera and the cloth behind it is out of focus",
        ),
    ),
    "coffee": (
        "skimage",
        "data/coffee.png",
        (
            "coffee",
            "a cup of coffee on a wooden table",
            "an espresso in a red cup that is white inside, on a red saucer with a small spoon, seen from "
            "above at an angle, on a table of reddish wood",
        ),
    ),
    "rocket": (
        "skimage",
        "data/rocket.jpg",
        (
            "a rocket",
            "a rocket on the launch pad before sunrise",
            "a tall white rocket stands on its launch pad between steel towers, lit by floodlights under a "
            "deep blue sky, with a thin band of orange light at the horizon",
        ),
    ),
    "hubble": (
        "skimage",
        "data/hubble_deep_field.jpg",
        (
            "galaxies",
            "many small galaxies on a black sky",
            "the Hubble eXtreme Deep Field: thousands of galaxies of all colours and ages, scattered over a "
            "black sky, a few of them spirals, most of them only a few pixels wide",
        ),
    ),
    "camera": (
        "skimage",
        "data/camera.png",
        (
            "a photographer",
            "a black and white photograph of a man with a camera",
            "a man in a dark coat looks through a camera on a tripod, in black and white, with a lawn and "
            "distant buildings in the haze behind him",
        ),
    ),
    "coins": (
        "skimage",
        "data/coins.png",
        (
            "old coins",
            "rows of ancient coins, black and white",
            "twenty-four worn Greek coins from Pompeii in four rows on a dark cloth, lit from the side, so "
            "that the heads on them stand out",
        ),
    ),
    "moon": (
        "skimage",
        "data/moon.png",
        (
            "the moon",
            "craters on the surface of the moon",
            "a grey photograph of the surface of the moon with one round crater at the upper left, smaller "
            "ones around it and dark shadows at the bottom, low in contrast",
        ),
    ),
    "brick": (
        "skimage",
        "data/brick.png",
        (
            "bricks",
            "a wall of even bricks, black and white",
            "a flat brick wall that fills the whole frame, in black and white, with narrow joints and a rough surface",
        ),
    ),
    "grass": (
        "skimage",
        "data/grass.png",
        (
            "grass",
            "dense grass from above, black and white",
            "a lawn seen straight from above, dry blades and small round leaves, every one of them in focus, "
            "in black and white, without any path or person",
        ),
    ),
    "china": (
        "sklearn",
        "datasets/images/china.jpg",
        (
            "a temple",
            "a Chinese temple under a blue sky",
            "a Chinese tower with golden roofs and red walls rises over the trees on a hill; behind it lie a "
            "lake, low hills in the haze and a pale blue sky",
        ),
    ),
    "flower": (
        "sklearn",
        "datasets/images/flower.jpg",
        (
            "a flower",
            "an orange dahlia in front of green leaves",
            "a round dahlia with many pale orange petals, sharp in front of dark green leaves that are out "
            "of focus, and the edge of a second flower below it",
        ),
    ),
}


def _photograph_path(package: str, path: str) -> Path:
    """Where the photograph lies in the installed package. Raises FileNotFoundError if it is missing."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = Path(folder) / path
        if found.is_file():
            return found
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    raise FileNotFoundError(f"{package}/{path} is not installed; get it with: pip install {distribution}")


def make_photographs(folder: Path, count: int = len(PHOTOGRAPHS), seed: int = 0) -> list[Path]:
    """Writes `count` images, each with a text file of captions, one a line, and returns the images' paths.

    The first twelve are the photographs, scaled to a short side of 192 pixels (their shapes differ, so they
    fall into different aspect buckets); the ones after that are crops of them, chosen by the seed.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = list(PHOTOGRAPHS)
    written = []
    for index in range(count):
        name = names[index % len(names)]
        package, path, captions = PHOTOGRAPHS[name]
        source = _photograph_path(package, path)
        with Image.open(source) as opened:
            image = opened.convert("RGB")
        if index >= len(names):
            image = image.crop(_crop_box(image.size, random.Random(f"{seed}/{index}")))
        scale = SHORT_SIDE_PIXELS / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
        target = folder / f"{index:03d}-{name}{source.suffix}"
        image.save(target, quality=90) if source.suffix == ".jpg" else image.save(target)
        target.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        written.append(target)
    return written


def _crop_box(size: tuple[int, int], chance: random.Random) -> tuple[int, int, int, int]:
    """A box of half to nine tenths of each side, anywhere in it: left, top, right, bottom in pixels."""
    spans = []
    for pixels in size:
        span = round(pixels * chance.uniform(0.5, 0.9))
        start = chance.randint(0, pixels - span)
        spans.append((start, start + span))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from the seed inside, the caller's random state untouched outside."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level vocabulary, no merges: 256 bytes, the same at a word's end, start and end token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}, []


def t5_vocabulary() -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: the words of the captions, single characters for all else."""
    lines = [line for _, _, captions in PHOTOGRAPHS.values() for line in captions]
    words = Counter(word for line in lines for word in line.split())
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    known = {piece for piece, _ in pieces}
    for word, times in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        pieces.append((f"\u2581{word}", -8.0 / (1 + times)))
        known.add(f"\u2581{word}")
    pieces += [(character, -10.0) for character in characters if character not in known]
    return pieces


def make_pipeline(folder: Path, seed: int = 0, dual_attention: Sequence[int] = ()) -> None:
    """Saves the pipeline in diffusers' folder layout.

    `dual_attention`: the blocks with a second attention on the image stream (in SD3.5 Medium the first 13).
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    vocabulary, merges = clip_vocabulary()

    def clip_tokenizer() -> CLIPTokenizer:
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

    def clip_text_model(width: int, activation: str) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=width // 16,
                hidden_act=activation,
                bos_token_id=vocabulary["<|startoftext|>"],
                eos_token_id=vocabulary["<|endoftext|>"],
                pad_token_id=vocabulary["<|endoftext|>"],
            )
        )

    tokenizer_3 = T5TokenizerFast(vocab=t5_vocabulary(), extra_ids=0, model_max_length=512)
    with _seeded(seed):
        text_encoder = clip_text_model(CLIP_L_WIDTH, "quick_gelu")
        text_encoder_2 = clip_text_model(CLIP_G_WIDTH, "gelu")
        text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_3),
                d_model=WIDTH,
                d_kv=WIDTH // HEADS,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=HEADS,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=LATENT_CHANNELS,
            sample_size=128,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        transformer = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            num_layers=BLOCKS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
            out_channels=LATENT_CHANNELS,
            pos_embed_max_size=32,
            dual_attention_layers=tuple(dual_attention),
            qk_norm="rms_norm",
        )
    with torch.no_grad():
        vae.encoder.conv_out.weight[:LATENT_CHANNELS] *= LATENT_GAIN
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] += LATENT_LOG_VARIANCE
        timestep_embedder = transformer.time_text_embed.timestep_embedder
        timestep_embedder.linear_2.weight *= TIMESTEP_GAIN
        cosines, sines = timestep_embedder.linear_1.weight.chunk(2, dim=1)  # each from fast to slow
        for waves in (cosines, sines):
            waves[:, : waves.shape[1] // 2] = 0
        for block, gain in zip(transformer.transformer_blocks, IMAGE_GAIN, strict=True):
            block.attn.to_out[0].weight *= gain
            block.ff.net[2].weight *= gain
        # The last block is context_pre_only: it reads the text stream but writes nothing to it.
        for block, gain in zip(transformer.transformer_blocks[:-1], TEXT_GAIN, strict=True):
            block.attn.to_add_out.weight *= gain
            block.ff_context.net[2].weight *= gain
    # bfloat16 on disk as in the published SD3.5 folders: then loading in bfloat16 or float32 gives the same
    # numbers. (torch's own `to`, because the one of diffusers warns about a list of float32 modules that is
    # empty here.)
    for model in (transformer, vae, text_encoder, text_encoder_2, text_encoder_3):
        torch.nn.Module.to(model, torch.bfloat16)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(folder)


def make_environment(folder: Path, name: str = "tiny-probe", **options: object) -> Path:
    """Writes config/NAME with the probe switched on; `options` add to config.json or replace what is there.

    The probe records 120 samples; a training with the same options makes 12 steps.
    All paths in it are relative to `folder`, which has to be the current directory of `simpletuner train`.
    Returns the path of config.json.
    """
    environment = folder / "config" / name
    environment.mkdir(parents=True, exist_ok=True)
    here = f"config/{name}"
    config = {
        "layerprobe": True,
        "layerprobe_samples": 120,
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": f"{here}/lycoris_config.json",
        "model_family": "sd3",
        "model_flavour": "medium",
        "pretrained_model_name_or_path": "pipeline",
        "data_backend_config": f"{here}/multidatabackend.json",
        "output_dir": f"output/{name}",
        "resolution": 128,
        "resolution_type": "pixel",
        "minimum_image_size": 0,
        "aspect_bucket_rounding": 2,
        "train_batch_size": 1,
        "num_train_epochs": 0,
        "max_train_steps": 12,
        "caption_dropout_probability": 0.1,
        "learning_rate": 1e-4,
        "optimizer": "adamw_bf16",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "bf16",
        "base_model_precision": "no_change",
        "gradient_checkpointing": False,
        "checkpoint_step_interval": 1000,
        "validation_disable": True,
        "disable_benchmark": True,
        "report_to": "none",
        "seed": 0,
    }
    # The LoKr config that a user would start from: one factor for every block.
    lycoris_config = {
        "algo": "lokr",
        "multiplier": 1.0,
        "linear_dim": 1000000,
        "linear_alpha": 1,
        "full_matrix": True,
        "factor": 8,
        "apply_preset": {"target_module": ["Attention", "FeedForward"]},
    }
    backends = [
        {
            "id": "photographs",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": "photographs",
            "caption_strategy": "textfile",
            "metadata_backend": "discovery",
            "crop": True,
            "crop_style": "random",
            "crop_aspect": "square",
            "resolution": 128,
            "resolution_type": "pixel",
            "minimum_image_size": 0,
            "repeats": 9,
            "cache_dir_vae": "cache/vae",
        },
        {
            "id": "captions",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": "cache/text",
        },
    ]
    for file, content in (
        ("config.json", config | options),
        ("lycoris_config.json", lycoris_config),
        ("multidatabackend.json", backends),
    ):
        (environment / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return environment / "config.json"


def make(folder: Path, seed: int = 0, images: int = len(PHOTOGRAPHS), dual_attention: Sequence[int] = ()) -> None:
    """Writes the whole thing: pipeline/, photographs/ and config/tiny-probe/ in `folder`."""
    make_photographs(folder / "photographs", images, seed)
    make_pipeline(folder / "pipeline", seed, dual_attention)
    make_environment(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and crops (default: 0)")
    parser.add_argument(
        "--images",
        type=int,
        default=len(PHOTOGRAPHS),
        help="how many images; above %(default)s crops of the photographs are added (default: %(default)s)",
    )
    parser.add_argument(
        "--dual-attention",
        default="",
        metavar="BLOCKS",
        help="comma-separated blocks with a second attention, as in SD3.5 Medium, e.g. 0,1,2 (default: none)",
    )
    chosen = parser.parse_args(arguments)
    try:
        dual_attention = tuple(int(block) for block in chosen.dual_attention.split(",") if block)
    except ValueError:
        parser.error(f"--dual-attention is {chosen.dual_attention!r}; expected block numbers such as 0,1,2")
    if not set(dual_attention) <= set(range(BLOCKS)):
        parser.error(f"--dual-attention is {chosen.dual_attention!r}; the blocks are 0 to {BLOCKS - 1}")
    if chosen.images < 1:
        parser.error(f"--images is {chosen.images}; at least 1 is needed")
    if chosen.out.exists() and (not chosen.out.is_dir() or any(chosen.out.iterdir())):
        parser.error(f"{chosen.out} exists and is not an empty folder; choose another --out")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        make(chosen.out, chosen.seed, chosen.images, dual_attention)
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    size_bytes = sum(file.stat().st_size for file in (chosen.out / "pipeline").rglob("*") if file.is_file())
    print(f"{chosen.out}: a pipeline of {size_bytes / 1e6:.1f} MB and {chosen.images} images")
    print(f"next: cd {chosen.out} && simpletuner train env=tiny-probe")
    return 0


if __name__ == "__main__":
    sys.exit(main())
