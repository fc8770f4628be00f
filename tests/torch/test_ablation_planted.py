"""A model in which some blocks do nothing and one does most: what is recorded of it names exactly these."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from small import SMALL, Denoiser
from test_session import session
from torch import nn

import simpletuner_layerprobe as layerprobe

IDLE, NEEDED, BLOCKS = (2, 5), 7, 9


class Scaled(nn.Module):
    """Adds something that depends on what it gets, of this size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(16, 16), size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.size * self.linear(hidden_states).tanh()


def test_the_findings_name_the_blocks_that_were_planted(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = [0.0 if number in IDLE else 1.5 if number == NEEDED else 0.3 for number in range(BLOCKS)]
    model = Denoiser(*map(Scaled, sizes))
    run = session(tmp_path, monkeypatch, ablation="blocks", ablation_samples=400)
    run.family, run.idle_parameter = SMALL, nn.Parameter(torch.zeros(()))
    with torch.no_grad(), run.recording(model, "", {}, {}, to_come=400):
        for _ in range(100):
            sigma_B = torch.rand(4)
            noise, clean = torch.randn(2, 4, 6, 16)
            noisy = (1 - sigma_B.view(-1, 1, 1)) * clean + sigma_B.view(-1, 1, 1) * noise
            # What the model says is right, but for some noise of its own.
            target = model(noisy) + 0.3 * torch.randn(4, 6, 16)
            asked = SimpleNamespace(get_prediction_target=lambda batch, target=target: target)
            batch = {"sigmas": sigma_B, "latents": clean, "noise": noise, "noisy_latents": noisy}
            run.arm()
            run.forward(asked, batch, lambda batch: {"model_prediction": model(batch["noisy_latents"])})
            run.commit()
    recorded = layerprobe.load(tmp_path / "run")
    assert recorded.samples == 400
    made = recorded.ablation()
    assert made.needed == (NEEDED,) and set(made.hardly) == set(IDLE)
    assert not recorded.distances("block", "ablation")[:, IDLE].any()
    contribution = recorded.contribution("ablation")
    assert contribution.value_L[NEEDED] == 1 and sorted(contribution.least(2)) == list(IDLE)
    said = " ".join(str(section) for section in recorded.findings("ablation"))
    assert f"blocks.{NEEDED}" in said
