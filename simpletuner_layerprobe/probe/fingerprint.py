"""What tells one base model from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from simpletuner_layerprobe.probe.wrappers import own_name, unwrapped

SAMPLES_PER_TENSOR = 32


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and 32 evenly spaced elements of every weight of a model.

    The same weights in the same precision give the same fingerprint, whatever wraps the model or its parts; a fine-tune
    changes it. It reads a few kB of a model of any size. A weight whose elements cannot be read (some quantised
    formats) counts with its shape.
    """
    digest = hashlib.sha256()
    weights = {own_name(name): weight for name, weight in unwrapped(model).state_dict().items()}
    for name, weight in sorted(weights.items()):
        if torch.is_tensor(weight):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
            digest.update(_elements(weight))
    return digest.hexdigest()


def _elements(weight: torch.Tensor) -> bytes:
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.is_quantized or weight.is_meta or not weight.numel():
        return b""
    flat = weight.detach().reshape(-1)
    step = max(1, len(flat) // SAMPLES_PER_TENSOR)
    return bytes(flat[::step][:SAMPLES_PER_TENSOR].to("cpu", torch.float64).numpy().tobytes())
