"""The angle between two hidden states by torch's own operations, exact for small angles. Pure.

arccos loses half of the digits near cos = 1, where most blocks are: in float32 an angle below 3e-4 cannot be told from
0. Here u is first brought to the length of v, then angle = 2*atan2(|v - u|, |v + u|), which is exact to rounding for
all angles (W. Kahan, "How futile are mindless assessments of roundoff in floating-point computation?", 2006,
section 12).

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# Elements handled at once: bounds the float32 copies. A piece costs a few calls whatever its size, and a large one
# leaves the cache, on a CPU that of a core and its share of the common one.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_DEVICE = 1 << 22
CPU = torch.device("cpu")


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


def cpu_angles(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> torch.Tensor:
    """The angles on a CPU, some tokens at a time in float32 buffers that stay in the cache."""
    if u_BSD.stride(-1) != 1 and v_BSD.stride(-1) != 1:
        return _cpu_angles_by_width(u_BSD.mT, v_BSD.mT)
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
