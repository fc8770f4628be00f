"""The angles of all tokens by one kernel: each state is read from the device's memory once, and no copy is written.

torch's own operations read each state three times and write two float32 tensors of its size. The kernel is written in
Triton, which comes with torch on Linux; imported only where such a device is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _angles(  # type: ignore[no-untyped-def]
    u_ptr,
    v_ptr,
    angle_ptr,
    tokens,
    width,
    u_sample,
    u_token,
    u_number,
    v_sample,
    v_token,
    v_number,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The angles of TOKENS tokens of one sample, WIDTH numbers of each at a time; the strides are in elements.

    The second time around the states come from the cache.
    """
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    u_ptr += sample * u_sample + token[:, None].to(tl.int64) * u_token
    v_ptr += sample * v_sample + token[:, None].to(tl.int64) * v_token
    there = (token < tokens)[:, None]
    number = tl.arange(0, WIDTH)[None, :].to(tl.int64)

    u_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    v_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        inside = there & (start + number < width)
        u = tl.load(u_ptr + (start + number) * u_number, mask=inside, other=0).to(tl.float32)
        v = tl.load(v_ptr + (start + number) * v_number, mask=inside, other=0).to(tl.float32)
        u_squares += u * u
        v_squares += v * v
    v_norm = tl.sqrt(tl.sum(v_squares, axis=1))
    stretch = (v_norm / tl.sqrt(tl.sum(u_squares, axis=1)))[:, None]

    across_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    along_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        inside = there & (start + number < width)
        u = tl.load(u_ptr + (start + number) * u_number, mask=inside, other=0).to(tl.float32) * stretch
        v = tl.load(v_ptr + (start + number) * v_number, mask=inside, other=0).to(tl.float32)
        across_squares += (v - u) * (v - u)
        along_squares += (v + u) * (v + u)
    across = tl.sqrt(tl.sum(across_squares, axis=1))
    along = tl.sqrt(tl.sum(along_squares, axis=1))

    angle = libdevice.atan2(across, along) * 0.6366197723675814  # 2 / pi
    angle = tl.where(v_norm == 0, float("nan"), angle)
    tl.store(angle_ptr + sample * tokens + token, angle, mask=token < tokens)


def launch(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> dict[str, int]:
    """How many tokens and numbers a program takes at once, and its warps, by how the states lie in memory.

    Where a token's numbers are neighbours, a program has one token. Where tokens are (SD3's image stream), it has as
    many as fill the 32 bytes that a device reads at least.
    """
    if u_BSD.stride(-1) == v_BSD.stride(-1) == 1:
        return {"TOKENS": 1, "WIDTH": min(1024, triton.next_power_of_2(u_BSD.shape[-1])), "num_warps": 4}
    return {"TOKENS": 16, "WIDTH": 256, "num_warps": 8}


def angles(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> torch.Tensor:
    """(B, S) float32, the angular distance of every token as `token_angles` defines it. The shapes must be equal."""
    samples, tokens, width = u_BSD.shape
    angle_BS = torch.empty(samples, tokens, dtype=torch.float32, device=u_BSD.device)
    shape = launch(u_BSD, v_BSD)
    grid = (triton.cdiv(tokens, shape["TOKENS"]), samples)
    with torch.cuda.device_of(u_BSD):
        _angles[grid](u_BSD, v_BSD, angle_BS, tokens, width, *u_BSD.stride(), *v_BSD.stride(), **shape)
    return angle_BS
