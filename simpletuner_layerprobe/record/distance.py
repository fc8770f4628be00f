"""The angle between two hidden states, exact for small angles. Pure."""

from __future__ import annotations

import math

import torch

from simpletuner_layerprobe import ProbeError

# Elements handled at once: bounds the float32 copies. On a CPU they stay in a core's cache; on other devices a chunk is
# large enough to keep the device busy and small enough for the cache that its cores share.
CHUNK_ELEMENTS = {"cpu": 1 << 17}
CHUNK_ELEMENTS_DEVICE = 1 << 22


def token_angles(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> torch.Tensor:
    """Angular distance arccos(cos)/pi of every token's hidden state before and after a block.

    Returns (B, S) float32 in [0, 1]: 0 same direction, 0.5 orthogonal, 1 opposite. The states may have any
    floating dtype; the angle is taken in float32. NaN where a state is zero (it has no direction) or not finite.

    arccos loses half of the digits near cos = 1, where most blocks are: in float32 an angle below 3e-4 cannot be
    told from 0. Here u is first brought to the length of v, then angle = 2*atan2(|v - u|, |v + u|), which is exact to
    rounding for all angles (W. Kahan, "How futile are mindless assessments of roundoff in floating-point
    computation?", 2006, section 12).

    Raises ProbeError if the shapes differ.
    """
    if before_BSD.shape != after_BSD.shape:
        raise ProbeError(
            f"a block changed the shape of its hidden states from {tuple(before_BSD.shape)} to "
            f"{tuple(after_BSD.shape)}; the distance needs the same tokens before and after"
        )
    tokens, width = before_BSD.shape[1], before_BSD.shape[2]
    budget = CHUNK_ELEMENTS.get(before_BSD.device.type, CHUNK_ELEMENTS_DEVICE)
    step = max(1, budget // max(1, before_BSD.shape[0] * width))
    chunks = [
        _angles(before_BSD[:, start : start + step], after_BSD[:, start : start + step])
        for start in range(0, tokens, step)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)


def _angles(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> torch.Tensor:
    """The angles of one chunk. The states are the large tensors: each is read three times, and two are written."""
    if u_BSD.device.type == "cpu":
        # There each operation below would make its own float32 copy; other devices convert in their registers.
        u_BSD, v_BSD = u_BSD.float(), v_BSD.float()
    u_norm_BS1 = torch.linalg.vector_norm(u_BSD, dim=-1, keepdim=True, dtype=torch.float32)
    v_norm_BS1 = torch.linalg.vector_norm(v_BSD, dim=-1, keepdim=True, dtype=torch.float32)
    stretch_BS1 = v_norm_BS1 / u_norm_BS1
    # float32 because `stretch_BS1` is, whatever the states are.
    across_BS1 = torch.linalg.vector_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1, value=-1), dim=-1, keepdim=True)
    along_BS1 = torch.linalg.vector_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1), dim=-1, keepdim=True)
    angle_BS1 = torch.atan2(across_BS1, along_BS1).mul_(2 / math.pi)
    # A zero u makes the stretch infinite and the angle NaN by itself.
    return angle_BS1.masked_fill_(v_norm_BS1 == 0, math.nan).squeeze(-1)


def last_token(angles_BS: torch.Tensor) -> torch.Tensor:
    """The article's reading: the angle of the last token of the sequence. Returns (B,) float32."""
    return angles_BS[:, -1].clone()  # a view would keep the angles of all tokens until the end of the forward


def mean_token(angles_BS: torch.Tensor, valid_BS: torch.Tensor | None) -> torch.Tensor:
    """The mean angle over the valid tokens (all of them if `valid_BS` is None).

    valid_BS: bool. Returns (B,) float32; NaN for a sample without a valid token.
    """
    if valid_BS is None:
        return angles_BS.mean(dim=1)
    total_B = torch.where(valid_BS, angles_BS, 0.0).sum(dim=1)
    return total_B / valid_BS.sum(dim=1)
