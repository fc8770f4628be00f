"""All readings under the observer, on small modules; the real families are in tests/simpletuner/families."""

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
    float64_angles,
    flux_like,
    model_error,
    observed,
)

from simpletuner_layerprobe.probe.families import BlockList, Family
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.pairs import Before, Pair, moved_angles
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.states import State


@torch.no_grad()
def test_all_readings_over_the_change_from_double_to_joint_blocks():
    denoiser, image, text, mask = flux_like()
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    with Observer(denoiser, DOUBLE_AND_JOINT, residual=True, pairs=9) as observer:
        assert {name: len(paths) for name, paths in observer.streams.items()} == {"image": 5, "text": 5}
        assert observer.extra[-1] == "pair5_mean"  # there are five blocks
        for _ in range(2):
            states.clear()
            observer.begin({}, mask)
            denoiser(image, encoder_hidden_states=text, keep=states)
            taken = observer.finish()
    for stream, position, valid_BS in (("image", 0, np.ones((2, 15), dtype=bool)), ("text", 1, mask.numpy())):
        arrays = [state[position] for state in states]
        for span in range(1, 6):
            columns = [float64_angles(arrays[first], arrays[first + span]) for first in range(6 - span)]
            angles_BSC = np.stack(columns, -1)
            name = f"pair{span}_" if span > 1 else ""
            np.testing.assert_allclose(taken[stream, f"{name}last"], angles_BSC[:, -1], rtol=0, atol=2e-7)
            mean_BC = np.stack([angles_BSC[sample][valid_BS[sample]].mean(0) for sample in range(2)])
            np.testing.assert_allclose(taken[stream, f"{name}mean"], mean_BC, rtol=0, atol=2e-7)
        before_BLD, after_BLD = (
            np.stack([state[:, -1].double() for state in part], 1) for part in (arrays[:-1], arrays[1:])
        )
        norm_BL = np.linalg.norm(after_BLD - before_BLD, axis=-1) / np.linalg.norm(before_BLD, axis=-1)
        np.testing.assert_allclose(taken[stream, "update_norm_last"], norm_BL, rtol=1e-6)


@torch.no_grad()
def test_nothing_more_is_taken_unless_asked():
    taken = observed(FluxLike(), DOUBLE_AND_JOINT, torch.randn(1, 15, 6), torch.randn(1, 7, 6), pairs=1)
    assert {reading for _, reading in taken} == {"last", "mean"}


class Sizes(Denoiser):
    """Blocks on states that shrink after the second and lose a token after the fourth."""

    def forward(self, x: torch.Tensor) -> None:
        first, second, third, fourth, fifth, sixth = self.blocks
        x = second(first(x))
        x = fourth(third(x[..., :4] * 2.0))
        sixth(fifth(x[:, 1:]))


@torch.no_grad()
def test_no_pair_is_over_a_change_of_width_or_of_tokens():
    taken = observed(Sizes(*(Add() for _ in range(6))), SMALL, torch.randn(2, 5, 8), pairs=3)
    assert taken["image", "mean"].isfinite().all()
    for reading in ("last", "mean"):
        assert taken["image", f"pair2_{reading}"].isnan().tolist() == [[False, True, False, True, False]] * 2
        assert taken["image", f"pair3_{reading}"].isnan().all()


class Between(Denoiser):
    """What stands between the blocks changes the state that the first of them got, from the given forward on."""

    def __init__(self, start: int) -> None:
        super().__init__(Add(), Add(), Add())
        self.start = start

    def forward(self, x: torch.Tensor) -> None:
        first, second, third = self.blocks
        state = second(first(x))
        if first.calls >= self.start:
            x += 100.0
        third(state)


@torch.no_grad()
def test_states_that_are_changed_in_place_while_they_are_kept():
    x = torch.randn(2, 3, 4)
    expected = cosine_distances([x, x + 1.5])[:, -1]
    for denoiser in (Denoiser(Add(in_place_from=1), Add(), Add(in_place_from=1)), Between(start=1)):
        with Observer(denoiser, SMALL, pairs=3) as observer:
            for _ in range(3):  # only the first forward copies every state
                observer.begin({})
                denoiser(x.clone())
                np.testing.assert_allclose(observer.finish()["image", "pair3_last"], expected, rtol=0, atol=2e-7)
    with Observer(Between(start=2), SMALL, pairs=3) as observer:
        observer.begin({})
        observer.denoiser(x.clone())
        observer.begin({})
        with model_error("the state before blocks.0 was changed in place after that block"):
            observer.denoiser(x.clone())


@torch.no_grad()
@pytest.mark.parametrize("longest", [1, 2, 4])
def test_as_many_states_are_kept_as_the_longest_span_has_blocks(longest):
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def watch(x: torch.Tensor) -> None:
        alive.append(weakref.ref(x))
        del x
        counts.append(sum(state() is not None for state in alive))

    with Observer(Denoiser(*(Add() for _ in range(8))), SMALL, pairs=longest) as observer:
        for _ in range(2):
            alive.clear()
            counts.clear()
            observer.begin({})
            observer.denoiser(torch.randn(1, 2, 4), watch=watch)
            assert sum(state() is not None for state in alive) == 0  # after the last block nothing is kept
            observer.finish()
    assert max(counts) == longest  # among them the forward's own


def kept(state_BSD: torch.Tensor, tokens: Any, rule: str) -> Before:
    return Before(0, "a", State(state_BSD, None, 0), state_BSD, Part(tokens), rule)


def test_tokens_at_other_positions_are_matched_one_by_one():
    torch.manual_seed(0)
    before, after = torch.randn(2, 6, 5), torch.randn(2, 9, 5)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 2, 3, 4]] = mask[1, [0, 6, 7, 8]] = True
    for tokens in (slice(2, 6), torch.tensor([[False, False] + [True] * 4] * 2)):
        pair = Pair(2, kept(before, tokens, "one"), kept(after, mask, "another"))
        angles, part = moved_angles(pair, after)
        for sample in range(2):
            expected_S = float64_angles(before[sample, 2:6], after[sample][mask[sample]])
            np.testing.assert_allclose(angles[sample][part.tokens[sample]], expected_S, rtol=0, atol=2e-7)
    short = mask.clone()
    short[1, 8] = False
    angles, part = moved_angles(Pair(2, kept(before, slice(2, 6), "one"), kept(after, short, "another")), after)
    assert angles[0, :4].isfinite().all() and angles[1].isnan().all()


@torch.no_grad()
def test_blocks_that_do_not_follow_each_other_are_no_pair():
    """In the table the blocks that run later come first."""
    lists = tuple(BlockList(f"blocks.{number}", SMALL.blocks[0].streams) for number in (2, 3, 0, 1))
    taken = observed(Denoiser(Add(), Add(), Add(), Add()), Family("other", lists), torch.randn(1, 2, 4), pairs=2)
    assert taken["image", "pair2_mean"].isnan().tolist() == [[False, True, False]]
