"""The noise level of a prepared batch as sigma in [0, 1] (1 = noise), and how to prescribe it: one rule a convention.

The family table names a rule; which convention a family follows was read in its `model.py` of SimpleTuner 4.10.1.

Shape letters: B samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Level = Callable[[Any, Mapping[str, Any]], torch.Tensor]
Draw = Callable[[int], torch.Tensor]
Prescribe = Callable[[Any, Draw], AbstractContextManager[None]]
Share = Callable[[Any, torch.Tensor], torch.Tensor]


def _sigma_itself(model: Any, sigma_B: torch.Tensor) -> torch.Tensor:
    return sigma_B


@dataclass(frozen=True)
class NoiseRule:
    """level(model, prepared_batch) -> sigma (B,) or one value a token (B, ...), before model_predict changes the batch.

    prescribe(model, draw): a context in which `model.prepare_batch` uses `draw(B)` -> (B,) float32 sigmas; None if the
    family does not let them be chosen. share(model, sigma_B) -> b / (a + b) in [0, 1], where a * latents + b * noise
    are the noisy latents at this sigma: the sigma itself in every convention but DDPM's.
    """

    level: Level
    prescribe: Prescribe | None
    share: Share = _sigma_itself


def sigma_of(rule: NoiseRule, model: Any, prepared_batch: Mapping[str, Any]) -> torch.Tensor:
    """The sigma of each sample as the batch has it, (B,) float32; the mean over tokens where there is one for each."""
    level = rule.level(model, prepared_batch).detach().float()
    return level.reshape(level.shape[0], -1).mean(dim=1)


def _sampled(timesteps: Callable[[torch.Tensor], torch.Tensor]) -> Prescribe:
    """For families that call `model.sample_flow_sigmas(batch, state)` -> (sigmas, timesteps)."""

    @contextmanager
    def prescribe(model: Any, draw: Draw) -> Iterator[None]:
        def sample_flow_sigmas(batch: dict[str, Any], state: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
            sigma_B = draw(batch["latents"].shape[0])
            return sigma_B, timesteps(sigma_B)

        model.sample_flow_sigmas = sample_flow_sigmas
        try:
            yield
        finally:
            del model.sample_flow_sigmas

    return prescribe


@contextmanager
def _drawn_edm_sigmas(model: Any, draw: Draw) -> Iterator[None]:
    """For families that call `model.prepare_edm_sigmas(count, device)`; clamped as the model itself clamps."""

    def prepare_edm_sigmas(count: int, device: torch.device) -> dict[str, torch.Tensor]:
        sigma_B = draw(count)
        return {"sigmas": (sigma_B / (1.0 - sigma_B)).clamp(model.sigma_min, model.sigma_max).to(device)}

    model.prepare_edm_sigmas = prepare_edm_sigmas
    try:
        yield
    finally:
        del model.prepare_edm_sigmas


def _sampled_unchanged(timesteps: Callable[[torch.Tensor], torch.Tensor], change: str) -> Prescribe:
    """`_sampled` for families whose method `change` maps the sampled sigmas to others: meanwhile to themselves."""

    @contextmanager
    def prescribe(model: Any, draw: Draw) -> Iterator[None]:
        with _sampled(timesteps)(model, draw):
            setattr(model, change, lambda sigmas: sigmas)
            try:
                yield
            finally:
                delattr(model, change)

    return prescribe


def step_level(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The fraction of the steps: 0 for the first, clean one, 1 for the last."""
    if model.PREDICTION_TYPE.is_flow_prediction:
        return batch["sigmas"]
    return batch["timesteps"].float() / (model.noise_schedule.config.num_train_timesteps - 1)


def step_share(model: Any, sigma_B: torch.Tensor) -> torch.Tensor:
    """A DDPM step mixes sqrt(p) * latents + sqrt(1 - p) * noise, where p is the schedule's `alphas_cumprod` there."""
    if model.PREDICTION_TYPE.is_flow_prediction:
        return sigma_B
    kept_T = model.noise_schedule.alphas_cumprod.to(sigma_B.device, torch.float32)
    step_B = (sigma_B * (len(kept_T) - 1)).round().long().clamp(0, len(kept_T) - 1)
    kept_B = kept_T[step_B]
    return (1 - kept_B).sqrt() / (kept_B.sqrt() + (1 - kept_B).sqrt())


@contextmanager
def _drawn_steps(model: Any, draw: Draw) -> Iterator[None]:
    """For families that draw whole DDPM steps: sigma in [k/T, (k+1)/T) is step k, so uniform is uniform over steps.

    `prepare_batch` draws the steps in more than one way, and then passes them to `noise_schedule.add_noise` as the
    tensor that stays in the batch: there they are replaced.
    """
    if model.PREDICTION_TYPE.is_flow_prediction:
        with _sampled(lambda sigma_B: sigma_B * 1000.0)(model, draw):
            yield
        return
    schedule = model.noise_schedule
    last_step = schedule.config.num_train_timesteps - 1
    add_noise = schedule.add_noise

    def add_noise_at_drawn_steps(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        timesteps.copy_((draw(latents.shape[0]) * (last_step + 1)).floor().clamp(max=last_step))
        noisy: torch.Tensor = add_noise(latents, noise, timesteps)
        return noisy

    schedule.add_noise = add_noise_at_drawn_steps
    try:
        yield
    finally:
        del schedule.add_noise


@contextmanager
def _sampled_twice_clean_ward(model: Any, draw: Draw) -> Iterator[None]:
    """For families whose `model.sample_flow_sigmas` gives (t, t), t = 1 - sigma, and is called twice for a batch.

    The second time the batch has the first time's `timesteps`, and keeps them.
    """

    def sample_flow_sigmas(batch: dict[str, Any], state: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        known = batch.get("timesteps")
        clean_B = 1.0 - draw(batch["latents"].shape[0]) if known is None else known
        return clean_B, clean_B

    model.sample_flow_sigmas = sample_flow_sigmas
    try:
        yield
    finally:
        del model.sample_flow_sigmas


@contextmanager
def _drawn_clean_ward(model: Any, draw: Draw) -> Iterator[None]:
    """For families whose `prepare_batch` draws t = 1 - sigma itself, from the user's own distribution if there is one.

    For the time being there is one.
    """
    model._uses_flow_cubic_schedule = lambda: True
    model._sample_flow_cubic_values = lambda count, device: 1.0 - draw(count)
    try:
        yield
    finally:
        del model._uses_flow_cubic_schedule, model._sample_flow_cubic_values


RULES: dict[str, NoiseRule] = {
    # sigmas are noise-ward, timesteps are 1000 * sigma: SimpleTuner's common flow matching.
    "flow": NoiseRule(lambda model, batch: batch["sigmas"], _sampled(lambda sigma_B: sigma_B * 1000.0)),
    # chroma (chroma/model.py, _apply_chroma_flow_schedule): as "flow", but a sampled s becomes s^2 below 0.5 and
    # 1 - (1 - s)^2 above, so none is between 0.25 and 0.75, and the latents are mixed again; the batch has the new
    # sigmas, in the latents' dtype.
    "flow_mapped": NoiseRule(
        lambda model, batch: batch["sigmas"],
        _sampled_unchanged(lambda sigma_B: sigma_B * 1000.0, "_adjust_chroma_sigmas"),
    ),
    # omnigen (omnigen/model.py, sample_flow_sigmas and prepare_batch_conditions): t * latents + (1 - t) * noise, and
    # `timesteps` and `sigmas` are both t.
    "flow_clean_ward": NoiseRule(lambda model, batch: 1 - batch["timesteps"], _sampled_twice_clean_ward),
    # cosmos (cosmos/model.py, prepare_batch): latents + sigma_edm * noise, sigma_edm in [0.002, 80]. After the model's
    # own scaling by 1 / (sigma_edm + 1) that is (1 - sigma) * latents + sigma * noise with this sigma.
    "edm": NoiseRule(lambda model, batch: 1 - 1 / (1 + batch["sigmas"].float()), _drawn_edm_sigmas),
    # anima (anima/model.py, sample_flow_sigmas): noise-ward sigmas, and the timesteps are the sigmas.
    "flow_in_sigmas": NoiseRule(lambda model, batch: batch["sigmas"], _sampled(lambda sigma_B: sigma_B)),
    # boogu_image, minimaxmusic and minimaxh3 (model.py, sample_flow_sigmas): noise-ward sigmas, and the timesteps are
    # 1 - sigma.
    "flow_in_clean": NoiseRule(lambda model, batch: batch["sigmas"], _sampled(lambda sigma_B: 1.0 - sigma_B)),
    # cosmos3 (cosmos3/model.py, prepare_batch): t * latents + (1 - t) * noise, `sigmas` are t and the timesteps 1000 t.
    "flow_in_clean_steps": NoiseRule(lambda model, batch: 1 - batch["timesteps"].float() / 1000, _drawn_clean_ward),
    # common.py, prepare_batch: whole steps 0 (clean) to T - 1 of a DDPM schedule. pixart, sd1x, sdxl and kolors change
    # to common flow matching, with sigmas, where the user's prediction_type is a flow.
    "ddpm": NoiseRule(step_level, _drawn_steps, step_share),
}
