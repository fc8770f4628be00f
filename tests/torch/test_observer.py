"""The observer on small modules with every kind of block; the real families are in tests/simpletuner/families."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from small import (
    DOUBLE_AND_JOINT,
    SMALL,
    Add,
    Denoiser,
    FluxLike,
    cosine_distances,
    entry,
    flux_like,
    hooks,
    model_error,
    observed,
)
from torch import nn

from simpletuner_layerprobe.probe.families import SAME_SHAPE, Family
from simpletuner_layerprobe.probe.observer import Observer


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_torch_defaults_change_nothing(default):
    denoiser, image, text, mask = flux_like()
    expected = observed(denoiser, DOUBLE_AND_JOINT, image, text, mask=mask, residual=True, pairs=3)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        taken = observed(denoiser, DOUBLE_AND_JOINT, image, text, mask=mask, residual=True, pairs=3)
    finally:
        torch.set_default_dtype(kept)
    assert set(taken) == set(expected)
    for key, value in taken.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("extra", [{}, {"residual": True, "pairs": 3}])
@pytest.mark.parametrize(("image", "text", "stream"), [(15, 0, "text"), (0, 7, "image")])
def test_a_stream_without_tokens_is_named(image, text, stream, extra):
    message = f"transformer_blocks.0 got hidden states of 0 tokens, and those of the {stream} stream"
    with model_error(message), torch.no_grad():
        observed(FluxLike(), DOUBLE_AND_JOINT, torch.randn(1, image, 6), torch.randn(1, text, 6), **extra)


@pytest.mark.parametrize("rule", ["after_time_token", "packed_first"])
def test_a_stream_that_lies_outside_of_the_state_is_named(rule):
    """One token, of which the rule takes those after the first, or more than there are."""
    blocks = Denoiser(Add(), Add())
    blocks.forward = lambda hidden_states: Denoiser.forward(blocks, hidden_states)
    with Observer(blocks, entry(tokens=rule)) as observer, torch.no_grad():
        observer.begin({"latents": torch.ones(2, 3, 4)})
        with model_error("blocks.0 got hidden states of 1 tokens, and those of the image stream would be"):
            observer.denoiser(hidden_states=torch.randn(2, 1, 4))


@torch.no_grad()
def test_an_in_place_block_is_measured_against_what_it_got():
    x = torch.randn(2, 3, 4)
    states = [x, x + 0.5, x + 1.0, x + 1.5]
    with Observer(Denoiser(Add(), Add(in_place_from=1), Add()), SMALL) as observer:
        for _ in range(2):  # in the first forward every block's input is copied, later only those that need it
            observer.begin({})
            observer.denoiser(x.clone())
            taken = observer.finish()["image", "last"]
            np.testing.assert_allclose(taken.numpy(), cosine_distances(states)[:, -1], rtol=0, atol=2e-7)


@torch.no_grad()
def test_a_block_that_turns_in_place_later_is_refused():
    with Observer(Denoiser(Add(in_place_from=2)), SMALL) as observer:
        observer.begin({})
        observer.denoiser(torch.randn(1, 2, 4))
        observer.begin({})
        with model_error("blocks.0 changed its input in place"):
            observer.denoiser(torch.randn(1, 2, 4))


def test_in_inference_mode_every_state_is_copied():
    """There torch does not count changes in place."""
    x = torch.randn(2, 3, 4)
    states = [x, x + 0.5, x + 1.0]
    denoiser = Denoiser(Add(), Add(in_place_from=2))
    pair = cosine_distances([states[0], states[2]])[:, -1]
    with torch.inference_mode(), Observer(denoiser, SMALL, pairs=2) as observer:
        for _ in range(2):
            observer.begin({})
            observer.denoiser(x.clone())
            taken = observer.finish()
            expected = cosine_distances(states)[:, -1]
            np.testing.assert_allclose(taken["image", "last"].numpy(), expected, rtol=0, atol=2e-7)
            np.testing.assert_allclose(taken["image", "pair2_last"].numpy(), pair, rtol=0, atol=2e-7)


@torch.no_grad()
def test_a_silent_block_is_named():
    with Observer(Denoiser(Add(), Add(), Add()), SMALL) as observer:
        observer.begin({})
        with model_error("no forward of Denoiser was seen"):
            observer.finish()
        observer.begin({})
        observer.denoiser(torch.randn(1, 2, 4), skip=1)
        with model_error("1 of 3 block states were not reported in this step: blocks.1 (image)"):
            observer.finish()


@torch.no_grad()
@pytest.mark.parametrize(("forwards", "counted"), [("one", slice(2, 3)), ("per sample", slice(0, 3))])
def test_which_forwards_count(forwards, counted):
    """The last since `begin`, or all of them in a family that has one for each sample; none before and after."""
    x = torch.randn(3, 2, 4)
    family = Family(SMALL.name, SMALL.blocks, forwards=forwards)
    with Observer(Denoiser(Add(), Add()), family) as observer:
        observer.denoiser(x[:2])
        observer.begin({})
        for sample in x:
            observer.denoiser(sample[None])
        taken = observer.finish()["image", "mean"]
        observer.denoiser(x[:2])
    x = x[counted]
    np.testing.assert_allclose(taken.numpy(), cosine_distances([x, x + 0.5, x + 1.0]).mean(1), rtol=0, atol=2e-7)


@torch.no_grad()
def test_nothing_waits_for_the_device(monkeypatch):
    denoiser, image, text, mask = flux_like()
    for name in ("item", "tolist", "cpu", "nonzero", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    observed(denoiser, DOUBLE_AND_JOINT, image, text, mask=mask, residual=True, pairs=3)


@torch.no_grad()
def test_nothing_stays_behind_a_forward_that_failed():
    denoiser = Denoiser(Add(), Returns(lambda x: 1 / 0))
    x = torch.randn(1, 2, 4)
    state = weakref.ref(x)
    with Observer(denoiser, SMALL, pairs=2) as observer:
        observer.begin({})
        with pytest.raises(ZeroDivisionError):
            denoiser(x)
        del x
        assert state() is None
        with model_error("1 of 2 block states were not reported in this step: blocks.1 (image)"):
            observer.finish()
    assert hooks(denoiser) == 0


@torch.no_grad()
def test_a_mask_of_another_length_is_refused():
    mask = torch.ones(1, 9, dtype=torch.bool)
    with model_error("text mask is for 9 tokens and the text stream has 7"):
        observed(FluxLike(), DOUBLE_AND_JOINT, torch.randn(1, 15, 6), torch.randn(1, 7, 6), mask=mask)


class Returns(nn.Module):
    """A block that returns what it is told to make of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden_states: Any) -> Any:
        return self.make(hidden_states)


@torch.no_grad()
@pytest.mark.parametrize(
    ("result", "make", "problem"),
    [
        (None, lambda x: (x, x), "blocks.0 (Returns) returned tuple without the image stream"),
        (1, lambda x: (x,), "blocks.0 (Returns) returned tuple without the image stream"),
        (1, lambda x: x, "blocks.0 (Returns) returned Tensor without the image stream"),
        (0, lambda x: (None, x), "blocks.0 (Returns) returned tuple without the image stream"),
        (None, lambda x: x[:, 1:], "a block changed the shape of its hidden states from (1, 3, 4) to (1, 2, 4)"),
        (SAME_SHAPE, lambda x: (x, x), "blocks.0 returns 2 states of shape (1, 3, 4)"),
        (SAME_SHAPE, lambda x: (x[0], None), "blocks.0 returns 0 states of shape (1, 3, 4)"),
    ],
)
def test_a_block_that_returns_something_else_is_named(result, make, problem):
    with model_error(problem):
        observed(Denoiser(Returns(make)), entry(result), torch.randn(1, 3, 4))


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda x: (x[0], x + 0.5, None), lambda x: x + 0.5])
def test_the_state_of_a_guessed_family_is_the_one_of_the_same_shape(make):
    x = torch.randn(1, 3, 4)
    taken = observed(Denoiser(Returns(make)), entry(SAME_SHAPE), x)["image", "last"]
    np.testing.assert_allclose(taken, cosine_distances([x, x + 0.5])[:, -1], rtol=0, atol=2e-7)


@torch.no_grad()
@pytest.mark.parametrize("value", [None, "text"])
def test_a_block_that_gets_something_else_is_named(value):
    with model_error(f"blocks.0 (Returns) got {type(value).__name__} as 'hidden_states'"):
        observed(Denoiser(Returns(lambda x: x)), SMALL, value)
