"""The share of noise by least squares, against mixes that are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails

from simpletuner_layerprobe.training.noise import RULES, sigma_of
from simpletuner_layerprobe.training.noise_check import NoiseCheck, how_checked, noise_share

FLOW = SimpleNamespace(PREDICTION_TYPE=SimpleNamespace(is_flow_prediction=True))
B = 8


def ddpm() -> SimpleNamespace:
    """A model of DDPM steps with PixArt's schedule."""
    kept_T = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), dim=0)
    schedule = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000), alphas_cumprod=kept_T)
    return SimpleNamespace(PREDICTION_TYPE=SimpleNamespace(is_flow_prediction=False), noise_schedule=schedule)


def flow_batch(sigma_B: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """Mixed as SimpleTuner mixes: sigma is rounded to the dtype of the latents first."""
    latents, noise = (torch.randn(len(sigma_B), *shape).to(dtype) for _ in range(2))
    grid = sigma_B.view(-1, *[1] * len(shape)).to(dtype)
    return {
        "latents": latents,
        "noise": noise,
        "noisy_latents": (1.0 - grid) * latents + grid * noise,
        "sigmas": sigma_B,
    }


def difference(batch: dict[str, Any], rule: str = "flow", model: Any = FLOW, sigma_B: Any = None) -> float | None:
    check = NoiseCheck(RULES[rule], "sd3")
    check.add(model, batch, sigma_of(RULES[rule], model, batch) if sigma_B is None else sigma_B)
    return check.require()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0021), (torch.float16, 0.0003)])
@pytest.mark.parametrize("shape", [(16, 16, 16), (4, 8, 8), (16, 5, 12, 20)])
def test_rounding_is_what_the_difference_comes_to(dtype, most, shape):
    worst = max(difference(flow_batch(torch.rand(B), dtype, shape)) for _ in range(40))
    assert worst < most


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 4.0, 20.0])
def test_latents_of_any_size(scale):
    """The smaller part of a sum is lost in its rounding: at a sigma of 0.01 there is no noise in latents of 20."""
    for _ in range(40):
        batch = flow_batch(torch.rand(B), torch.bfloat16)
        sigma = batch["sigmas"].view(-1, 1, 1, 1).bfloat16()
        batch["latents"] = batch["latents"] * scale
        batch["noisy_latents"] = (1.0 - sigma) * batch["latents"] + sigma * batch["noise"]
        difference(batch)  # raises nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("off", [0.006, 0.05, 0.4])
def test_another_sigma_is_named_with_the_batchs(dtype, off):
    batch = flow_batch(torch.full((B,), 0.5), dtype)
    sigma_B = torch.full((B,), 0.5)
    sigma_B[3] -= off
    with fails(f"mixed with noise at sigma 0.500, and its batch says sigma {0.5 - off:.3f}"):
        difference(batch, sigma_B=sigma_B)


def test_scaled_latents_are_noticed_too():
    batch = flow_batch(torch.rand(B), torch.bfloat16)
    batch["noisy_latents"] = batch["noisy_latents"] + 0.1 * batch["latents"]
    with fails("mixed with noise at sigma"):
        difference(batch)


def test_perturbed_noise_is_the_noise_that_was_mixed():
    batch = flow_batch(torch.rand(B), torch.float32)
    sigma = batch["sigmas"].view(-1, 1, 1, 1)
    batch["input_noise"] = batch["noise"] + 0.3 * torch.randn_like(batch["noise"])
    batch["noisy_latents"] = (1 - sigma) * batch["latents"] + sigma * batch["input_noise"]
    assert difference(batch) < 1e-6


def test_frames_that_are_given_clean_are_left_out():
    batch = flow_batch(torch.rand(B), torch.float32, (16, 5, 12, 20))
    batch["noisy_latents"][:, :, 0] = batch["latents"][:, :, 0]
    mask = torch.ones(B, 1, 5, 12, 20)
    mask[:, :, 0] = 0
    assert difference(batch | {"vision_loss_mask": mask}) < 1e-6
    with fails("mixed with noise at sigma"):
        difference(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_a_ddpm_schedule(dtype):
    model = ddpm()
    for _ in range(40):
        steps = torch.randint(0, 1000, (B,))
        kept = model.noise_schedule.alphas_cumprod[steps].view(-1, 1, 1, 1)
        latents, noise = (torch.randn(B, 4, 16, 16).to(dtype).float() for _ in range(2))
        noisy = (kept.sqrt() * latents + (1 - kept).sqrt() * noise).to(dtype)
        batch = {"latents": latents.to(dtype), "noise": noise.to(dtype), "noisy_latents": noisy, "timesteps": steps}
        assert difference(batch, "ddpm", model) < (1e-6 if dtype == torch.float32 else 0.001)
    with fails("mixed with noise at sigma 0.100, and its batch says sigma 0.200"):
        kept = model.noise_schedule.alphas_cumprod[100]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        difference(batch | {"noisy_latents": noisy, "timesteps": torch.full((B,), 200)}, "ddpm", model)


def test_scaled_noise_of_an_edm_schedule():
    sigma_edm = torch.rand(B) * 80
    latents, noise = torch.randn(2, B, 16, 1, 16, 16).unbind()
    grid = sigma_edm.view(-1, 1, 1, 1, 1)
    batch = {"latents": latents, "noise": noise, "noisy_latents": latents + grid * noise, "sigmas": grid}
    assert difference(batch, "edm") < 1e-5


def test_a_sample_without_latents_or_noise_is_not_compared():
    batch = flow_batch(torch.tensor([0.5, 0.5, 0.9]), torch.bfloat16)
    for name in ("latents", "noisy_latents"):
        batch[name][0] = 0
    for name in ("noise", "noisy_latents"):
        batch[name][1] = 0
    share_B, _ = noise_share(batch)
    assert share_B.isnan().tolist() == [True, True, False]
    assert difference(batch) < 0.003
    assert difference({name: values[:2] for name, values in batch.items()}) is None


def test_the_worst_is_kept_until_it_is_forgotten():
    check = NoiseCheck(RULES["flow"], "sd3")
    assert check.require() is None
    good, worse = flow_batch(torch.rand(B), torch.float32), flow_batch(torch.full((B,), 0.5), torch.float32)
    for batch, sigma_B in ((worse, torch.full((B,), 0.502)), (good, good["sigmas"])):
        check.add(FLOW, batch, sigma_B)
    assert check.require() == pytest.approx(0.002, abs=1e-5)
    assert check.require() == pytest.approx(0.002, abs=1e-5)
    check.forget()
    assert check.require() is None


def test_a_batch_that_lacks_what_the_check_needs():
    batch = flow_batch(torch.rand(B), torch.float32)
    del batch["noise"]
    with fails("the prepared batch has no noise, so that its sigma cannot be checked"):
        difference(batch)
    check = NoiseCheck(RULES["flow"], "ace_step")
    check.add(FLOW, batch, batch["sigmas"])
    assert check.require() is None
    assert how_checked("ace_step").startswith("none: ") and "least squares" in how_checked("sd3")


def test_sigma_is_what_the_batch_has():
    sigmas = torch.tensor([-0.25, 0.3, 1.5])
    assert sigma_of(RULES["flow"], FLOW, {"sigmas": sigmas.view(-1, 1, 1, 1)}).tolist() == sigmas.tolist()
    tokens = torch.tensor([[0.2, 0.4], [1.0, 1.0]])
    np.testing.assert_allclose(sigma_of(RULES["flow"], FLOW, {"sigmas": tokens}), [0.3, 1.0], rtol=1e-6)
