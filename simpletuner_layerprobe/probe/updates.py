"""What a block adds to a hidden state: how long it is beside the state, and where it points. Pure.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import math

import torch

from simpletuner_layerprobe.probe.angles import chunks, narrowed, token_norm
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.readings import UPDATE_COSINE, UPDATE_NORM


@torch.no_grad()
def token_updates(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative norm |after - before| / |before| of every token's update, and the cosine of its angle to `before`.

    Both (B, S) float32, taken in float32 whatever the states are; the norm is 0 or more, the cosine in [-1, 1]: 1 the
    update lengthens the state, 0 it stands across it, -1 it takes from it. An update of zero has norm 0 and, since it
    has no direction, cosine NaN. Both are NaN where `before` is zero. The shapes must be equal.
    """
    parts = [
        _updates(before_BSD[:, tokens], after_BSD[:, tokens])
        for tokens in chunks(before_BSD.shape, before_BSD.device.type)
    ]
    norm_BS, cosine_BS = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    return norm_BS, cosine_BS


def _updates(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u_BSD, v_BSD = (
        state_BSD.float() if state_BSD.device.type == "cpu" else narrowed(state_BSD) for state_BSD in (u_BSD, v_BSD)
    )
    u_norm_BS1 = token_norm(u_BSD)
    # The factor of float32 makes the difference float32 without a copy of the states.
    update_BSD = torch.addcmul(v_BSD, u_BSD, torch.ones_like(u_norm_BS1), value=-1)
    update_norm_BS1 = token_norm(update_BSD)
    # One division after the other: the product of the norms could leave float32's range.
    cosine_BS1 = update_BSD.mul_(u_BSD).sum(dim=-1, keepdim=True) / update_norm_BS1 / u_norm_BS1
    norm_BS1 = (update_norm_BS1 / u_norm_BS1).masked_fill_(u_norm_BS1 == 0, math.nan)
    return norm_BS1.squeeze(-1), cosine_BS1.clamp_(-1, 1).squeeze(-1)


def update_readings(norm_BS: torch.Tensor, cosine_BS: torch.Tensor, part: Part) -> dict[str, torch.Tensor]:
    """The readings of one stream from the updates of all tokens of a state: name -> (B,) float32.

    The mean cosine is over those of the stream's valid tokens that have an update; NaN if there is none.
    """
    return {
        f"{UPDATE_NORM}_last": part.last(norm_BS),
        f"{UPDATE_NORM}_mean": part.mean(norm_BS),
        f"{UPDATE_COSINE}_last": part.last(cosine_BS),
        f"{UPDATE_COSINE}_mean": part.mean(cosine_BS, among_BS=norm_BS != 0),
    }
