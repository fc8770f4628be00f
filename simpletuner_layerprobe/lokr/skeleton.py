"""A skeleton of a model, on the meta device: what LyCORIS and PEFT look at when they choose modules, and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.groups import layer_kind
from simpletuner_layerprobe.lokr.network import weightless

if TYPE_CHECKING:
    from torch import nn

    from simpletuner_layerprobe.run.manifest import Module

OWN_NORMS = ("RMSNorm_FP32",)  # of LongCat-Video
MAX_DIMENSION = 2**22  # LyCORIS looks for divisors one by one


def skeleton(modules: Sequence[Module], model_class: str = "") -> nn.Module:
    """The model of a module table on the meta device: same names, order and class names, no weights.

    Linear layers, convolutions, LayerNorm and GroupNorm are torch's own or subclasses of them, all else is an
    empty module of the class name. Biases are assumed; a norm whose table has no weight has none. Raises ConfigError
    for a table that no model can have.
    """
    import torch
    from torch import nn

    with torch.device("meta"), weightless():
        root: nn.Module = _class(model_class or "Denoiser", nn.Module)()
        built: dict[str, nn.Module] = {"": root}
        for module in modules:
            if not module.name:
                continue
            parent, _, child = module.name.rpartition(".")
            if module.name in built or parent not in built or not child or hasattr(built[parent], child):
                raise ConfigError(
                    f"the module table cannot be a model's: {module.name!r} comes twice, before its parent, "
                    "or under a name that a module cannot have"
                )
            built[module.name] = _skeleton_module(module)
            built[parent].add_module(child, built[module.name])
    return root


def _skeleton_module(module: Module) -> nn.Module:
    """One module of the skeleton, on the current device."""
    import torch
    from torch import nn

    kind = layer_kind(module)
    if kind and any(not 1 <= dimension <= MAX_DIMENSION for dimension in module.shape):
        raise ConfigError(
            f"module {module.name!r} has the shape {module.shape}; expected dimensions from 1 to {MAX_DIMENSION}"
        )
    if kind == "linear":
        out_dimension, in_dimension = module.shape
        made: nn.Module = _class(module.type, nn.Linear)(in_dimension, out_dimension)
        if module.type == "Fp8Linear":
            made.weight_scale = torch.empty(())  # LyCORIS knows the class by this attribute
        return made
    if kind == "conv":
        out_dimension, in_dimension, *kernel = module.shape
        base = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        # The table has the weight's shape, in which groups are divided out already.
        return _class(module.type, base)(in_dimension, out_dimension, tuple(kernel))
    if kind == "norm":
        width, weight = (module.shape or (module.width or 1,))[0], bool(module.shape)
        if module.type == "GroupNorm":
            return nn.GroupNorm(1, width, affine=weight)
        return _class(module.type, nn.LayerNorm)(width, elementwise_affine=weight)
    made = _class(module.type, nn.Module)()
    if kind == "weight":
        made.register_parameter("weight", nn.Parameter(torch.empty(module.shape)))
        if module.type in OWN_NORMS:
            made._norm = None  # by which LyCORIS knows a norm of another class
    return made


def _class(name: str, base: Any) -> Any:
    """`base` under the class name `name`: LyCORIS looks at class names."""
    if name == base.__name__:
        return base
    if not name.isidentifier():
        raise ConfigError(f"the module table has the class name {name!r}; expected a Python class name")
    return type(name, (base,), {})
