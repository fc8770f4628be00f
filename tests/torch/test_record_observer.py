"""The observer on small modules with every kind of block; the real families are in test_real_*.py."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails
from torch import nn

from simpletuner_layerprobe.probe.families import (
    JOINT_TEXT_IMAGE,
    TEXT_IMAGE,
    BlockList,
    Family,
    StreamSeam,
    family,
    find_blocks,
    stream_blocks,
)
from simpletuner_layerprobe.probe.observer import Observer


def cosine_distances(states: list[torch.Tensor]) -> np.ndarray:
    """(B, S, L) float64: arccos(cos)/pi of consecutive states."""
    arrays = [state.double().numpy() for state in states]
    cos = [(a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)) for a, b in itertools.pairwise(arrays)]
    return np.arccos(np.clip(np.stack(cos, -1), -1, 1)) / np.pi


class Double(nn.Module):
    """Text and image stream side by side; (text, image) comes out."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return encoder_hidden_states + self.text(encoder_hidden_states), hidden_states + self.image(hidden_states)


class Single(nn.Module):
    """One sequence [text | image]."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.both = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states + self.both(hidden_states)


class FluxLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Double() for _ in range(2))
        self.single_transformer_blocks = nn.ModuleList(Single() for _ in range(3))

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, keep: Any = None) -> None:
        image, text = hidden_states, encoder_hidden_states
        states = [(image, text)]
        for index, block in enumerate(self.transformer_blocks):
            # by keywords and by position, as SimpleTuner does without and with gradient checkpointing
            text, image = block(image, text) if index else block(encoder_hidden_states=text, hidden_states=image)
            states.append((image, text))
        joint = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joint = block(joint)
            states.append((joint[:, text.shape[1] :], joint[:, : text.shape[1]]))
        if keep is not None:
            keep.extend(states)


@torch.no_grad()
def test_double_and_joint_streams_in_both_readings():
    torch.manual_seed(0)
    denoiser = FluxLike()
    image, text = torch.randn(2, 15, 6), torch.randn(2, 7, 6)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Observer(denoiser, DOUBLE_AND_JOINT) as observer:
        assert {name: len(paths) for name, paths in observer.streams.items()} == {"image": 5, "text": 5}
        observer.begin({}, mask)
        denoiser(image, encoder_hidden_states=text, keep=states)
        found = observer.finish()
    for stream, position, valid_BS in (("image", 0, np.ones((2, 15), dtype=bool)), ("text", 1, mask.numpy())):
        angles_BSL = cosine_distances([state[position] for state in states])
        np.testing.assert_allclose(found[stream, "last"].numpy(), angles_BSL[:, -1], rtol=0, atol=2e-7)
        mean_BL = np.stack([angles_BSL[sample][valid_BS[sample]].mean(0) for sample in range(2)])
        np.testing.assert_allclose(found[stream, "mean"].numpy(), mean_BL, rtol=0, atol=2e-7)


DOUBLE_AND_JOINT = Family(
    name="double and joint",
    blocks=(
        BlockList("transformer_blocks.*", TEXT_IMAGE),
        BlockList("single_transformer_blocks.*", JOINT_TEXT_IMAGE),
    ),
    targets=(),
)


class AddInPlace(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states += 0.5
        return hidden_states


class Add(nn.Module):
    def __init__(self, in_place_from: int = 10**9) -> None:
        super().__init__()
        self.calls = 0
        self.in_place_from = in_place_from

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls >= self.in_place_from:
            hidden_states += 0.5
            return hidden_states
        return hidden_states + 0.5


class Denoiser(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, skip: int = -1, watch: Callable[[torch.Tensor], Any] = id) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if index != skip:
                x = block(x)
                watch(x)
        return x


SMALL = Family(
    name="small",
    blocks=(BlockList("blocks.*", (StreamSeam("image", "hidden_states"),)),),
    targets=(),
)


@torch.no_grad()
def test_an_in_place_block_is_measured_against_what_it_got():
    x = torch.randn(2, 3, 4)
    states = [x, x + 0.5, x + 1.0, x + 1.5]
    with Observer(Denoiser(Add(), AddInPlace(), Add()), SMALL) as observer:
        for _ in range(2):  # in the first forward every block's input is copied, later only those that need it
            observer.begin({})
            observer.denoiser(x.clone())
            found = observer.finish()["image", "last"]
            np.testing.assert_allclose(found.numpy(), cosine_distances(states)[:, -1], rtol=0, atol=2e-7)


@torch.no_grad()
def test_a_block_that_turns_in_place_later_is_refused():
    with Observer(Denoiser(Add(in_place_from=2)), SMALL) as observer:
        observer.begin({})
        observer.denoiser(torch.randn(1, 2, 4))
        observer.finish()
        observer.begin({})
        with fails("blocks.0 changed its input in place"):
            observer.denoiser(torch.randn(1, 2, 4))


@torch.no_grad()
def test_a_silent_block_is_named():
    with Observer(Denoiser(Add(), Add(), Add()), SMALL) as observer:
        observer.begin({})
        observer.denoiser(torch.randn(1, 2, 4), skip=1)
        with fails("1 of 3 block states were not reported in this step: blocks.1 (image)"):
            observer.finish()


@torch.no_grad()
def test_only_the_last_forward_counts_and_none_outside():
    denoiser = Denoiser(Add(), Add())
    first, second = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    with Observer(denoiser, SMALL) as observer:
        denoiser(first)
        observer.begin({})
        denoiser(first)
        denoiser(second)
        found = observer.finish()["image", "mean"]
        denoiser(first)
    expected = cosine_distances([second, second + 0.5, second + 1.0]).mean(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-7)


@torch.no_grad()
def test_no_state_outlives_the_next_block():
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def watch(x: torch.Tensor) -> None:
        alive.append(weakref.ref(x))
        del x
        gc.collect()
        counts.append(sum(one() is not None for one in alive))

    with Observer(Denoiser(*(Add() for _ in range(8))), SMALL) as observer:
        for _ in range(2):
            alive.clear()
            counts.clear()
            observer.begin({})
            observer.denoiser(torch.randn(1, 2, 4), watch=watch)
            observer.finish()
    assert max(counts) == 1  # the forward's own


def test_nothing_stays_behind():
    flux = FluxLike()

    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks(flux)
    with Observer(flux, DOUBLE_AND_JOINT):
        assert hooks(flux) > before
    assert hooks(flux) == before
    with pytest.raises(RuntimeError, match="inside"), Observer(flux, DOUBLE_AND_JOINT):
        raise RuntimeError("inside")
    assert hooks(flux) == before


def test_a_denoiser_of_another_family_is_refused():
    with fails("Linear has no 'transformer_blocks'"):
        find_blocks(nn.Linear(2, 2), family("sd3"))
    with fails("Denoiser has no transformer blocks"):
        find_blocks(Denoiser(), SMALL)


@torch.no_grad()
def test_a_mask_of_another_length_is_refused():
    with Observer(FluxLike(), DOUBLE_AND_JOINT) as observer:
        observer.begin({}, torch.ones(1, 9, dtype=torch.bool))
        with fails("text mask is for 9 tokens and the text stream has 7"):
            observer.denoiser(torch.randn(1, 15, 6), encoder_hidden_states=torch.randn(1, 7, 6))


def test_a_block_that_only_reads_the_text_has_no_text_stream():
    """SD3's last block is context_pre_only."""
    denoiser = FluxLike()
    denoiser.transformer_blocks[-1].context_pre_only = True
    streams = stream_blocks(find_blocks(denoiser, family("sd3")))
    assert list(streams) == ["image", "text"]
    assert streams["image"] == ("transformer_blocks.0", "transformer_blocks.1")
    assert streams["text"] == ("transformer_blocks.0",)
