"""What a block did to every token of a state, by one kernel that reads each state from the device's memory once.

With A the bytes of one state, in the states' own dtype: the kernel reads 2 A for the angles, and no more for the norms
and cosines of the updates. torch's own operations read and write, in bf16 or fp16, 14 A for the angles and 17 A for the
updates. The angles of n states before with one after take (n + 1) A of the memory: the n programs that read the same
piece of the state after run side by side, and all but the first find it in the device's cache.

The kernel is written in Triton, which comes with torch on Linux; imported only where such a device is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

STATES = 4
"""So many states before are taken by one launch."""
PROGRAMS = 128
"""As many programs should at least run: large devices have about as many multiprocessors."""


@triton.jit(do_not_specialize=["states"])  # one compilation for any number of them
def _changes(  # type: ignore[no-untyped-def]
    u_ptrs,
    v_ptr,
    out_ptr,
    states,
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
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    UPDATES: tl.constexpr,
):
    """TOKENS tokens of one sample of one of the states before, WIDTH numbers of each at a time.

    The strides are in elements. The updates are stored for the first state before.

    The angle needs |v - s u| and |v + s u| with the stretch s = |v| / |u|, which is known only when all has been read.
    So the sums are taken with the stretch s0 of the first WIDTH numbers:

        |v -+ s u|^2 = s / s0 (|v -+ s0 u|^2 - (s - s0)^2 |u|^2)

    and s / s0 drops out of the angle. Where the difference cancels too much, the states are read again with s for s0.
    WHOLE: the first numbers are all there are, they stay in the registers, and s0 is s.
    """
    # Says to the compiler that these are multiples of UNIT: only then it reads 16 bytes at once.
    tokens = tokens // UNIT * UNIT
    u_number = u_number // UNIT * UNIT
    v_number = v_number // UNIT * UNIT
    sample = tl.program_id(1).to(tl.int64)
    state = tl.program_id(0) % states
    first = tl.program_id(0) // states * TOKENS
    u_ptr = u_ptrs[0]
    for other in tl.static_range(1, len(u_ptrs)):
        u_ptr = tl.where(state == other, u_ptrs[other], u_ptr)
    token = tl.arange(0, TOKENS)[:, None]
    number = tl.arange(0, WIDTH)[None, :]
    u_ptr += sample * u_sample + first.to(tl.int64) * u_token
    v_ptr += sample * v_sample + first.to(tl.int64) * v_token
    u_ptr += token * u_token + number * u_number
    v_ptr += token * v_token + number * v_number
    there = first + token < tokens
    u_first = tl.load(u_ptr, mask=there & (number < width), other=0).to(tl.float32)
    v_first = tl.load(v_ptr, mask=there & (number < width), other=0).to(tl.float32)
    u_square = tl.sum(u_first * u_first, axis=1)
    v_square = tl.sum(v_first * v_first, axis=1)
    stretch = tl.sqrt(v_square) / tl.sqrt(u_square)
    stretch = tl.where((stretch > 0) & (stretch < float("inf")), stretch, 1.0)

    angle = tl.zeros((TOKENS,), dtype=tl.float32)
    norm = tl.zeros((TOKENS,), dtype=tl.float32)
    cosine = tl.zeros((TOKENS,), dtype=tl.float32)
    passes = 2
    while passes > 0:
        u_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        v_squares = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        across = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        along = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        updates = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        products = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
        for start in tl.range(0, WIDTH if WHOLE else width, WIDTH, num_stages=STAGES):
            if WHOLE:
                u, v = u_first, v_first
            else:
                inside = there & (start + number < width)
                u = tl.load(u_ptr + tl.cast(start, tl.int64) * u_number, mask=inside, other=0).to(tl.float32)
                v = tl.load(v_ptr + tl.cast(start, tl.int64) * v_number, mask=inside, other=0).to(tl.float32)
            u_squares += u * u
            v_squares += v * v
            across += (v - u * stretch[:, None]) * (v - u * stretch[:, None])
            along += (v + u * stretch[:, None]) * (v + u * stretch[:, None])
            if UPDATES:
                updates += (v - u) * (v - u)
                products += (v - u) * u
        if not WHOLE:
            u_square = tl.sum(u_squares, axis=1)
            v_square = tl.sum(v_squares, axis=1)
        u_norm, v_norm = tl.sqrt(u_square), tl.sqrt(v_square)
        excess = (v_norm / u_norm - stretch) * (v_norm / u_norm - stretch) * u_square
        across_square = tl.sum(across, axis=1) - excess
        along_square = tl.sum(along, axis=1) - excess
        # Either is below 0 by rounding only, or else the states are read again.
        angle = libdevice.atan2(tl.sqrt(tl.abs(across_square)), tl.sqrt(tl.abs(along_square)))
        if UPDATES:
            update_norm = tl.sqrt(tl.sum(updates, axis=1))
            norm = tl.where(u_norm == 0, float("nan"), update_norm / u_norm)
            # One division after the other: the product of the norms could leave float32's range.
            cosine = tl.sum(products, axis=1) / update_norm / u_norm
        # Up to here, |s - s0| < 8 angles, a rounding of the sums moves the angle by no more than a few.
        cancels = 64 * tl.minimum(across_square, along_square) < excess
        passes = tl.where(tl.max(cancels.to(tl.int32), axis=0) > 0, passes - 1, 0)
        stretch = v_norm / u_norm
        angle = tl.where(v_norm == 0, float("nan"), angle * 0.6366197723675814)  # 2 / pi

    token = first + tl.arange(0, TOKENS)
    reading = tl.num_programs(1).to(tl.int64) * tokens
    out_ptr += sample * tokens + token
    if UPDATES:
        stored = (token < tokens) & (state == 0)
        tl.store(out_ptr + reading, norm, mask=stored)
        cosine = tl.clamp(cosine, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + 2 * reading, cosine, mask=stored)
        state = tl.where(state == 0, 0, state + 2)
    tl.store(out_ptr + state * reading, angle, mask=token < tokens)


def launch(u_BSD: torch.Tensor, v_BSD: torch.Tensor) -> dict[str, int]:
    """How many tokens and numbers a program takes at once, by how the states lie in memory; its warps.

    Where a token's numbers are neighbours, a program takes whole rows, as many as the registers hold.

    Where tokens are (SD3's and Wan's image streams), it takes a whole line of 128 bytes of them (64 tokens in 16 bits)
    if that gives PROGRAMS, else less, down to 16 tokens: in 16 bits a sector of 32 bytes, the least that is moved.
    32 kB of the next numbers are on their way while some are summed up: 4 MB in all at PROGRAMS, where a memory of
    4.3 TB/s needs 3 MB (0.7 us of it) to be busy. 4096 tokens in 16 bits are half lines: no byte is moved for nothing,
    and twice as many multiprocessors read.
    """
    samples, tokens, width = u_BSD.shape
    strides = u_BSD.stride(-1), v_BSD.stride(-1)
    size = max(u_BSD.element_size(), v_BSD.element_size())
    shape = {"WHOLE": False, "STAGES": 5 if size == 2 else 3, "UNIT": 1}
    if strides != (1, 1):
        aligned = all(number % 8 == 0 for number in (tokens, *strides))
        most = 128 // size
        some = min(max(samples * tokens // PROGRAMS, 16), most)
        some = 1 << (some.bit_length() - 1)
        return shape | {"TOKENS": some, "WIDTH": 2048 // some, "UNIT": 8 if aligned else 1, "num_warps": 8}
    row = triton.next_power_of_2(width)
    if row > 8192:
        return shape | {"TOKENS": 1, "WIDTH": 2048, "num_warps": 4}
    return shape | {"TOKENS": max(1, 1024 // row), "WIDTH": row, "WHOLE": True, "num_warps": 8 if row > 4096 else 4}


def changes(
    u_BSD: torch.Tensor, v_BSD: torch.Tensor, updates: bool, earlier_BSD: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """What `token_changes` gives. The shapes must be equal, and the dtypes and strides of the states before."""
    samples, tokens, width = u_BSD.shape
    u_ptrs = u_BSD, *earlier_BSD[: STATES - 1]
    states = len(u_ptrs)
    readings = states + 2 if updates else states
    out = torch.empty(readings, samples, tokens, dtype=torch.float32, device=u_BSD.device)
    shape = launch(u_BSD, v_BSD)
    grid = (triton.cdiv(tokens, shape["TOKENS"]) * states, samples)
    strides = *u_BSD.stride(), *v_BSD.stride()
    with torch.cuda.device_of(u_BSD):
        u_ptrs += (u_BSD,) * (STATES - states)
        _changes[grid](u_ptrs, v_BSD, out, states, tokens, width, *strides, **shape, UPDATES=updates)
    further_BSD = earlier_BSD[STATES - 1 :]
    further = changes(further_BSD[0], v_BSD, False, further_BSD[1:]) if further_BSD else ()
    return *out.unbind(), *further
