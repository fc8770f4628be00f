from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small import float64_angles, laid_out, states

from simpletuner_layerprobe.probe import angles as plain
from simpletuner_layerprobe.probe import distances
from simpletuner_layerprobe.probe.distances import token_angles, token_changes

both_layouts = pytest.mark.parametrize("by_width", [False, True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 333, 96), (1, 517, 2432)])
@pytest.mark.parametrize("by_width", ["", "before", "after", "before after"])
def test_agrees_with_float64(shape, size, dtype, by_width):
    before, after = (
        laid_out(state, name in by_width)
        for state, name in zip(states(0, shape, size, dtype), ("before", "after"), strict=True)
    )
    kept = before.clone(), after.clone()
    angles_BS = token_angles(before, after)
    assert angles_BS.dtype == torch.float32
    assert torch.equal(before, kept[0]) and torch.equal(after, kept[1])
    # arccos itself is only good to sqrt(2 eps)/pi = 7e-9 there, far below the bound
    np.testing.assert_allclose(angles_BS.numpy(), float64_angles(before, after), rtol=0, atol=2e-7)


@both_layouts
def test_small_angles_are_exact(by_width):
    """Where float32 arccos gives 0 or rounding noise; beside large ones."""
    angle_S = torch.tensor([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.1, 1, 3, math.pi - 1e-6], dtype=torch.float64)
    after = torch.stack([angle_S.cos(), angle_S.sin()], dim=1).float()[None]  # the state that the model really has
    before = torch.tensor([1.0, 0.0]).repeat(1, len(angle_S), 1)
    angles_BS = token_angles(laid_out(before, by_width), laid_out(after, by_width))
    cosine_S, sine_S = after[0].double().numpy().T
    np.testing.assert_allclose(angles_BS[0].numpy(), np.arctan2(sine_S, cosine_S) / math.pi, rtol=1e-6, atol=1e-9)


@both_layouts
@pytest.mark.parametrize("scale", [2.0**-20, 3.0, 1e6])
def test_length_does_not_count_and_the_ends_are_exact(scale, by_width):
    before, after = (laid_out(state, by_width) for state in states(1, (2, 40, 24), 10.0, torch.float32))
    torch.testing.assert_close(token_angles(before, scale * after), token_angles(after, before), rtol=0, atol=3e-7)
    assert torch.equal(token_angles(before, before), torch.zeros(2, 40))
    torch.testing.assert_close(token_angles(before, -scale * before), torch.ones(2, 40), rtol=0, atol=1e-7)


@both_layouts
def test_chunks_change_nothing(monkeypatch, by_width):
    before, after = (laid_out(state, by_width) for state in states(3, (2, 50, 16), 1.0, torch.bfloat16))
    whole = token_angles(before, after)
    monkeypatch.setitem(plain.CHUNK_ELEMENTS, "cpu", 2 * 16 * 7)
    # not bit for bit: torch takes the last few elements of a tensor by another atan2
    torch.testing.assert_close(token_angles(before, after), whole, rtol=0, atol=1e-7)


@both_layouts
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_a_state_without_direction_is_nan(by_width, size):
    before, after = (laid_out(state, by_width) for state in states(4, (1, 4, 8), size, torch.float32))
    before[0, 1] = 0
    after[0, 2, 3] = torch.inf
    before[0, 3] = after[0, 3] = 0
    for u, v in ((before, after), (after, before)):
        angles = token_angles(u, v)
        assert angles[0, 0].isfinite() and angles[0, [1, 3]].isnan().all() and not angles[0, 2].isfinite()


@both_layouts
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torch_defaults_change_nothing(by_width, default):
    before, after = (laid_out(state, by_width) for state in states(6, (2, 30, 96), 0.3, torch.bfloat16))
    expected = token_angles(before, after)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            angles = token_angles(before, after)
            layouts = (torch.float32, True), (torch.bfloat16, not by_width)
            differ = distances.difference(token_changes, before.device, (96, 60), *layouts, True)
    finally:
        torch.set_default_dtype(kept)
    assert angles.dtype == torch.float32 and angles.device.type == "cpu"
    assert torch.equal(angles, expected) and differ < 3e-7
