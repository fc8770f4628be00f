"""The pipeline on disk, and what it draws."""

import copy
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from base.model import TextToVelocity
from base.pictures import RESOLUTION, Pictures
from base.vocabulary import T5_TOKENS

GUIDANCE = 4.0


def save_pipeline(
    folder: Path,
    model: TextToVelocity,
    weights: list[Tensor],
    vae: AutoencoderKL,
    clip: CLIPTokenizer,
    t5: T5TokenizerFast,
) -> None:
    """Writes it in bf16, with the given weights in place of the model's. A write that breaks leaves the old folder."""
    model, vae = copy.deepcopy(model), copy.deepcopy(vae)
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    model.bfloat16()
    drop_variance(vae)
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.bfloat16(),
        text_encoder=model.clip_1,
        tokenizer=clip,
        text_encoder_2=model.clip_2,
        tokenizer_2=copy.deepcopy(clip),
        text_encoder_3=model.t5,
        tokenizer_3=t5,
    )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@torch.no_grad()
def drop_variance(vae: AutoencoderKL) -> None:
    """The posterior keeps its mean and loses its variance.

    SimpleTuner draws each picture's latents once, and this VAE's posterior is half as wide as the latents themselves:
    an adapter then learns the noise of its pictures by heart. The VAEs of real models are nearly certain.
    """
    head = vae.encoder.conv_out
    channels = head.out_channels // 2
    head.weight[channels:] = 0
    head.bias[channels:] = -20  # the logarithm of the variance


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusion3Pipeline, prompts: list[str], steps: int, seed: int = 0) -> list[Image.Image]:
    return pipeline(
        prompts,
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=T5_TOKENS,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator(pipeline.device).manual_seed(seed),
    ).images


@torch.no_grad()
def sample_sheet(
    pipeline: StableDiffusion3Pipeline,
    pictures: Pictures,
    index: list[int],
    prompts: list[str],
    steps: int,
    columns: int = 12,
) -> Image.Image:
    """Under each true picture: the same through the VAE, then what the pipeline draws from its caption."""
    true = pictures.batch(torch.tensor(index, device=pipeline.device))
    coded = pipeline.vae.decode(pipeline.vae.encode(true.bfloat16()).latent_dist.mode()).sample
    rows = [to_images(true), to_images(coded), draw(pipeline, prompts, steps)]
    sheet = Image.new("RGB", (RESOLUTION * columns, RESOLUTION * 3 * math.ceil(len(index) / columns)), "white")
    for row, images in enumerate(rows):
        for number, image in enumerate(images):
            line, column = divmod(number, columns)
            sheet.paste(image, (column * RESOLUTION, (3 * line + row) * RESOLUTION))
    return sheet


def to_images(batch: Tensor) -> list[Image.Image]:
    pixels = ((batch.float().clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
