"""What a noise seed fixes, without SimpleTuner: sigmas and draws by image and repeat alone."""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from failing import fails
from test_session import session

from simpletuner_layerprobe.run.rows import image_hash
from simpletuner_layerprobe.training.fixed_noise import FixedNoise, NoDraws, hashed
from simpletuner_layerprobe.training.overrides import refuse_backends_with_noise_seed, refuse_with_noise_seed
from simpletuner_layerprobe.training.sigmas import image_sigma


def batch(*names: str) -> dict[str, object]:
    return {"data_backend_id": "pictures", "filepaths": list(names)}


def drawn(fixed: FixedNoise, names: str, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, torch.Tensor]:
    """The sigmas, and two draws of 5 numbers, of a batch of these images."""
    with fixed.preparing(batch(*names), "sd3", ddpm=False):
        latents = torch.zeros(len(names), 5, dtype=dtype)
        draws = torch.stack([torch.randn_like(latents), torch.rand(len(names), 5, dtype=dtype)], dim=1)
    return fixed.sigmas(len(names)), draws


@pytest.mark.parametrize("stratified", [False, True])
def test_a_sample_has_the_same_sigma_and_draws_in_any_batch_and_after_anything(stratified):
    fixed = FixedNoise(7, stratified, Counter())
    sigma_B, draws_B = drawn(fixed, "abca")
    assert len(set(sigma_B)) == 4 and len(draws_B.unique()) == draws_B.numel()
    torch.manual_seed(3)
    image = image_hash("pictures", "a")
    again, later = drawn(FixedNoise(7, stratified, Counter({image: 1})), "a")
    assert later.shape == (1, 2, 5) and again[0] == sigma_B[3] and torch.equal(later[0], draws_B[3])
    first, both = drawn(FixedNoise(7, stratified, Counter()), "ca")
    assert first.tolist() == [sigma_B[2], sigma_B[0]] and torch.equal(both, draws_B[[2, 0]])
    other, others = drawn(FixedNoise(8, stratified, Counter()), "abca")
    assert not np.isin(other, sigma_B).any() and not torch.isin(others, draws_B).any()
    _, half = drawn(fixed, "abca", torch.bfloat16)
    assert torch.equal(half, draws_B.bfloat16())  # of one draw, whatever it is asked for in


def test_the_draws_are_normal_and_uniform():
    fixed = FixedNoise(1, False, Counter())
    with fixed.preparing(batch(*map(str, range(300))), "sd3", ddpm=False):
        normal, uniform = torch.randn(300, 100), torch.rand_like(torch.zeros(300, 100))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs(uniform.mean() - 0.5) < 0.01 and uniform.min() >= 0 and uniform.max() < 1
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().max() < 0.55  # 45,000 pairs of 100 numbers each


@pytest.mark.parametrize("strata", [10, 100, 1000])
def test_the_repeats_of_an_image_fill_equal_strata(strata):
    for image in (1, 2**64 - 1, hashed("x")):
        sigmas = np.array([image_sigma(image, repeat, seed=7, stratified=True) for repeat in range(2 * strata)])
        for window in (sigmas[:strata], sigmas[strata:]):
            assert sorted((window * strata).astype(int)) == list(range(strata))


def test_few_repeats_of_an_image_lie_apart():
    for count, apart in ((2, 0.5), (4, 0.2), (10, 0.1)):
        for image in range(50):
            sigmas = np.sort([image_sigma(image, repeat, seed=7, stratified=True) for repeat in range(count)])
            gaps = np.diff([*sigmas, sigmas[0] + 1])
            assert gaps.min() > apart - 1e-9


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("repeat", [0, 3, 1234])
def test_each_repeat_is_uniform_over_the_images(stratified, repeat):
    """Kolmogorov-Smirnov distance over 2,000 images; 1.95/sqrt(n) is the 0.1% bound."""
    images = [image_hash("pictures", str(number)) for number in range(2000)]
    sigmas = np.sort([image_sigma(image, repeat, seed=5, stratified=stratified) for image in images])
    steps = np.arange(2001) / 2000
    assert max(np.abs(sigmas - steps[:-1]).max(), np.abs(sigmas - steps[1:]).max()) < 1.95 / np.sqrt(2000)


def test_many_images_fill_the_tenths_evenly_with_any_number_of_repeats():
    images = [image_hash("pictures", str(number)) for number in range(500)]
    for repeats in (1, 3, 10):
        sigmas = [image_sigma(i, repeat, seed=2, stratified=True) for i in images for repeat in range(repeats)]
        counts = np.bincount((np.array(sigmas) * 10).astype(int), minlength=10)
        expected = 50 * repeats
        # With ten repeats exact; with fewer no worse than independent draws (chi-squared, 9 degrees, 0.1%).
        assert ((counts - expected) ** 2 / expected).sum() < (27.9 if repeats < 10 else 1e-9)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: torch.normal(0.0, 1.0, (2,)), "model family 'some' draws by normal while it prepares a batch"),
        (lambda: torch.zeros(2).uniform_(), "draws by uniform_ while"),
        (lambda: torch.randn(3, 5), "draws by randn of shape (3, 5) while it prepares"),
        (lambda: torch.randint(0, 5, (2,)), "draws by randint while"),
    ],
)
def test_draws_that_are_not_of_single_samples_name_the_family(draw, message):
    fixed = FixedNoise(7, False, Counter())
    with fails(message), fixed.preparing(batch("a", "b"), "some", ddpm=False):
        draw()


def test_what_is_replaced_later_or_has_a_generator_of_its_own_passes():
    fixed = FixedNoise(7, False, Counter())
    with fixed.preparing(batch("a", "b"), "sdxl", ddpm=True):
        assert torch.multinomial(torch.ones(9), 2).shape == (2,)
        expected = torch.randn(3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(expected, torch.randn(3, generator=torch.Generator().manual_seed(1)))
        other: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: other.append(torch.randn(7)))  # the one that loads batches
        thread.start()
        thread.join()
        assert other[0].shape == (7,)


def test_a_forward_that_draws_is_refused():
    layer = torch.nn.Dropout(0.5)
    with NoDraws("some"):
        assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))
        assert torch.equal(torch.nn.Dropout(0.0)(torch.ones(3)), torch.ones(3))
    for draw in (lambda: layer.train()(torch.ones(3)), lambda: torch.randn(2)):
        with fails("model family 'some' draws by"), NoDraws("some"):
            draw()


def test_a_batch_without_images_is_refused():
    fixed = FixedNoise(7, False, Counter())
    for nameless in ({"data_backend_id": "pictures"}, {"filepaths": ["a"]}):
        with fails("the batch does not name its images"):
            fixed.preparing(nameless, "sd3", ddpm=False)
    drawn(fixed, "ab")
    with fails("a batch with 2 images asks for 3 noise levels"):
        fixed.sigmas(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_dropout_probability": 0.1}, "caption_dropout_probability is 0.1, whose draws"),
        ({"offset_noise": True}, "offset_noise is True"),
        ({"model_family": "flux2", "flux_guidance_mode": "random-range"}, "set flux_guidance_mode to constant"),
        ({"model_family": "ltxvideo", "ltx_i2v_prob": 0.1}, "ltx_i2v_prob is 0.1"),
    ],
)
def test_options_that_draw_elsewhere_are_named(options, message):
    with fails(message):
        refuse_with_noise_seed(SimpleNamespace(**{"model_family": "sd3", **options}))


def test_options_of_other_families_and_without_draws_pass():
    refuse_with_noise_seed(
        SimpleNamespace(model_family="sd3", caption_dropout_probability=0, offset_noise=False, ltx_i2v_prob=0.1)
    )
    refuse_backends_with_noise_seed({"pictures": {"config": {"vae_cache_disable": False}}, "text": {}})
    with fails("vae_cache_clear_each_epoch is on in the data backend 'pictures'"):
        refuse_backends_with_noise_seed({"pictures": {"config": {"vae_cache_clear_each_epoch": True}}})


def test_a_run_says_its_noise_seed_and_how_its_sigmas_lie(tmp_path, monkeypatch):
    run = session(tmp_path, monkeypatch, sigmas="stratified", noise_seed=7)
    assert run.settings.sigma_text == "stratified in each image" and run.fixed_noise.seed == 7
    assert session(tmp_path, monkeypatch, sigmas="stratified").settings.sigma_text == "stratified"
    with run.fixed_noise.preparing(batch("a"), "sd3", ddpm=False):
        sigma = run.draw_sigmas(1, seed=1)
    assert sigma.tolist() == run.draw_sigmas(1, seed=2).tolist() == [image_sigma(
        image_hash("pictures", "a"), 0, seed=7, stratified=True
    )]  # fmt: skip
