"""Small modules with every kind of block, their entries in the family table, and the distances in float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.families import JOINT_TEXT_IMAGE, TEXT_IMAGE, BlockList, Family, StreamSeam
from simpletuner_layerprobe.probe.observer import Observer

torch.set_num_threads(1)  # for such small tensors threads only wait for each other, long ones on a busy machine


def float64_angles(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """arccos(cos)/pi in float64, (B, S), as the article writes it (without its clamp)."""
    u, v = before.detach().double().numpy(), after.detach().double().numpy()
    cos = (u * v).sum(-1) / (np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1))
    return np.arccos(np.clip(cos, -1, 1)) / np.pi


def float64_updates(before: torch.Tensor, after: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """|after - before| / |before| and the cosine of the difference with `before`, in float64, (B, S)."""
    u, v = before.double().numpy(), after.double().numpy()
    length, added = np.linalg.norm(u, axis=-1), np.linalg.norm(v - u, axis=-1)
    with np.errstate(invalid="ignore"):  # without an update there is no cosine
        return added / length, np.einsum("bsd,bsd->bs", v - u, u) / added / length


def cosine_distances(states: list[torch.Tensor]) -> np.ndarray:
    """(B, S, L) float64: the angles of consecutive states."""
    return np.stack([float64_angles(before, after) for before, after in itertools.pairwise(states)], -1)


def states(seed: int, shape: tuple[int, ...], size: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states (B, S, D) before and after a block that adds something of this size."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator) * 10
    return before.to(dtype), (before + size * torch.randn(shape, generator=generator)).to(dtype)


def laid_out(state_BSD: torch.Tensor, by_width: bool) -> torch.Tensor:
    """The same state, on request with the tokens as neighbours in memory, as SD3's image stream is."""
    return state_BSD.mT.contiguous().mT if by_width else state_BSD


def model_error(text: str) -> Any:
    """A context whose block raises a ModelError of one line that holds `text`."""
    return pytest.raises(ModelError, match=re.escape(text), check=lambda error: "\n" not in str(error))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


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


class OwnModuleList(nn.ModuleList):
    """SimpleTuner's families have lists of a class of their own."""


class FluxLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Double() for _ in range(2))
        self.single_transformer_blocks = OwnModuleList(Single() for _ in range(3))

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


DOUBLE_AND_JOINT = Family(
    name="double and joint",
    blocks=(
        BlockList("transformer_blocks.*", TEXT_IMAGE),
        BlockList("single_transformer_blocks.*", JOINT_TEXT_IMAGE),
    ),
)


class Add(nn.Module):
    """Adds to its input; in place from the given call on."""

    def __init__(self, in_place_from: int = 10**9) -> None:
        super().__init__()
        self.calls = 0
        self.in_place_from = in_place_from

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden_states.add_(0.5) if self.calls >= self.in_place_from else hidden_states + 0.5


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


def entry(result: int | str | None = None, tokens: str = "all_tokens", call: str = "") -> Family:
    """The table's entry for a Denoiser of one stream."""
    return Family("small", (BlockList("blocks.*", (StreamSeam("image", "hidden_states", result, tokens),), call),))


SMALL = entry()


def flux_like() -> tuple[FluxLike, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A denoiser, its image and text of 15 and 7 tokens, and a text mask; always the same."""
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return FluxLike(), torch.randn(2, 15, 6), torch.randn(2, 7, 6), mask


def observed(
    denoiser: nn.Module, family: Family, *inputs: Any, mask: torch.Tensor | None = None, **extra: Any
) -> dict[tuple[str, str], torch.Tensor]:
    """The distances of one forward, by an observer of its own."""
    with Observer(denoiser, family, **extra) as observer:
        observer.begin({}, mask)
        denoiser(*inputs)
        return observer.finish()
