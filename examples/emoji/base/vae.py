"""The VAE: its shape, its training, and the latents that it makes of the pictures."""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from base.pictures import RESOLUTION, Pictures
from base.settings import Settings
from base.steps import adamw, apply_gradients, captured, mixed_precision, set_rate
from base.timing import Clock, Pace, Progress

LATENT_CHANNELS = 16
LATENT_SIZE = RESOLUTION // 8


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,  # both are set once the latents are known
        scaling_factor=1.0,
    )


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (pixels, their edges, and a weak pull of the latents to a normal distribution), and its pixel part."""
    with mixed_precision(images.device):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
    absolute = error.abs().mean()
    return absolute + error.square().mean() + 0.5 * edges + 2e-5 / LATENT_CHANNELS * divergence, absolute


def train_vae(vae: AutoencoderKL, pictures: Pictures, index: Tensor, settings: Settings, clock: Clock) -> dict:
    """Trains on the pictures in `index` and returns the numbers of it."""
    device, batch = index.device, settings.vae_batch
    generator = torch.Generator(device).manual_seed(settings.seed + 1)
    vae.to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = adamw(parameters, device, weight_decay=0.0, betas=(0.9, 0.99))
    images = torch.empty(batch, 3, RESOLUTION, RESOLUTION, device=device, memory_format=torch.channels_last)
    noise = torch.empty(batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, device=device)
    absolute = torch.zeros((), device=device)

    def draw() -> None:
        choice = torch.randint(len(index), (batch,), device=device, generator=generator)
        images.copy_(pictures.batch(index[choice], generator))
        noise.normal_(generator=generator)

    def update() -> None:
        loss, pixel_error = vae_loss(vae, images, noise)
        apply_gradients(loss, parameters, optimizer)
        absolute.copy_(pixel_error.detach())

    draw()
    step, mode = captured(update, device, clock)
    progress, pace = Progress(clock, settings.vae_seconds, settings.vae_steps), Pace(device)
    while (fraction := progress.fraction()) < 1:
        warm_up, decay = min(1, (progress.step + 1) / 100), 0.5 * (1 + math.cos(math.pi * fraction))
        set_rate(optimizer, settings.vae_learning_rate * warm_up * (0.02 + 0.98 * decay))
        draw()
        step()
        progress.step += 1
        pace.step()
        if progress.report_due():
            clock.log(f"VAE step {progress.step} ({mode}): mean absolute error {absolute.item():.4f}")
    vae.eval().requires_grad_(False)
    numbers = {"steps": progress.step, "batch": batch, "seconds": round(progress.seconds(), 1), "mode": mode}
    return numbers | {"absolute_error": round(absolute.item(), 5)}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean and standard deviation of the latents, not yet scaled: (2, N, C, H, W)."""
    parts = []
    for some in index.split(256):
        images = pictures.batch(some, generator).contiguous(memory_format=torch.channels_last)
        with mixed_precision(index.device):
            posterior = vae.encode(images).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std]).float().contiguous())
    return torch.cat(parts, dim=1)


class Latents:
    """Scaled latents of the training pictures in all variants (the first is not moved), and of the held-out ones."""

    def __init__(
        self, vae: AutoencoderKL, pictures: Pictures, train: Tensor, held_out: Tensor, variants: int, seed: int
    ):
        """Also tells the VAE its shift and scaling factor: the plain training pictures then have mean 0 and std 1."""
        generator = torch.Generator(train.device).manual_seed(seed + 2)
        plain = encode(vae, pictures, train)
        self.shift, self.scale = plain[0].mean().item(), 1 / plain[0].std().item()
        moved = [encode(vae, pictures, train, generator) for _ in range(variants - 1)]
        scaled = torch.stack([self._scaled(latents).bfloat16() for latents in (plain, *moved)], dim=1)
        self.mean_VNCHW, self.std_VNCHW = scaled
        self.held_out_NCHW = self._scaled(encode(vae, pictures, held_out))[0]
        vae.register_to_config(scaling_factor=self.scale, shift_factor=self.shift)

    def _scaled(self, latents: Tensor) -> Tensor:
        return torch.stack([(latents[0] - self.shift) * self.scale, latents[1] * self.scale])
