"""The task: learn the fluent style from 200 pictures, be judged on pictures that were held out.

Latents and text embeddings are computed once, by the pipeline's own VAE and text encoders; all of it fits in memory.
Shape letters: Q images, V captions of each, N tokens, D and P widths of text, C x H x W of latents, U sigmas, K noises.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weighting.engine import Samples

STYLE, RESOLUTION, TOKENS, CAPTIONS = "fluent", 128, 77, 3
BATCH = 8
SIGMAS, NOISES = 10, 1
TUNING, SPLIT_SEED, JUDGE_SEED = 20, 1, 2
VAE_SEED = 3


@dataclass(frozen=True)
class Pictures:
    """clean_QCHW, text_QVND, pooled_QVP, on one device."""

    clean: Tensor
    text: Tensor
    pooled: Tensor

    def to(self, device: torch.device | str) -> Pictures:
        return Pictures(*(tensor.to(device) for tensor in vars(self).values()))

    def __len__(self) -> int:
        return len(self.clean)


def read_pictures(emoji: Path) -> tuple[list[tuple[Image.Image, tuple[str, ...]]], ...]:
    """The style's training and held-out pictures with their captions, as unpack.py of the example writes them."""
    sys.path.insert(0, str(emoji))
    from emoji_set import EmojiSet

    data = EmojiSet.load(emoji / "pictures.npz")
    train: list[tuple[Image.Image, tuple[str, ...]]] = []
    held_out: list[tuple[Image.Image, tuple[str, ...]]] = []
    for number, one in enumerate(data.emojis):
        if one.style == STYLE:
            picture = Image.open(io.BytesIO(data.images[number])).convert("RGB")
            sized = picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
            (held_out if data.is_held_out(number) else train).append((sized, one.captions()))
    return train, held_out


@torch.no_grad()
def encode(pipeline: Path, pictures: Sequence[tuple[Image.Image, tuple[str, ...]]]) -> Pictures:
    """Latents drawn once from the VAE's posterior, shifted and scaled as SimpleTuner does, and the captions' states."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    vae, generator = pipe.vae, torch.Generator().manual_seed(VAE_SEED)
    clean, text, pooled = [], [], []
    for picture, _ in pictures:
        pixels_1CHW = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        latent = vae.encode(pixels_1CHW).latent_dist.sample(generator)
        clean.append((latent - vae.config.shift_factor) * vae.config.scaling_factor)
    captions = [caption for _, each in pictures for caption in each]
    for start in range(0, len(captions), 60):
        states, _, pooled_NP, _ = pipe.encode_prompt(
            prompt=captions[start : start + 60], prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            max_sequence_length=TOKENS, device="cpu",
        )  # fmt: skip
        text.append(states)
        pooled.append(pooled_NP)
    return Pictures(
        torch.cat(clean),
        torch.cat(text).unflatten(0, (len(pictures), CAPTIONS)),
        torch.cat(pooled).unflatten(0, (len(pictures), CAPTIONS)),
    )


@dataclass(frozen=True)
class Task:
    """The training pictures and the held-out ones, and which of these choose the learning rate."""

    train: Pictures
    held_out: Pictures

    def save(self, path: Path) -> None:
        torch.save({name: vars(part) for name, part in vars(self).items()}, path)

    @staticmethod
    def load(path: Path, device: torch.device | str) -> Task:
        read = torch.load(path, weights_only=True)
        return Task(*(Pictures(**read[name]).to(device) for name in ("train", "held_out")))

    def split(self) -> dict[str, list[int]]:
        """The held-out images that choose the learning rate, and those that judge."""
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        count = len(order) * TUNING // 120
        return {"tuning": sorted(order[:count]), "judging": sorted(order[count:])}

    def judge_samples(self, images: Sequence[int]) -> Samples:
        """Q * U * K samples in this order: each image at ten strata of sigma, K noises at each, the middle caption.

        Drawn for all held-out images at once, so that an image has the same sigmas and noises in any list.
        """
        part, device = self.held_out, self.held_out.clean.device
        generator = torch.Generator().manual_seed(JUDGE_SEED)
        Q = len(part)
        noise_QUKCHW = torch.randn((Q, SIGMAS, NOISES, *part.clean.shape[1:]), generator=generator)
        jitter_U = torch.rand(SIGMAS, generator=generator)
        sigma_U = (torch.arange(SIGMAS) + jitter_U) / SIGMAS
        of = torch.tensor(images)
        each = SIGMAS * NOISES
        repeated = of.repeat_interleave(each).to(device)
        return Samples(
            part.clean[repeated],
            noise_QUKCHW[of].flatten(0, 2).to(device),
            sigma_U.repeat_interleave(NOISES).repeat(len(images)).to(device),
            part.text[repeated, 1],
            part.pooled[repeated, 1],
        )

    def batches(self, seeds: Sequence[int], steps: int) -> TrainingBatches:
        return TrainingBatches(self.train, seeds, steps)


class TrainingBatches:
    """The batches of some seeds: order of the pictures, captions, sigma and noise depend on the seed alone."""

    def __init__(self, part: Pictures, seeds: Sequence[int], steps: int):
        self.part, self.seeds = part, sorted(set(seeds))
        device, count = part.clean.device, steps * BATCH
        drawn = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(10_000 + seed)
            epochs = -(-count // len(part))
            order = torch.cat([torch.randperm(len(part), generator=generator) for _ in range(epochs)])[:count]
            caption = torch.randint(CAPTIONS, (count,), generator=generator)
            sigma = torch.rand(count, generator=generator)
            noise = torch.randn((count, *part.clean.shape[1:]), generator=generator)
            drawn.append((order, caption, sigma, noise))
        stacked = [torch.stack(each).to(device) for each in zip(*drawn, strict=True)]
        self.image_SI, self.caption_SI, self.sigma_SI, self.noise_SICHW = stacked

    def __call__(self, seeds: Sequence[int], step: int) -> Samples:
        """(S, B, ...) of these seeds, which must be all."""
        if list(seeds) != self.seeds:
            raise ValueError(f"drawn for the seeds {self.seeds}, asked for {list(seeds)}")
        now = slice(step * BATCH, (step + 1) * BATCH)
        image, caption = self.image_SI[:, now], self.caption_SI[:, now]
        return Samples(
            self.part.clean[image],
            self.noise_SICHW[:, now],
            self.sigma_SI[:, now],
            self.part.text[image, caption],
            self.part.pooled[image, caption],
        )


def load_transformer(pipeline: Path, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The base in float32, frozen."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer", torch_dtype=torch.float32)
    return model.requires_grad_(False).eval().to(device)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
