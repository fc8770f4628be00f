"""A block of SD3's transformer for E trainings at once: diffusers' JointTransformerBlock with stacked weights.

Shape letters: E trainings, B samples, N tokens, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights that are used together, by the names of their modules in a block: one matrix product for each line.
PARTS: dict[str, tuple[str, ...]] = {
    "image_modulation": ("norm1.linear",),
    "text_modulation": ("norm1_context.linear",),
    "image_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "image_out": ("attn.to_out.0",),
    "text_out": ("attn.to_add_out",),
    "image_up": ("ff.net.0.proj",),
    "image_down": ("ff.net.2",),
    "text_up": ("ff_context.net.0.proj",),
    "text_down": ("ff_context.net.2",),
}
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
EPS = 1e-6


def parts_of(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """The lines of PARTS that a block has. Raises ValueError for a block with other Linears."""
    if getattr(block, "use_dual_attention", False):
        raise ValueError("blocks with a second attention are not known here")
    names = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    parts = {part: modules for part, modules in PARTS.items() if set(modules) <= names}
    if names != {name for modules in parts.values() for name in modules}:
        raise ValueError(f"a block has Linears that are not known here: {sorted(names)}")
    return parts


def frozen_of(block: nn.Module) -> dict[str, Tensor]:
    """Biases by part, and the weights of the norms of queries and keys."""
    frozen = {}
    for part, modules in parts_of(block).items():
        frozen[part] = torch.cat([block.get_submodule(name).bias.detach() for name in modules])
    for name in NORMS:
        norm = getattr(block.attn, name)
        if norm is not None:
            frozen[name] = norm.weight.detach()
    return frozen


def _linear(x_EBNC: Tensor, w_EOC: Tensor, bias_O: Tensor) -> Tensor:
    E, B, N, C = x_EBNC.shape
    return torch.bmm(x_EBNC.reshape(E, B * N, C), w_EOC.transpose(1, 2)).view(E, B, N, -1) + bias_O


def _layer_norm(x_EBNC: Tensor) -> Tensor:
    return F.layer_norm(x_EBNC, x_EBNC.shape[-1:], eps=EPS)


def _rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _heads(qkv_EBNO: Tensor, heads: int, norms: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Three of (E * B, N, heads, C / heads), queries and keys normed."""
    E, B, N, width = qkv_EBNO.shape
    q, k, v = qkv_EBNO.view(E * B, N, 3, heads, width // 3 // heads).unbind(2)
    return _rms_norm(q, norms[0]), _rms_norm(k, norms[1]), v


def attention(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
    """Of (E * B, heads, N, C / heads). fused: torch's kernel; bf16: the same in bf16; plain: two products."""
    if how == "plain":
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        return torch.matmul(scores.softmax(dim=-1), v)
    if how == "bf16":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    return F.scaled_dot_product_attention(q, k, v)


def block_forward(
    image_EBNC: Tensor,
    text_EBNC: Tensor,
    time_EBC: Tensor,
    weights: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    heads: int,
    how: str = "fused",
) -> tuple[Tensor, Tensor | None]:
    """Image and text after the block; no text after the last one. time_EBC: SiLU of the time embedding."""

    def linear(x_EBNC: Tensor, part: str) -> Tensor:
        return _linear(x_EBNC, weights[part], frozen[part])

    def modulation(part: str, count: int) -> tuple[Tensor, ...]:
        return linear(time_EBC.unsqueeze(2), part).chunk(count, dim=-1)

    last = "text_out" not in weights
    shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation("image_modulation", 6)
    image_qkv = linear(_layer_norm(image_EBNC) * (1 + scale) + shift, "image_qkv")
    if last:
        text_scale, text_shift = modulation("text_modulation", 2)
    else:
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = modulation("text_modulation", 6)
    text_qkv = linear(_layer_norm(text_EBNC) * (1 + text_scale) + text_shift, "text_qkv")

    image_heads = _heads(image_qkv, heads, (frozen.get("norm_q"), frozen.get("norm_k")))
    text_heads = _heads(text_qkv, heads, (frozen.get("norm_added_q"), frozen.get("norm_added_k")))
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image_heads, text_heads, strict=True))
    E, B, N, C = image_EBNC.shape
    mixed_EBNC = attention(q, k, v, how).transpose(1, 2).reshape(E, B, -1, C).to(image_EBNC.dtype)

    image_EBNC = image_EBNC + gate * linear(mixed_EBNC[:, :, :N], "image_out")
    hidden = linear(_layer_norm(image_EBNC) * (1 + scale_ff) + shift_ff, "image_up")
    image_EBNC = image_EBNC + gate_ff * linear(F.gelu(hidden, approximate="tanh"), "image_down")
    if last:
        return image_EBNC, None
    text_EBNC = text_EBNC + text_gate * linear(mixed_EBNC[:, :, N:], "text_out")
    hidden = linear(_layer_norm(text_EBNC) * (1 + text_scale_ff) + text_shift_ff, "text_up")
    text_EBNC = text_EBNC + text_gate_ff * linear(F.gelu(hidden, approximate="tanh"), "text_down")
    return image_EBNC, text_EBNC
