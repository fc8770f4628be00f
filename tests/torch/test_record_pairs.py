"""Pairs of blocks and updates under the observer, on small modules; the real families are in test_families.py."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails
from test_record_observer import DOUBLE_AND_JOINT, SMALL, Add, AddInPlace, Denoiser, FluxLike, cosine_distances
from torch import nn

from simpletuner_layerprobe.probe.families import BlockList, Family, StreamSeam
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.pairs import Kept, moved_angles
from simpletuner_layerprobe.probe.tokens import Part


@torch.no_grad()
def test_pairs_and_updates_over_the_change_from_double_to_joint_blocks():
    torch.manual_seed(0)
    denoiser = FluxLike()
    image, text = torch.randn(2, 15, 6), torch.randn(2, 7, 6)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Observer(denoiser, DOUBLE_AND_JOINT, residual=True, pairs=9) as observer:
        assert observer.extra[-1] == "pair5_mean"  # there are five blocks
        for _ in range(2):
            states.clear()
            observer.begin({}, mask)
            denoiser(image, encoder_hidden_states=text, keep=states)
            found = observer.finish()
    for stream, position, valid_BS in (("image", 0, np.ones((2, 15), dtype=bool)), ("text", 1, mask.numpy())):
        arrays = [state[position] for state in states]
        for span in range(2, 6):
            columns = [cosine_distances([arrays[first], arrays[first + span]])[:, :, 0] for first in range(6 - span)]
            angles_BSC = np.stack(columns, -1)
            np.testing.assert_allclose(found[stream, f"pair{span}_last"], angles_BSC[:, -1], rtol=0, atol=2e-7)
            mean_BC = np.stack([angles_BSC[sample][valid_BS[sample]].mean(0) for sample in range(2)])
            np.testing.assert_allclose(found[stream, f"pair{span}_mean"], mean_BC, rtol=0, atol=2e-7)
        before_BLD, after_BLD = (
            np.stack([state[:, -1].double() for state in part], 1) for part in (arrays[:-1], arrays[1:])
        )
        norm_BL = np.linalg.norm(after_BLD - before_BLD, axis=-1) / np.linalg.norm(before_BLD, axis=-1)
        np.testing.assert_allclose(found[stream, "update_norm_last"], norm_BL, rtol=1e-6)


def test_nothing_more_is_taken_unless_asked():
    with Observer(FluxLike(), DOUBLE_AND_JOINT, pairs=1) as observer, torch.no_grad():
        observer.begin({})
        observer.denoiser(torch.randn(1, 15, 6), encoder_hidden_states=torch.randn(1, 7, 6))
        assert observer.extra == () and {reading for _, reading in observer.finish()} == {"last", "mean"}


class Sizes(nn.Module):
    """Blocks on states that shrink after the second and lose a token after the fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Add() for _ in range(6))

    def forward(self, x: torch.Tensor) -> None:
        for number, block in enumerate(self.blocks):
            if number == 2:
                x = x[..., :4] * 2.0
            if number == 4:
                x = x[:, 1:]
            x = block(x)


@torch.no_grad()
def test_no_pair_is_over_a_change_of_width_or_of_tokens():
    with Observer(Sizes(), SMALL, pairs=3) as observer:
        observer.begin({})
        observer.denoiser(torch.randn(2, 5, 8))
        found = observer.finish()
    assert found["image", "mean"].isfinite().all()
    for reading in ("last", "mean"):
        assert found["image", f"pair2_{reading}"].isnan().tolist() == [[False, True, False, True, False]] * 2
        assert found["image", f"pair3_{reading}"].isnan().all()


class Between(nn.Module):
    """What stands between the blocks changes the state that the first of them got, from the given forward on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Add() for _ in range(3))
        self.start, self.count = start, 0

    def forward(self, x: torch.Tensor) -> None:
        self.count += 1
        first = x
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and self.count >= self.start:
                first += 100.0


@torch.no_grad()
def test_states_that_are_changed_in_place_while_they_are_kept():
    x = torch.randn(2, 3, 4)
    states = [x, x + 0.5, x + 1.0, x + 1.5]
    expected = cosine_distances([states[0], states[3]])[:, -1]
    for denoiser in (Denoiser(AddInPlace(), Add(), AddInPlace()), Between(start=1)):
        with Observer(denoiser, SMALL, pairs=3) as observer:
            for _ in range(3):  # only the first forward copies every state
                observer.begin({})
                denoiser(x.clone())
                np.testing.assert_allclose(observer.finish()["image", "pair3_last"], expected, rtol=0, atol=2e-7)
    with Observer(Between(start=2), SMALL, pairs=3) as observer:
        observer.begin({})
        observer.denoiser(x.clone())
        observer.finish()
        observer.begin({})
        with fails("the state before blocks.0 was changed in place after that block"):
            observer.denoiser(x.clone())


@torch.no_grad()
@pytest.mark.parametrize("longest", [2, 4])
def test_as_many_states_are_kept_as_the_longest_span_has_blocks(longest):
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def watch(x: torch.Tensor) -> None:
        alive.append(weakref.ref(x))
        del x
        gc.collect()
        counts.append(sum(one() is not None for one in alive))

    with Observer(Denoiser(*(Add() for _ in range(8))), SMALL, pairs=longest) as observer:
        for _ in range(2):
            alive.clear()
            counts.clear()
            observer.begin({})
            observer.denoiser(torch.randn(1, 2, 4), watch=watch)
            gc.collect()
            assert sum(one() is not None for one in alive) == 0  # after the last block nothing is kept
            observer.finish()
    assert max(counts) == longest  # one of them is the forward's own


def kept(state_BSD: torch.Tensor, tokens: Any, rule: str) -> Kept:
    return Kept(0, "a", state_BSD, Part(tokens), rule, None, 0)


def test_tokens_at_other_positions_are_matched_one_by_one():
    torch.manual_seed(0)
    before, after = torch.randn(2, 6, 5), torch.randn(2, 9, 5)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 2, 3, 4]] = mask[1, [0, 6, 7, 8]] = True
    for tokens in (slice(2, 6), torch.tensor([[False, False] + [True] * 4] * 2)):
        angles, part = moved_angles(kept(before, tokens, "one"), kept(after, mask, "another"), after)
        for sample in range(2):
            expected = cosine_distances([before[sample : sample + 1, 2:6], after[sample][mask[sample]][None]])[0, :, 0]
            np.testing.assert_allclose(angles[sample][part.tokens[sample]], expected, rtol=0, atol=2e-7)
    short = mask.clone()
    short[1, 8] = False
    angles, part = moved_angles(kept(before, slice(2, 6), "one"), kept(after, short, "another"), after)
    assert angles[0, :4].isfinite().all() and angles[1].isnan().all()


OTHER_WAY_ROUND = Family(
    name="other way round",
    blocks=(
        BlockList("later.*", (StreamSeam("image", "hidden_states"),)),
        BlockList("earlier.*", (StreamSeam("image", "hidden_states"),)),
    ),
    targets=(),
)


class OtherWayRound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.earlier, self.later = nn.ModuleList([Add(), Add()]), nn.ModuleList([Add(), Add()])

    def forward(self, x: torch.Tensor) -> None:
        for block in (*self.earlier, *self.later):
            x = block(x)


@torch.no_grad()
def test_blocks_that_do_not_follow_each_other_are_no_pair():
    with Observer(OtherWayRound(), OTHER_WAY_ROUND, pairs=2) as observer:
        observer.begin({})
        observer.denoiser(torch.randn(1, 2, 4))
        assert observer.finish()["image", "pair2_mean"].isnan().tolist() == [[False, True, False]]
