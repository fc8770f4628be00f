"""Forwards with a block left out, beside naive ones in which all blocks run and the block is changed by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from small import DOUBLE_AND_JOINT, SMALL, Add, Denoiser, FluxLike, entry, flux_like, hooks, model_error
from torch import nn

from simpletuner_layerprobe.probe.ablation import Ablation
from simpletuner_layerprobe.probe.blocks import find_blocks
from simpletuner_layerprobe.probe.families import SAME_SHAPE
from simpletuner_layerprobe.probe.observer import Observer


class Mix(nn.Module):
    """What it adds depends on what it gets."""

    def __init__(self, in_place: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout, self.in_place = nn.Linear(4, 4), nn.Dropout(dropout), in_place

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        update = self.dropout(self.linear(hidden_states).tanh())
        return hidden_states.add_(update) if self.in_place else hidden_states + update


class InPlace(Denoiser):
    """Changes what its blocks return."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            x *= 0.9
        return x


@contextmanager
def returning(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    block.forward = forward
    yield
    del block.forward


def forwards(model: nn.Module, ablation: Ablation, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad(), ablation.keep():
        model(x.clone())
    made = []
    for block in ablation.blocks:
        torch.manual_seed(5)
        with torch.no_grad(), ablation.without(block.path):
            made.append(model(x.clone()))
    return made


def naive(model: nn.Module, ablation: Ablation, x: torch.Tensor) -> list[torch.Tensor]:
    made = []
    for block in ablation.blocks:
        torch.manual_seed(5)
        with torch.no_grad(), returning(block.module, lambda hidden_states: hidden_states):
            made.append(model(x.clone()))
    return made


@pytest.mark.parametrize("kind", [Denoiser, InPlace])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("room", [0.0, 2.5, float("inf")])
def test_each_block_left_out(kind, in_place, room):
    """Whoever changes states in place, and however many results have room. The second step knows what to copy."""
    torch.manual_seed(0)
    model, x = kind(*(Mix(in_place) for _ in range(5))), torch.randn(2, 3, 4)
    ablation = Ablation(find_blocks(model, SMALL), budget_bytes=room * x.nbytes)
    for _ in range(2):
        expected, taken = naive(model, ablation, x), forwards(model, ablation, x)
        assert all(torch.equal(*pair) for pair in zip(taken, expected, strict=True))
        kept = min(5, int(room)) if room < 100 else 5
        assert (ablation.missing, ablation.kept_bytes) == (5 - kept, kept * x.nbytes)
        # Without a result to hand on a block runs again, also where it is the one that is left out.
        assert ablation.runs == 5 + sum(4 - number for number in range(5)) + sum(5 - n for n in range(kept, 5))
    assert ablation.runs == 15 or room < 100  # (5 + 1) / 2 forwards
    ablation.forget()
    assert ablation.kept_bytes == 0
    assert hooks(model) == 0 and not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), np.random.rand, random.random])
def test_whatever_generator_blocks_draw_from(draw):
    """Each of the three by itself: the blocks after the one that hands on what it kept draw what they drew before."""

    class Draws(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + float(draw())

    model, x = Denoiser(Draws(), Draws(), Draws()), torch.zeros(1, 1, 1)
    ablation = Ablation(find_blocks(model, SMALL))
    steps: list[float] = []
    with ablation.keep():
        model(x, watch=lambda state: steps.append(state.item()))
    own = np.diff([0.0, *steps])
    for number, block in enumerate(ablation.blocks):
        with ablation.without(block.path):
            taken = model(x).item()
        assert taken == pytest.approx(own.sum() - own[number], abs=1e-6)


def test_what_blocks_draw_is_the_same_in_every_forward():
    torch.manual_seed(0)
    model, x = Denoiser(*(Mix(dropout=0.5) for _ in range(4))).train(), torch.randn(2, 3, 4)
    ablation = Ablation(find_blocks(model, SMALL))
    torch.manual_seed(5)
    with torch.no_grad(), ablation.keep():
        model(x)
    taken = []
    for block in ablation.blocks:
        torch.manual_seed(5)
        with torch.no_grad(), ablation.without(block.path):
            taken.append(model(x))

    def drops_and_returns(hidden_states: torch.Tensor) -> torch.Tensor:
        nn.functional.dropout(hidden_states, 0.5)
        return hidden_states

    for block, value in zip(ablation.blocks, taken, strict=True):
        torch.manual_seed(5)
        with torch.no_grad(), returning(block.module, drops_and_returns):
            assert torch.equal(value, model(x))


class FluxOut(FluxLike):
    """Gives its last states, and takes what blocks return as they return it."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        kept: list[Any] = []
        super().forward(hidden_states, encoder_hidden_states, keep=kept)
        image, text = kept[-1]
        return torch.cat([text, image], dim=1)


@pytest.mark.parametrize("stream", ["", "text"])
def test_all_streams_or_the_text_alone(stream):
    _, image, text, _ = flux_like()
    model = FluxOut()
    with Observer(model, DOUBLE_AND_JOINT) as observer, torch.no_grad():
        ablation = Ablation(observer.blocks)
        observer.begin({})
        with ablation.keep(observer.part):
            plain = model(image, text)
        observer.finish()
        taken = []
        for block in observer.blocks:
            with ablation.without(block.path, stream):
                taken.append(model(image, text))
    for block, value in zip(observer.blocks, taken, strict=True):
        original = type(block.module).forward

        def left_out(hidden_states, encoder_hidden_states=None, block=block, original=original):
            if encoder_hidden_states is not None:
                _, changed = original(block.module, hidden_states, encoder_hidden_states)
                return encoder_hidden_states, changed if stream else hidden_states
            changed = original(block.module, hidden_states)
            return torch.cat([hidden_states[:, :7], changed[:, 7:]], dim=1) if stream else hidden_states

        with returning(block.module, left_out), torch.no_grad():
            assert torch.equal(value, model(image, text)), block.path
        assert not torch.equal(value, plain)


def test_several_forwards_in_one_step():
    """One for each sample: each begins with the first block again."""
    torch.manual_seed(0)
    model, x = Denoiser(Mix(), Mix(), Mix()), torch.randn(2, 3, 4)

    def run() -> torch.Tensor:
        return torch.cat([model(sample) for sample in x.split(1)])

    ablation = Ablation(find_blocks(model, SMALL))
    with torch.no_grad(), ablation.keep():
        run()
    assert ablation.runs == 6
    for block in ablation.blocks:
        with torch.no_grad(), ablation.without(block.path):
            taken = run()
        with torch.no_grad(), returning(block.module, lambda hidden_states: hidden_states):
            torch.testing.assert_close(taken, run(), rtol=0, atol=0)
    assert ablation.runs == 2 * 6


def test_states_of_inference_mode_are_copied():
    model, x = InPlace(Mix(), Mix()), torch.randn(1, 2, 4)
    ablation = Ablation(find_blocks(model, SMALL))
    with torch.inference_mode():
        x = x.clone()
        with ablation.keep():
            model(x.clone())
        with ablation.without("blocks.1"):
            taken = model(x.clone())
        with returning(model.blocks[1], lambda hidden_states: hidden_states):
            assert torch.equal(taken, model(x.clone()))


def test_a_block_that_changes_the_shape_cannot_be_left_out():
    class Halve(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states[:, ::2]

    ablation = Ablation(find_blocks(Denoiser(Halve()), SMALL))
    with (
        model_error("blocks.0 makes hidden states of shape (1, 2, 4) from (1, 4, 4), so it cannot be"),
        ablation.keep(),
    ):
        ablation.blocks[0].module(torch.ones(1, 4, 4))


def test_a_forward_that_runs_other_blocks_is_not_repeated():
    model, x = Denoiser(Add(), Add(), Add()), torch.ones(1, 2, 4)
    ablation = Ablation(find_blocks(model, SMALL))
    with ablation.keep():
        model(x)
    with model_error("the forward ran blocks.2 where it had not run before"), ablation.without("blocks.0"):
        model(x, skip=1)
    with model_error("the forward ran 2 blocks and 3 before"), ablation.without("blocks.0"):
        model(x, skip=2)


def test_results_that_are_changed_in_place_only_later_are_noticed():
    class Later(Denoiser):
        steps = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
                if self.steps:
                    x *= 2
            return x

    model = Later(Add(), Add())
    ablation = Ablation(find_blocks(model, SMALL))
    with ablation.keep():
        model(torch.ones(1, 2, 4))
    model.steps = 1
    with model_error("what blocks.0 returned was changed in place after it"), ablation.keep():
        model(torch.ones(1, 2, 4))


def test_a_result_of_several_states_keeps_its_form():
    class Pair(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return hidden_states.mean(), hidden_states + 1, None

    for result in (1, SAME_SHAPE):
        ablation = Ablation(find_blocks(Denoiser(Pair()), entry(result)))
        x = torch.ones(1, 2, 4)
        with ablation.keep():
            ablation.blocks[0].module(x)
        with ablation.without("blocks.0"):
            mean, state, rest = ablation.blocks[0].module(x)
        assert torch.equal(state, x) and mean == 1 and rest is None
