"""Which devices take the angles by a kernel of their own, and whether it can be trusted there."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from functools import cache

import torch

DEVICES = ("cuda",)
"""Types of devices on which the kernel is tried (AMD's are called so too)."""
TOLERANCE = 2e-6
"""By how much its angles may differ from those of torch's operations. Both are taken in float32."""
SWITCH = "SIMPLETUNER_LAYERPROBE_KERNEL"
"""The environment variable that switches the kernel off with "0"."""

logger = logging.getLogger("SimpleTuner")

Angles = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(B, S, D) states before and after -> (B, S) float32, as `token_angles` has them."""


@cache
def fused_angles(
    device: torch.device, before_dtype: torch.dtype, after_dtype: torch.dtype, plain: Angles
) -> Angles | None:
    """The kernel, if the device runs it and it agrees with `plain`; else None.

    Tried once, with the first states. If it is not to be had, one warning says why: a step takes longer then.
    """
    if device.type not in DEVICES or os.environ.get(SWITCH) == "0":
        return None
    try:
        from simpletuner_layerprobe.probe.angles_kernel import angles

        differ = difference(angles, plain, device, before_dtype, after_dtype)
    except Exception as error:  # a compiler, a driver, a device: whatever it is, the plain operations do without it
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    else:
        if differ <= TOLERANCE:
            return angles
        reason = f"its angles differ by {differ:.1g}"
    logger.warning(f"layerprobe: the fused kernel is not used on {device}, steps take a little longer: {reason}")
    return None


def difference(
    one: Angles, other: Angles, device: torch.device, before_dtype: torch.dtype, after_dtype: torch.dtype
) -> float:
    """The largest difference of the angles that two functions take, over made-up states of all memory layouts.

    Angles from 1e-3 to 1 - 1e-3; infinite if they disagree on which tokens have none.
    """
    generator = torch.Generator().manual_seed(0)
    before_BSD, change_BSD = torch.randn(2, 2, 33, 1100, generator=generator)
    size_S1 = torch.logspace(-2.5, 1.5, 33).unsqueeze(1)
    sign_S1 = torch.tensor([1.0, -1.0, 1.0]).repeat(11).unsqueeze(1)
    after_BSD = sign_S1 * before_BSD + size_S1 * change_BSD
    before_BSD[1, 5] = after_BSD[0, 7] = 0
    before_BSD, after_BSD = before_BSD.to(device, before_dtype), after_BSD.to(device, after_dtype)
    worst = 0.0
    for u_BSD in (before_BSD, before_BSD.mT.contiguous().mT):
        for v_BSD in (after_BSD, after_BSD.mT.contiguous().mT):
            one_BS, other_BS = one(u_BSD, v_BSD), other(u_BSD, v_BSD)
            if not torch.equal(one_BS.isnan(), other_BS.isnan()):
                return math.inf
            worst = max(worst, float((one_BS - other_BS).nan_to_num().abs().max()))
    return worst
