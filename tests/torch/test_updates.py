from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small import float64_updates, laid_out, states

from simpletuner_layerprobe.probe import angles
from simpletuner_layerprobe.probe.distances import token_angles
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.updates import token_updates, update_readings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 333, 96), (1, 57, 2432)])
def test_agrees_with_float64(shape, size, dtype):
    before, after = states(0, shape, size, dtype)
    norm, cosine = token_updates(before, after)
    assert norm.dtype == cosine.dtype == torch.float32
    norm_BS, cosine_BS = float64_updates(before, after)
    np.testing.assert_allclose(norm.numpy(), norm_BS, rtol=1e-6, atol=0)
    moved_BS = norm_BS > 0
    np.testing.assert_allclose(cosine.numpy()[moved_BS], cosine_BS[moved_BS], rtol=0, atol=5e-7)


@pytest.mark.parametrize(("factor", "cosine"), [(3.0, 1.0), (0.5, -1.0), (-2.0, -1.0)])
def test_a_state_that_is_only_scaled_has_an_update_along_it(factor, cosine):
    """Also where the square of its length leaves float32's range."""
    before = torch.tensor([[[1e-18, 0.0], [1e18, 0.0], [1.0, -2.0]]])
    norm_BS, cosine_BS = token_updates(before, factor * before)
    torch.testing.assert_close(norm_BS, torch.full((1, 3), abs(factor - 1)))
    torch.testing.assert_close(cosine_BS, torch.full((1, 3), cosine))


def test_states_without_length_and_updates_of_zero():
    before, after = states(4, (1, 5, 8), 1.0, torch.float32)
    before[0, 1], after[0, 2], after[0, 3], after[0, 4, 1] = 0, 0, before[0, 3], torch.inf
    norm, cosine = (value[0].tolist() for value in token_updates(before, after))
    assert math.isnan(norm[1]) and math.isnan(cosine[1])
    assert norm[2] == 1 and cosine[2] == pytest.approx(-1)
    assert norm[3] == 0 and math.isnan(cosine[3])
    assert norm[4] == math.inf and math.isnan(cosine[4])


def test_chunks_change_nothing(monkeypatch):
    before, after = states(3, (2, 50, 16), 1.0, torch.bfloat16)
    whole = token_updates(before, after)
    monkeypatch.setitem(angles.CHUNK_ELEMENTS, "cpu", 2 * 16 * 7)
    torch.testing.assert_close(token_updates(before, after), whole, rtol=0, atol=1e-7)


def test_the_mean_cosine_is_over_the_tokens_that_have_an_update():
    norm = torch.tensor([[1.0, 0.0, 3.0, 0.0], [2.0, 4.0, 6.0, 8.0], [0.0, 0.0, 0.0, 5.0]])
    cosine = torch.tensor([[0.5, math.nan, -0.1, math.nan], [0.1, 0.2, 0.3, 0.4], [math.nan] * 3 + [0.9]])
    valid = torch.tensor([[True] * 4, [True, True, True, False], [True, True, True, False]])
    expected = {"update_norm_mean": [1.0, 4.0, 0.0], "update_cosine_mean": [0.2, 0.2, math.nan]}
    last = {
        "update_norm_last": ([0, 8, 5], [0, 6, 0]),
        "update_cosine_last": ([math.nan, 0.4, 0.9], [math.nan, 0.3, math.nan]),
    }
    for number, part in enumerate((Part(slice(0, 4), valid), Part(valid))):
        taken = update_readings(norm, cosine, part)
        for name, values in (expected | {name: value[number] for name, value in last.items()}).items():
            torch.testing.assert_close(taken[name], torch.tensor(values, dtype=torch.float32), equal_nan=True, msg=name)
    whole = update_readings(norm, cosine, Part(slice(1, 3)))["update_cosine_mean"]
    torch.testing.assert_close(whole, torch.tensor([-0.1, 0.25, math.nan]), equal_nan=True)


@pytest.mark.parametrize("by_width", [False, True])
def test_autocast_does_not_lower_the_precision(by_width):
    before, after = (laid_out(state, by_width) for state in states(7, (2, 24, 33), 1.0, torch.float32))
    plain = token_angles(before, after), *token_updates(before, after)
    with torch.autocast("cpu", torch.bfloat16):
        taken = token_angles(before, after), *token_updates(before, after)
    for value, expected in zip(taken, plain, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, expected)
