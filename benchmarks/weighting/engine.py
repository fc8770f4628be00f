"""E trainings at once on one frozen base: their losses, their steps, their judgement.

Shape letters: E trainings, S seeds, B samples, T steps, K kinds of noise, U sigmas, Q images; C, H, W of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weighting.arm import Training
from weighting.block import block_forward, frozen_of
from weighting.stack import Stack


@dataclass(frozen=True)
class Samples:
    """What the model sees and should say, (..., C, H, W) and so on; `images` and `captions` index Data."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    text: Tensor
    pooled: Tensor

    def at(self, place: Tensor) -> Samples:
        """Rows of the first dimension."""
        return Samples(*(tensor.index_select(0, place) for tensor in vars(self).values()))


class Engine:
    """The frozen base. compiled: whether blocks go through torch.compile. attention: see block.py. mixed: blocks in
    bf16 as torch.autocast does it, residuals and adapters in float32."""

    def __init__(self, model: nn.Module, *, compiled: bool = False, attention: str = "fused", mixed: bool = False):
        self.rebase(model)
        self.attention, self.mixed = attention, mixed
        self._block: Callable[..., tuple[Tensor, Tensor | None]] = block_forward
        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            self._block = torch.compile(block_forward, dynamic=False, fullgraph=True)

    def rebase(self, model: nn.Module) -> None:
        """Take another base of the same shapes; what is compiled stays."""
        self.model = model.requires_grad_(False).float().eval()
        self.device = next(model.parameters()).device
        self.heads = model.config.num_attention_heads
        self.frozen = [frozen_of(block) for block in model.transformer_blocks]

    def velocities(self, stack: Stack, samples: Samples, seed_E: Tensor) -> Tensor:
        """(E, B, C, H, W) what each training's model says. samples: (S, B, ...), seed_E: whose each sees."""
        model = self.model
        S, B, C, H, W = samples.clean.shape
        with torch.no_grad():
            share = samples.sigma[..., None, None, None]
            noisy = ((1 - share) * samples.clean + share * samples.noise).reshape(S * B, C, H, W)
            image = model.pos_embed(noisy)
            time = model.time_text_embed(samples.sigma.reshape(-1) * 1000, samples.pooled.reshape(S * B, -1))
            text = model.context_embedder(samples.text.reshape(S * B, *samples.text.shape[2:]))
            image, time, text = (x.reshape(S, B, *x.shape[1:]).index_select(0, seed_E) for x in (image, time, text))
            lit = F.silu(time)
        if torch.is_grad_enabled():
            # So that the first block is compiled as those after it are.
            image, text = image.requires_grad_(), text.requires_grad_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            for number, frozen in enumerate(self.frozen):
                weights = {
                    leaf.part: weight
                    for leaf, weight in zip(stack.leaves, stack.weights, strict=True)
                    if leaf.block == number
                }
                image, text = self._block(image, text, lit, weights, frozen, self.heads, self.attention)
        E = len(seed_E)
        out = model.proj_out(model.norm_out(image.flatten(0, 1), time.flatten(0, 1)))
        p = model.config.patch_size
        out = out.view(E, B, H // p, W // p, p, p, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return out.reshape(E, B, -1, H, W)

    def losses(self, stack: Stack, samples: Samples, seed_E: Tensor) -> Tensor:
        """(E, B) mean squared error of the velocity."""
        target = (samples.noise - samples.clean).index_select(0, seed_E)
        return (self.velocities(stack, samples, seed_E) - target).square().mean((2, 3, 4))

    def step(self, stack: Stack, samples: Samples, seed_E: Tensor) -> Tensor:
        """One training step of all E; (E,) losses before it."""
        stack.write_weights()
        loss_E = self.losses(stack, samples, seed_E).mean(1)
        stack.read_gradients(torch.autograd.grad(loss_E.sum(), stack.weights))
        stack.update()
        return loss_E.detach()

    def train(self, trainings: Sequence[Training], batches: Batches, steps: int) -> tuple[Stack, Tensor]:
        """The trained stack and (T, E) losses on the way."""
        stack = Stack(self.model, trainings)
        seeds = sorted({training.seed for training in trainings})
        seed_E = torch.tensor([seeds.index(training.seed) for training in trainings], device=self.device)
        losses = [self.step(stack, batches(seeds, step), seed_E) for step in range(steps)]
        stack.write_weights()
        return stack, torch.stack(losses) if losses else torch.zeros(0, len(trainings))

    @torch.no_grad()
    def judge(self, stack: Stack, samples: Samples, batch: int = 8) -> Tensor:
        """(E, N) losses of the same N samples; the last batch is filled up with the last one."""
        seed_E = torch.zeros(stack.E, dtype=torch.long, device=self.device)
        parts, N = [], len(samples.sigma)
        for start in range(0, N, batch):
            place = torch.arange(start, start + batch, device=self.device).clamp(max=N - 1)[None]
            rows = Samples(*(tensor[place] for tensor in vars(samples).values()))
            parts.append(self.losses(stack, rows, seed_E))
        return torch.cat(parts, dim=1)[:, :N]


Batches = Callable[[Sequence[int], int], Samples]
"""The samples (S, B, ...) of S seeds at a step."""
