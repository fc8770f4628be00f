"""The angle between two hidden states, exact for small angles. Pure.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch

from simpletuner_layerprobe.errors import ModelError

# Elements handled at once: bounds the float32 copies. A piece costs a few calls whatever its size, and a large one
# leaves the cache, on a CPU that of a core and its share of the common one.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_DEVICE = 1 << 22
CPU = torch.device("cpu")

KERNEL_DEVICES = ("cuda",)
"""Types of devices on which the kernel of angles_kernel.py is tried (AMD's are called so too)."""
KERNEL_TOLERANCE = 2e-6
"""By how much its angles may differ from those of torch's operations. Both are taken in float32."""
KERNEL_SWITCH = "SIMPLETUNER_LAYERPROBE_KERNEL"
"""The environment variable that switches the kernel off with "0"."""

logger = logging.getLogger(__name__)

Angles = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, S, D) states before and after -> (B, S) float32, as `token_angles` has them."""


@torch.no_grad()
def token_angles(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> torch.Tensor:
    """Angular distance arccos(cos)/pi of every token's hidden state before and after a block.

    Returns (B, S) float32 in [0, 1]: 0 same direction, 0.5 orthogonal, 1 opposite. The states may have any
    floating dtype; the angle is taken in float32. NaN where a state is zero (it has no direction) or not finite.

    arccos loses half of the digits near cos = 1, where most blocks are: in float32 an angle below 3e-4 cannot be
    told from 0. Here u is first brought to the length of v, then angle = 2*atan2(|v - u|, |v + u|), which is exact to
    rounding for all angles (W. Kahan, "How futile are mindless assessments of roundoff in floating-point
    computation?", 2006, section 12).

    There has to be a token. Raises ModelError if the shapes differ.
    """
    if before_BSD.shape != after_BSD.shape:
        raise ModelError(
            f"a block changed the shape of its hidden states from {tuple(before_BSD.shape)} to "
            f"{tuple(after_BSD.shape)}; the distance needs the same tokens before and after"
        )
    if before_BSD.device.type == "cpu":
        if before_BSD.stride(-1) != 1 and after_BSD.stride(-1) != 1:
            return _cpu_angles_by_width(before_BSD.mT, after_BSD.mT)
        return _cpu_angles(before_BSD, after_BSD)
    kernel = device_kernel(before_BSD.device, before_BSD.dtype, after_BSD.dtype)
    return (kernel or plain_angles)(before_BSD, after_BSD)


def chunks(shape: Sequence[int], device: str) -> Iterator[slice]:
    """The tokens of a state (B, S, D) in pieces that are handled at once on this type of device."""
    samples, tokens, width = shape
    yield from _pieces(tokens, samples * width, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_DEVICE))


def _pieces(count: int, elements: int, at_once: int) -> Iterator[slice]:
    """`count` rows of so many elements, in pieces of at most `at_once` elements, or else of one row."""
    step = max(1, at_once // max(1, elements))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def plain_angles(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> torch.Tensor:
    """The angles by torch's own operations, for devices that convert the states in their registers.

    Of each piece both states are read three times, and two float32 tensors written and read.
    """
    parts = []
    for tokens in chunks(before_BSD.shape, before_BSD.device.type):
        u_BSD, v_BSD = narrowed(before_BSD[:, tokens]), narrowed(after_BSD[:, tokens])
        u_norm_BS1, v_norm_BS1 = token_norm(u_BSD), token_norm(v_BSD)
        stretch_BS1 = v_norm_BS1 / u_norm_BS1
        # float32 because `stretch_BS1` is, whatever the states are.
        across_BS1 = token_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1, value=-1))
        along_BS1 = token_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1))
        parts.append(_angles_of(across_BS1, along_BS1, v_norm_BS1).squeeze(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _cpu_angles(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> torch.Tensor:
    """The angles on a CPU, some tokens at a time in float32 buffers that stay in the cache."""
    samples, _, width = u_BSD.shape
    pieces = list(chunks(u_BSD.shape, "cpu"))
    u_buffer, v_buffer, buffer = (_buffer(samples, pieces[0].stop, width) for _ in range(3))
    parts = []
    for piece in pieces:
        some = slice(piece.stop - piece.start)
        u, v = u_buffer[:, some].copy_(u_BSD[:, piece]), v_buffer[:, some].copy_(v_BSD[:, piece])
        v_norm = token_norm(v)
        stretch = v_norm / token_norm(u)
        across = token_norm(torch.addcmul(v, u, stretch, value=-1, out=buffer[:, some]))
        along = token_norm(torch.addcmul(v, u, stretch, out=buffer[:, some]))
        parts.append(_angles_of(across, along, v_norm).squeeze(-1))
    return torch.cat(parts, dim=1)


def _cpu_angles_by_width(u_BDS: torch.Tensor, v_BDS: torch.Tensor) -> torch.Tensor:
    """The same for states whose tokens are neighbours in memory, as SD3's patch embedding leaves its image stream.

    A piece is some of the width instead of some tokens: what is read and written are whole rows, which takes a third of
    the time.
    """
    samples, width, tokens = u_BDS.shape
    pieces = list(_pieces(width, samples * tokens, CHUNK_ELEMENTS["cpu"]))
    u_buffer, v_buffer, buffer = (_buffer(samples, pieces[0].stop, tokens) for _ in range(3))
    u_BS, v_BS, across_BS, along_BS = _buffer(4, samples, tokens).zero_()
    for piece in pieces:
        some = slice(piece.stop - piece.start)
        u_BS += u_buffer[:, some].copy_(u_BDS[:, piece]).square_().sum(dim=1)
        v_BS += v_buffer[:, some].copy_(v_BDS[:, piece]).square_().sum(dim=1)
    stretch_B1S = (v_BS.sqrt_() / u_BS.sqrt_()).unsqueeze(1)
    for piece in pieces:
        some = slice(piece.stop - piece.start)
        u, v = u_buffer[:, some].copy_(u_BDS[:, piece]), v_buffer[:, some].copy_(v_BDS[:, piece])
        across_BS += torch.addcmul(v, u, stretch_B1S, value=-1, out=buffer[:, some]).square_().sum(dim=1)
        along_BS += torch.addcmul(v, u, stretch_B1S, out=buffer[:, some]).square_().sum(dim=1)
    return _angles_of(across_BS.sqrt_(), along_BS.sqrt_(), v_BS)


def _buffer(*shape: int) -> torch.Tensor:
    """Said in full: torch's default dtype and device may have been set to anything."""
    return torch.empty(shape, dtype=torch.float32, device=CPU)


def _angles_of(across: torch.Tensor, along: torch.Tensor, v_norm: torch.Tensor) -> torch.Tensor:
    """The angles by |v - u| and |v + u|. A zero u makes the stretch infinite and the angle NaN by itself."""
    return torch.atan2(across, along).mul_(2 / math.pi).masked_fill_(v_norm == 0, math.nan)


def narrowed(state: torch.Tensor) -> torch.Tensor:
    """The state, or a float32 copy of a float64 one: torch takes no norm in a narrower dtype than the state's."""
    return state.float() if state.dtype == torch.float64 else state


def token_norm(state_BSD: torch.Tensor) -> torch.Tensor:
    """Length of every token's state, (B, S, 1) float32."""
    if state_BSD.device.type == "cpu" and state_BSD.stride(-1) != 1:
        # On a CPU vector_norm takes nine times as long where a token's numbers are not neighbours in memory (SD3's
        # image stream is made so by its patch embedding), the sum of squares twice. Not vecdot: autocast would take it
        # in bfloat16.
        return state_BSD.float().square().sum(dim=-1, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(state_BSD, dim=-1, keepdim=True, dtype=torch.float32)


@cache
def device_kernel(device: torch.device, before_dtype: torch.dtype, after_dtype: torch.dtype) -> Angles | None:
    """The kernel of angles_kernel.py, if the device runs it and it agrees with `plain_angles`; else None.

    Tried once, with the first states. If it is not to be had, one warning says why: a step takes longer then.
    """
    if device.type not in KERNEL_DEVICES or os.environ.get(KERNEL_SWITCH) == "0":
        return None
    try:
        from simpletuner_layerprobe.probe.angles_kernel import angles

        differ = difference(angles, device, before_dtype, after_dtype)
    except Exception as error:  # a compiler, a driver, a device: whatever it is, the plain operations do without it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    else:
        if differ <= KERNEL_TOLERANCE:
            return angles
        reason = f"its angles differ by {differ:.1g}"
    logger.warning(f"layerprobe: the fused kernel is not used on {device}, steps take a little longer: {reason}")
    return None


def difference(angles: Angles, device: torch.device, before_dtype: torch.dtype, after_dtype: torch.dtype) -> float:
    """The largest difference of a function's angles from `plain_angles`, over made-up states of all memory layouts.

    Angles from 1e-3 to 1 - 1e-3; infinite if they disagree on which tokens have none.
    """
    before_BSD, after_BSD = _made_up_states()
    before_BSD, after_BSD = before_BSD.to(device, before_dtype), after_BSD.to(device, after_dtype)
    worst = 0.0
    for u_BSD in (before_BSD, before_BSD.mT.contiguous().mT):
        for v_BSD in (after_BSD, after_BSD.mT.contiguous().mT):
            angles_BS, expected_BS = angles(u_BSD, v_BSD), plain_angles(u_BSD, v_BSD)
            if not torch.equal(angles_BS.isnan(), expected_BS.isnan()):
                return math.inf
            worst = max(worst, float((angles_BS - expected_BS).nan_to_num().abs().max()))
    return worst


def _made_up_states() -> tuple[torch.Tensor, torch.Tensor]:
    """States (2, 33, 1100) before and after a block that changes each token by another amount; two are zero."""
    generator = torch.Generator(CPU).manual_seed(0)
    before_BSD, change_BSD = (_buffer(2, 33, 1100).normal_(generator=generator) for _ in range(2))
    size_S = torch.logspace(-2.5, 1.5, 33, dtype=torch.float32, device=CPU)
    sign_S = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float32, device=CPU).repeat(11)
    after_BSD = sign_S[:, None] * before_BSD + size_S[:, None] * change_BSD
    before_BSD[1, 5] = after_BSD[0, 7] = 0
    return before_BSD, after_BSD
