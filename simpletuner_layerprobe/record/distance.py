"""The angle between two hidden states, exact for small angles. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from simpletuner_layerprobe import ProbeError

# Elements handled at once: bounds the float32 copies. On a CPU they stay in a core's cache; on other devices a chunk is
# large enough to keep the device busy and small enough for the cache that its cores share.
CHUNK_ELEMENTS = {"cpu": 1 << 16}
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
    if before_BSD.device.type == "cpu" and before_BSD.stride(-1) != 1 and after_BSD.stride(-1) != 1:
        return _angles_by_width(before_BSD.mT, after_BSD.mT)
    parts = [
        _angles(before_BSD[:, tokens], after_BSD[:, tokens])
        for tokens in chunks(before_BSD.shape, before_BSD.device.type)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def chunks(shape: Sequence[int], device: str) -> Iterator[slice]:
    """The tokens of a state (B, S, D) in pieces that are handled at once on this type of device."""
    samples, tokens, width = shape
    step = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_DEVICE) // max(1, samples * width))
    for start in range(0, tokens, step):
        yield slice(start, start + step)


def _angles(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> torch.Tensor:
    """The angles of one chunk. The states are the large tensors: each is read three times, and two are written."""
    if u_BSD.device.type == "cpu":
        # There each operation below would make its own float32 copy; other devices convert in their registers.
        u_BSD, v_BSD = u_BSD.float(), v_BSD.float()
    u_norm_BS1, v_norm_BS1 = token_norm(u_BSD), token_norm(v_BSD)
    stretch_BS1 = v_norm_BS1 / u_norm_BS1
    # float32 because `stretch_BS1` is, whatever the states are.
    across_BS1 = token_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1, value=-1))
    along_BS1 = token_norm(torch.addcmul(v_BSD, u_BSD, stretch_BS1))
    return _angles_of(across_BS1, along_BS1, v_norm_BS1).squeeze(-1)


def _angles_by_width(u_BDS: torch.Tensor, v_BDS: torch.Tensor) -> torch.Tensor:
    """The angles of states whose tokens are neighbours in memory, as SD3's patch embedding leaves its image stream.

    The same sums as `_angles`, on a CPU alone, over pieces of the width instead of the tokens: what is read and written
    are whole rows, which takes a third of the time.
    """
    samples, width, tokens = u_BDS.shape
    step = max(1, CHUNK_ELEMENTS["cpu"] // max(1, samples * tokens))

    def norm(piece: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """Length over the whole width; `piece` makes a new float32 tensor of some of it."""
        sum_BS = torch.zeros(samples, tokens)
        for start in range(0, width, step):
            sum_BS += piece(slice(start, start + step)).square_().sum(dim=1)
        return sum_BS.sqrt_()

    u_norm_BS = norm(lambda some: u_BDS[:, some].to(torch.float32, copy=True))
    v_norm_BS = norm(lambda some: v_BDS[:, some].to(torch.float32, copy=True))
    stretch_B1S = (v_norm_BS / u_norm_BS).unsqueeze(1)
    across_BS = norm(lambda some: torch.addcmul(v_BDS[:, some].float(), u_BDS[:, some].float(), stretch_B1S, value=-1))
    along_BS = norm(lambda some: torch.addcmul(v_BDS[:, some].float(), u_BDS[:, some].float(), stretch_B1S))
    return _angles_of(across_BS, along_BS, v_norm_BS)


def _angles_of(across: torch.Tensor, along: torch.Tensor, v_norm: torch.Tensor) -> torch.Tensor:
    """The angles by |v - u| and |v + u|. A zero u makes the stretch infinite and the angle NaN by itself."""
    return torch.atan2(across, along).mul_(2 / math.pi).masked_fill_(v_norm == 0, math.nan)


def token_norm(state_BSD: torch.Tensor) -> torch.Tensor:
    """Length of every token's state, (B, S, 1) float32."""
    if state_BSD.device.type == "cpu" and state_BSD.stride(-1) != 1:
        # On a CPU vector_norm takes nine times as long where a token's numbers are not neighbours in memory (SD3's
        # image stream is made so by its patch embedding), the sum of squares twice. Not vecdot: autocast would take it
        # in bfloat16.
        return (state_BSD * state_BSD).sum(dim=-1, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(state_BSD, dim=-1, keepdim=True, dtype=torch.float32)


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
