"""The noise level of a prepared batch as sigma in [0, 1] (1 = noise), and how to prescribe it: one rule a convention.

The family table names a rule; which convention a family follows was read in its `model.py` of SimpleTuner 4.10.1.
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


@dataclass(frozen=True)
class NoiseRule:
    """level(model, prepared_batch) -> sigma (B,) or one value a token (B, ...), before model_predict changes the batch.

    prescribe(model, draw): a context in which `model.prepare_batch` uses `draw(B)` -> (B,) float32 sigmas; None if the
    family does not let them be chosen.
    """

    level: Level
    prescribe: Prescribe | None


def sigma_of(rule: NoiseRule, model: Any, prepared_batch: Mapping[str, Any]) -> torch.Tensor:
    """The sigma of each sample, (B,) float32 in [0, 1]; the mean over tokens where a batch has one for each."""
    level = rule.level(model, prepared_batch).detach().float()
    return level.reshape(level.shape[0], -1).mean(dim=1).clamp(0, 1)


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


RULES: dict[str, NoiseRule] = {
    # sigmas are noise-ward, timesteps are 1000 * sigma: SimpleTuner's common flow matching.
    "flow": NoiseRule(lambda model, batch: batch["sigmas"], _sampled(lambda sigma_B: sigma_B * 1000.0)),
    # <G1>
    # <G2>
    # <G3>
    # <G4>
    # <G5>
}
