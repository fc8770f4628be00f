"""The module table of a denoiser: what a follow-up's adapter can be planned and proved on, without weights."""

from __future__ import annotations

from typing import Any

from simpletuner_layerprobe.probe.wrappers import named_modules

ModuleRow = tuple[str, str, tuple[int, ...]]
"""Name, class name and the shape of the weight of one module."""


def module_table(model: Any) -> tuple[ModuleRow, ...]:
    """Every module of a `torch.nn.Module` with its class name and the shape of its weight, in the model's order.

    Names and classes are the model's own, without wrappers. The shape is the logical one, also where the weight is
    packed: (out_features, in_features) for the linear layers that LyCORIS adapts (torch's Linear, its quantised
    subclasses, SimpleTuner's Fp8Linear); () for linear layers of other kinds and for a module without a weight; the
    weight's own shape otherwise. The model itself is left out. Torch is not imported here.
    """
    return tuple((name, type(module).__name__, _weight_shape(module)) for name, module in named_modules(model) if name)


def norm_widths(model: Any) -> dict[str, int]:
    """Name -> features of every LayerNorm and GroupNorm without a weight, which the module table does not have."""
    widths = {}
    for name, module in named_modules(model):
        size = getattr(module, "normalized_shape", None) or getattr(module, "num_channels", None)
        if size is not None and getattr(module, "weight", None) is None:
            widths[name] = int(size if isinstance(size, int) else size[0])
    return widths


def _is_adapted_linear(kind: type) -> bool:
    names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    return "torch.nn.modules.linear.Linear" in names or kind.__name__ == "Fp8Linear"


def _weight_shape(module: Any) -> tuple[int, ...]:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return (outputs, inputs) if _is_adapted_linear(type(module)) else ()
    shape = getattr(getattr(module, "weight", None), "shape", ())
    return tuple(int(size) for size in shape)
