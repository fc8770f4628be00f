from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from failing import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.probe import angles as distance
from simpletuner_layerprobe.probe.angles import last_token, mean_token, token_angles


def reference(u: torch.Tensor, v: torch.Tensor) -> np.ndarray:
    """arccos(cos)/pi in float64, as the article writes it (without its clamp)."""
    a, b = u.double().numpy(), v.double().numpy()
    cos = np.einsum("bsd,bsd->bs", a, b) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return np.arccos(np.clip(cos, -1, 1)) / np.pi


def states(
    seed: int, shape: tuple[int, int, int], size: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator) * 10
    return before.to(dtype), (before + size * torch.randn(shape, generator=generator)).to(dtype)


def laid_out(state_BSD: torch.Tensor, by_width: bool) -> torch.Tensor:
    """The same state, on request with the tokens as neighbours in memory, as SD3's image stream is."""
    return state_BSD.mT.contiguous().mT if by_width else state_BSD


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
    found = token_angles(before, after)
    assert found.dtype == torch.float32
    assert torch.equal(before, kept[0]) and torch.equal(after, kept[1])
    # arccos itself is only good to sqrt(2 eps)/pi = 7e-9 there, far below the bound
    np.testing.assert_allclose(found.numpy(), reference(before, after), rtol=0, atol=2e-7)


@pytest.mark.parametrize("angle", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.1, 1.0, 3.0, math.pi - 1e-6])
def test_small_angles_are_exact(angle):
    """Where float32 arccos gives 0 or rounding noise."""
    u = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[math.cos(angle), math.sin(angle)]]], dtype=torch.float64)
    found = token_angles(u.float(), v.float()).item()
    v = v.float().double()  # the state that the model really had
    expected = math.atan2(v[0, 0, 1].item(), v[0, 0, 0].item()) / math.pi
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(1e-5, 1e3),
    scale=st.sampled_from([2.0**-20, 0.25, 3.0, 1e6]),
    tokens=st.integers(1, 40),
    by_width=st.booleans(),
)
def test_properties(seed, size, scale, tokens, by_width):
    before, after = (laid_out(state, by_width) for state in states(seed, (2, tokens, 24), size, torch.float32))
    angles = token_angles(before, after)
    assert ((angles >= 0) & (angles <= 1)).all()
    torch.testing.assert_close(angles, token_angles(after, before), rtol=0, atol=3e-7)
    torch.testing.assert_close(angles, token_angles(before, scale * after), rtol=0, atol=3e-7)
    assert torch.equal(token_angles(before, before), torch.zeros(2, tokens))
    torch.testing.assert_close(token_angles(before, -before), torch.ones(2, tokens), rtol=0, atol=1e-7)
    torch.testing.assert_close(angles + token_angles(before, -after), torch.ones(2, tokens), rtol=0, atol=3e-7)


@pytest.mark.parametrize("by_width", [False, True])
def test_chunks_change_nothing(monkeypatch, by_width):
    before, after = (laid_out(state, by_width) for state in states(3, (2, 50, 16), 1.0, torch.bfloat16))
    whole = token_angles(before, after)
    monkeypatch.setitem(distance.CHUNK_ELEMENTS, "cpu", 2 * 16 * 7)
    # not bit for bit: torch takes the last few elements of a tensor by another atan2
    torch.testing.assert_close(token_angles(before, after), whole, rtol=0, atol=1e-7)


def test_other_devices_take_the_states_unconverted():
    """There the operations mix bfloat16 states with float32 factors; type promotion is the same on all devices."""
    before, after = states(5, (2, 33, 96), 0.3, torch.bfloat16)
    stretch = torch.rand(2, 33, 1)
    for value in (1, -1):
        mixed = torch.addcmul(after, before, stretch, value=value)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, torch.addcmul(after.float(), before.float(), stretch, value=value))
    norm = torch.linalg.vector_norm(before, dim=-1, keepdim=True, dtype=torch.float32)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(before.float(), dim=-1, keepdim=True))


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_a_state_without_direction_is_nan(by_width, size):
    before, after = (laid_out(state, by_width) for state in states(4, (1, 3, 8), size, torch.float32))
    before[0, 1] = 0
    after[0, 2, 3] = torch.inf
    for u, v in ((before, after), (after, before)):
        angles = token_angles(u, v)
        assert angles[0, 0].isfinite() and angles[0, 1].isnan() and not angles[0, 2].isfinite()
    zero = laid_out(torch.zeros(1, 2, 4), by_width)
    assert token_angles(zero, zero).isnan().all()


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("degrees", [30, 40, 150])
def test_one_large_angle_spoils_no_other(degrees, by_width):
    """Small angles are taken by their sine alone, and as soon as one is large all of the piece by both lengths."""
    angle_S = torch.tensor([1e-6, 1e-3, math.radians(degrees), 0.2], dtype=torch.float64)
    after = torch.stack([angle_S.cos(), angle_S.sin()], dim=1).float().unsqueeze(0)
    before = torch.tensor([1.0, 0.0]).expand(1, 4, 2)
    found = token_angles(laid_out(before.contiguous(), by_width), laid_out(after, by_width))
    expected_S = np.arctan2(*after[0].double().numpy().T[::-1]) / math.pi
    np.testing.assert_allclose(found[0].numpy(), expected_S, rtol=1e-6)


def test_shapes_must_agree():
    with fails("changed the shape of its hidden states from (1, 4, 8) to (1, 5, 8)"):
        token_angles(torch.ones(1, 4, 8), torch.ones(1, 5, 8))


def test_readings():
    angles = torch.tensor([[0.1, 0.2, 0.6], [0.3, 0.5, math.nan]])
    assert last_token(angles)[0].item() == pytest.approx(0.6)
    valid = torch.tensor([[True, True, False], [False, True, False]])
    torch.testing.assert_close(mean_token(angles, valid), torch.tensor([0.15, 0.5]))
    assert mean_token(angles, None)[0].item() == pytest.approx(0.3)
    assert mean_token(angles, torch.zeros(2, 3, dtype=torch.bool)).isnan().all()
