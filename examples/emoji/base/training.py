"""The transformer's training: batches, updates, the mean of the weights, the schedule, the measurements."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from base.model import TextToVelocity
from base.settings import Settings
from base.steps import adamw, apply_gradients, captured, set_rate
from base.timing import CLOSING_SECONDS, Clock, Pace, Progress, time_limit
from base.vae import Latents
from base.vocabulary import CLIP_TOKENS, T5_TOKENS, Captions

CAPTION_DROPOUT = 0.1  # teaches the unconditional prediction that guidance needs
EVALUATED_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Schedule:
    """Learning rate over the training, as a share of the largest: warm-up, constant, then linearly to zero.

    The fall begins at 60% of the training, or earlier if the loss on the held-out images no longer falls; then the
    training also ends earlier, so that the fall always takes two fifths of it.
    """

    def __init__(self, warm_up_steps: int = 200, fall_from: float = 0.6, patience: int = 2):
        self.warm_up_steps, self.fall_from, self.patience = warm_up_steps, fall_from, patience
        self.end, self.lowest, self.rises = 1.0, math.inf, 0

    def rate(self, step: int, fraction: float) -> float:
        fall = (self.end - fraction) / (self.end - self.fall_from)
        return max(0.0, min((step + 1) / self.warm_up_steps, 1.0, fall))

    def see(self, held_out_loss: float, fraction: float) -> bool:
        """True if this loss makes the fall begin now."""
        if fraction >= self.fall_from:
            return False
        self.rises = self.rises + 1 if held_out_loss > self.lowest else 0
        self.lowest = min(self.lowest, held_out_loss)
        if self.rises < self.patience:
            return False
        self.fall_from, self.end = fraction, fraction / self.fall_from
        return True


def random_sigmas(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Half of them uniform, half concentrated on the middle (logit-normal)."""
    normal = torch.randn(count, device=device, generator=generator)
    uniform, coin = torch.rand(2, count, device=device, generator=generator)
    return torch.where(coin < 0.5, (1.2 * normal).sigmoid(), uniform)


@contextmanager
def backward_compiled_at_once() -> Iterator[None]:
    """Lets torch.compile make the backward pass in the main thread too, where a time limit can stop it."""
    if not hasattr(functorch_config, "force_non_lazy_backward_lowering"):
        yield
        return
    with functorch_config.patch(force_non_lazy_backward_lowering=True):
        yield


class Training:
    """The captions and latents of the training images come first, then those of the held-out images."""

    def __init__(
        self, model: TextToVelocity, latents: Latents, captions: Captions, train_count: int, settings: Settings
    ):
        self.model, self.latents, self.captions = model, latents, captions
        self.train_count, self.batch = train_count, settings.batch
        self.device = latents.held_out_NCHW.device
        self.parameters = list(model.parameters())
        self.mean_weights = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = adamw(self.parameters, self.device, weight_decay=settings.weight_decay, betas=(0.9, 0.95))
        self.generator = torch.Generator(self.device).manual_seed(settings.seed + 3)
        # The batch: `update` reads it from these tensors, `draw` writes into them.
        image = (self.batch, *latents.held_out_NCHW.shape[1:])
        self.clean, self.noise = torch.zeros(image, device=self.device), torch.zeros(image, device=self.device)
        self.sigma, self.loss = torch.zeros(self.batch, device=self.device), torch.zeros((), device=self.device)
        self.clip_numbers = torch.zeros(self.batch, CLIP_TOKENS, dtype=torch.long, device=self.device)
        self.t5_numbers = torch.zeros(self.batch, T5_TOKENS, dtype=torch.long, device=self.device)

    def _random(self, below: int) -> Tensor:
        return torch.randint(below, (self.batch,), device=self.device, generator=self.generator)

    def draw(self) -> None:
        """A new batch. One picture in four is as it is, not moved."""
        image, length, variants = self._random(self.train_count), self._random(3), len(self.latents.mean_VNCHW)
        variant = self._random(variants + variants // 3)
        variant = torch.where(variant < variants, variant, 0)
        mean, std = self.latents.mean_VNCHW[variant, image], self.latents.std_VNCHW[variant, image]
        self.clean.normal_(generator=self.generator).mul_(std).add_(mean)
        self.noise.normal_(generator=self.generator)
        self.sigma.copy_(random_sigmas(self.batch, self.device, self.generator))
        dropped = torch.rand(self.batch, 1, device=self.device, generator=self.generator) < CAPTION_DROPOUT
        self.clip_numbers.copy_(torch.where(dropped, self.captions.no_clip, self.captions.clip[image, length]))
        self.t5_numbers.copy_(torch.where(dropped, self.captions.no_t5, self.captions.t5[image, length]))

    def update(self) -> None:
        loss = self.model.losses(self.clean, self.noise, self.sigma, self.clip_numbers, self.t5_numbers).mean()
        apply_gradients(loss, self.parameters, self.optimizer)
        self.loss.copy_(loss.detach())

    @torch.no_grad()
    def average(self, step: int) -> None:
        torch._foreach_lerp_(self.mean_weights, self.parameters, 1 - min(0.999, (1 + step) / (10 + step)))

    @contextmanager
    def averaged_model(self) -> Iterator[TextToVelocity]:
        """The model with the mean weights in place and its blocks not compiled (another batch size would recompile)."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        blocks = list(self.model.transformer.transformer_blocks)
        calls = [block._compiled_call_impl for block in blocks]
        try:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.mean_weights)
            for block in blocks:
                block._compiled_call_impl = None
            yield self.model
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)
            for block, call in zip(blocks, calls, strict=True):
                block._compiled_call_impl = call

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """By sigma, with the captions of middle length and noise that is the same every time."""
        generator = torch.Generator(self.device).manual_seed(5)
        clean, losses = self.latents.held_out_NCHW, {}
        clip, t5 = self.captions.clip[self.train_count :, 1], self.captions.t5[self.train_count :, 1]
        with self.averaged_model() as model:
            for sigma in EVALUATED_SIGMAS:
                noise = torch.randn(clean.shape, device=self.device, generator=generator)
                sigmas = torch.full((len(clean),), sigma, device=self.device)
                parts = zip(*(rows.split(256) for rows in (clean, noise, sigmas, clip, t5)), strict=True)
                losses[str(sigma)] = round(torch.cat([model.losses(*part) for part in parts]).mean().item(), 4)
        return losses

    def compile_blocks(self, seconds: float, clock: Clock) -> bool:
        """Compiles each block (all but the last are alike, so twice) by running one update; False if that fails."""
        if self.device.type != "cuda" or seconds <= 0:
            return False
        blocks = list(self.model.transformer.transformer_blocks)
        begin = clock.seconds()
        try:
            with time_limit(min(seconds, max(1.0, clock.left() - CLOSING_SECONDS))), backward_compiled_at_once():
                for block in blocks:
                    block.compile(dynamic=False)
                self.update()
                torch.cuda.synchronize()
        except Exception as error:
            clock.log(f"blocks not compiled after {clock.seconds() - begin:.1f} s:", repr(error)[:300])
            for block in blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()
            return False
        clock.log(f"blocks compiled in {clock.seconds() - begin:.1f} s")
        return True

    def run(self, settings: Settings, clock: Clock, save: Callable[[dict], None]) -> dict:
        """Trains, calls `save` with the numbers so far at 60%, and returns the numbers."""
        self.draw()
        compiled = self.compile_blocks(settings.compile_seconds, clock)
        step, mode = captured(self.update, self.device, clock)
        mode = f"{mode}, blocks {'compiled' if compiled else 'not compiled'}"
        numbers: dict = {"batch": self.batch, "mode": mode, "history": []}
        progress, pace, schedule = Progress(clock, settings.seconds, settings.steps), Pace(self.device), Schedule()
        next_measurement, saved = 0.15, False
        while (fraction := progress.fraction()) < schedule.end:
            set_rate(self.optimizer, settings.learning_rate * schedule.rate(progress.step, fraction))
            self.draw()
            step()
            progress.step += 1
            self.average(progress.step)
            pace.step()
            if progress.report_due():
                speed = progress.step * self.batch / max(1e-9, progress.seconds())
                clock.log(f"step {progress.step} ({mode}): loss {self.loss.item():.4f}, {speed:.0f} images/s")
            if fraction >= next_measurement:
                next_measurement = fraction + 0.05
                if schedule.see(self._measure(numbers, progress, clock), fraction):
                    clock.log(f"the held-out loss no longer falls: the learning rate does from here, at {fraction:.0%}")
            if fraction >= 0.6 * schedule.end and not saved:
                save(numbers)
                saved = True
        self._measure(numbers, progress, clock)
        return numbers

    def _measure(self, numbers: dict, progress: Progress, clock: Clock) -> float:
        """Adds the held-out losses of now to the numbers; their mean."""
        losses, seconds = self.held_out_losses(), round(progress.seconds(), 1)
        numbers |= {"steps": progress.step, "seconds": seconds, "held_out_loss": losses}
        numbers["history"].append({"step": progress.step, "seconds": seconds, "held_out_loss": losses})
        clock.log(f"step {progress.step}: held-out loss by sigma", losses)
        return sum(losses.values()) / len(losses)
