"""The distances between two hidden states of every token: by the fused kernel where a device has it and it agrees.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.probe.angles import CPU, cpu_angles, plain_angles
from simpletuner_layerprobe.probe.updates import token_updates

KERNEL_DEVICES = ("cuda",)
"""Types of devices on which the kernel of angles_kernel.py is tried (AMD's are called so too)."""
KERNEL_TOLERANCE = 2e-6
"""By how much its values may differ from those of torch's operations. Both are taken in float32."""
KERNEL_SWITCH = "SIMPLETUNER_LAYERPROBE_KERNEL"
"""The environment variable that switches the kernel off with "0"."""

logger = logging.getLogger(__name__)

Kernel = Callable[..., tuple[torch.Tensor, ...]]
"""As `token_changes`; all states before of one dtype, and with the same strides."""
Layout = tuple[torch.dtype, bool]
"""A state's dtype, and whether a token's numbers are neighbours in memory."""
Size = tuple[int, int]
"""A state's width, and its tokens in all samples, down to a power of two."""


def token_angles(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> torch.Tensor:
    """Angular distance arccos(cos)/pi of every token's hidden state before and after a block.

    Returns (B, S) float32 in [0, 1]: 0 same direction, 0.5 orthogonal, 1 opposite. The states may have any
    floating dtype; the angle is taken in float32. NaN where a state is zero (it has no direction) or not finite.

    There has to be a token. Raises ModelError if the shapes differ.
    """
    return token_changes(before_BSD, after_BSD)[0]


def token_changes(
    before_BSD: torch.Tensor, after_BSD: torch.Tensor, updates: bool = False, earlier_BSD: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """(angles,) as `token_angles` has them; with updates, (angles, norms, cosines), the last two of `token_updates`.

    After them the angles of each of the earlier states with `after_BSD`; where they lie as `before_BSD` does, by the
    same launch. Their shapes must be the same.
    """
    if before_BSD.shape != after_BSD.shape:
        raise ModelError(
            f"a block changed the shape of its hidden states from {tuple(before_BSD.shape)} to "
            f"{tuple(after_BSD.shape)}; the distance needs the same tokens before and after"
        )
    samples, tokens, width = before_BSD.shape
    size = width, 1 << ((samples * tokens).bit_length() - 1)
    kernel = device_kernel(before_BSD.device, size, _layout(before_BSD), _layout(after_BSD), updates)
    if kernel is None:
        return _plain_changes(before_BSD, after_BSD, updates, earlier_BSD)
    lies = before_BSD.dtype, before_BSD.stride()
    if all((state_BSD.dtype, state_BSD.stride()) == lies for state_BSD in earlier_BSD):
        return kernel(before_BSD, after_BSD, updates, earlier_BSD)
    return *kernel(before_BSD, after_BSD, updates), *(token_angles(state_BSD, after_BSD) for state_BSD in earlier_BSD)


@torch.no_grad()
def _plain_changes(
    before_BSD: torch.Tensor, after_BSD: torch.Tensor, updates: bool, earlier_BSD: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    angles = cpu_angles if before_BSD.device.type == "cpu" else plain_angles
    added = token_updates(before_BSD, after_BSD) if updates else ()
    return angles(before_BSD, after_BSD), *added, *(angles(state_BSD, after_BSD) for state_BSD in earlier_BSD)


def _layout(state_BSD: torch.Tensor) -> Layout:
    return state_BSD.dtype, state_BSD.stride(-1) == 1


@cache
def device_kernel(device: torch.device, size: Size, before: Layout, after: Layout, updates: bool) -> Kernel | None:
    """The kernel of angles_kernel.py, if the device runs it and it agrees with torch's operations; else None.

    Tried once for states of this size and layout, so that it is compiled only for what it is used for. If it is not to
    be had, one warning says why: a step takes longer then.
    """
    if device.type not in KERNEL_DEVICES or os.environ.get(KERNEL_SWITCH) == "0":
        return None
    try:
        from simpletuner_layerprobe.probe.angles_kernel import changes

        differ = difference(changes, device, size, before, after, updates)
    except Exception as error:  # a compiler, a driver, a device: whatever it is, the plain operations do without it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    else:
        if differ <= KERNEL_TOLERANCE:
            return changes
        reason = f"its values differ by {differ:.1g}"
    _warn(f"layerprobe: the fused kernel is not used on {device}, steps take a little longer: {reason}")
    return None


@cache
def _warn(message: str) -> None:
    """Once for the same reason."""
    logger.warning(message)


def difference(kernel: Kernel, device: torch.device, size: Size, before: Layout, after: Layout, updates: bool) -> float:
    """The largest difference of a kernel's values from those of torch's operations, over made-up states like these.

    Angles from 1e-3 to 1 - 1e-3; the updates' norms relative. Infinite if they disagree on which tokens have none.
    """
    u_BSD, v_BSD = (
        state_BSD.to(device, dtype) if rows else state_BSD.to(device, dtype).mT.contiguous().mT
        for state_BSD, (dtype, rows) in zip(_made_up_states(size[0]), (before, after), strict=True)
    )
    samples = -(-size[1] // u_BSD.shape[1])
    worst = 0.0
    earlier_BSD = u_BSD.neg()
    expected = _plain_changes(u_BSD, v_BSD, updates, [earlier_BSD])
    # As many tokens as there will be, without the memory for them.
    u_BSD, v_BSD, earlier_BSD = (state_BSD.expand(samples, -1, -1) for state_BSD in (u_BSD, v_BSD, earlier_BSD))
    made = kernel(u_BSD, v_BSD, updates, [earlier_BSD])
    for number, (value_BS, expected_BS) in enumerate(zip(made, expected, strict=True)):
        if not torch.equal(value_BS.isnan(), expected_BS.isnan().expand_as(value_BS)):
            return math.inf
        if updates and number == 1:  # a norm has no bound
            value_BS, expected_BS = value_BS / expected_BS, torch.ones_like(expected_BS)
        worst = max(worst, float((value_BS - expected_BS).nan_to_num().abs().max()))
    return worst


def _made_up_states(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (1, 96, width) before and after a block that changes each token by another amount.

    Among them zeros, an update of zero, and one of which most lies in the last number while the others double.
    """
    generator = torch.Generator(CPU).manual_seed(0)
    before_BSD, change_BSD = (
        torch.empty(1, 96, width, dtype=torch.float32, device=CPU).normal_(generator=generator) for _ in range(2)
    )
    size_S = torch.logspace(-2.5, 1.5, 96, dtype=torch.float32, device=CPU)
    sign_S = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float32, device=CPU).repeat(32)
    after_BSD = sign_S[:, None] * before_BSD + size_S[:, None] * change_BSD
    before_BSD[0, 5] = after_BSD[0, 7] = 0
    after_BSD[0, 9] = before_BSD[0, 9]
    after_BSD[0, 40] = 2 * before_BSD[0, 40]
    before_BSD[0, 40, -1] = after_BSD[0, 40, -1] = 30 * width**0.5
    return before_BSD, after_BSD
