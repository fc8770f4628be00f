"""A finished adapter on the base of a probe-only run, loaded as SimpleTuner loads it to go on with its training.

LyCORIS: SimpleTuner makes the network by `lycoris_config`, and LyCORIS loads the file into it. PEFT's LoRA:
SimpleTuner's own `init_lora`. Both only log what does not fit; here it is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.probe.modules import module_table

ADAPTER = "default"
"""What PEFT calls the adapter that SimpleTuner trains."""
BF16_ROUNDING = 2.0**-8
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")

Shapes = Mapping[str, tuple[int, ...]]


def header(path: Path) -> tuple[Shapes, Mapping[str, str]]:
    """Key -> shape of every tensor in a safetensors file, and its metadata. Raises OSError and SafetensorError."""
    with safe_open(path, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        return shapes, opened.metadata() or {}


def differences(expected: Shapes, shapes: Shapes) -> list[str]:
    """How the tensors of a file differ from those that are expected: at most three clauses, each names one."""
    unknown = [key for key in shapes if key not in expected]
    missing = [key for key in expected if key not in shapes]
    other = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of its {len(shapes)} tensors are not in it, such as {unknown[0]}")
    if missing:
        problems.append(f"{len(missing)} of its {len(expected)} are not in the file, such as {missing[0]}")
    if other:
        key = other[0]
        problems.append(
            f"{len(other)} have another shape, such as {key}: {shapes[key]} in the file, {expected[key]} here"
        )
    return problems


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a safetensors file. sha256: of it, hex. shapes: key -> the tensor's. metadata: the file's own."""

    path: Path
    sha256: str
    shapes: Shapes
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: str) -> AdapterFile:
        """Its names and shapes, and the hash of all of it. Raises ConfigError if it is no safetensors file."""
        file = Path(path)
        try:
            with file.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            shapes, metadata = header(file)
        except OSError as error:
            raise ConfigError(f"layerprobe_adapter: cannot read {path}: {error.strerror or error}") from None
        except SafetensorError:
            raise ConfigError(
                f"layerprobe_adapter: {path} is no safetensors file; give the one that SimpleTuner saved, such as "
                f"pytorch_lora_weights.safetensors"
            ) from None
        return cls(file, sha256, shapes, metadata)

    def require(self, expected: Shapes, made_by: str) -> None:
        """Raises ConfigError, naming a tensor, if the file does not have these. made_by: what wants them."""
        problems = differences(expected, self.shapes)
        if problems:
            raise ConfigError(
                f"layerprobe_adapter: {self.path} does not fit {made_by}: {'; '.join(problems)}; it must be an adapter "
                f"of this model, with lora_type and lycoris_config as it was trained"
            )


def load(trainer: Any, file: AdapterFile, make: Callable[[], None], began_from_file: bool) -> dict[str, object]:
    """Put the adapter on the trainer's model, without any dropout. Returns what decides its effect, for the manifest.

    make: SimpleTuner's own making of the adapter that the config asks for. began_from_file: whether this config trains
    on from another file (`init_lora`). Raises ConfigError if the file does not fit.
    """
    config = trainer.config
    kind = str(config.lora_type).lower()
    if "lora" not in config.model_type or kind not in ("lycoris", "standard"):
        raise ConfigError(
            f"layerprobe_adapter needs model_type lora and lora_type lycoris or standard, as the adapter was trained; "
            f"they are {config.model_type} and {config.lora_type}"
        )
    config.init_lokr_norm = None
    if kind == "lycoris":
        return _load_lycoris(trainer, file, make)
    return _load_lora(trainer, file, make, began_from_file)


def _load_lycoris(trainer: Any, file: AdapterFile, make: Callable[[], None]) -> dict[str, object]:
    config = trainer.config
    config.init_lora = None
    make()
    network = trainer.accelerator._lycoris_wrapped_network
    tensors = network.state_dict()
    made_by = f"the network that {Path(config.lycoris_config).name} makes"
    file.require({name: tuple(tensor.shape) for name, tensor in tensors.items()}, made_by)
    alphas = {name: tensor.clone() for name, tensor in tensors.items() if name.endswith(".alpha")}
    network.load_weights(str(file.path))
    loaded = network.state_dict()
    for name, alpha in alphas.items():  # the scale is that of the config, whatever alpha is loaded
        # SimpleTuner saves in the training's precision: full matrices have an alpha of 1,000,000, in bf16 999,424.
        if not torch.allclose(alpha.float().cpu(), loaded[name].float().cpu(), rtol=BF16_ROUNDING, atol=0):
            raise ConfigError(
                f"layerprobe_adapter: {file.path} does not fit {made_by}: {name} is {loaded[name].item():g} in the "
                f"file, {alpha.item():g} here; give the lycoris_config that it was trained with"
            )
    network.to(device=trainer.accelerator.device, dtype=config.weight_dtype)
    _without_dropout(network.modules())
    network.requires_grad_(False)
    return {"adapter": file.sha256, "adapter_multiplier": float(network.multiplier)}


def _load_lora(trainer: Any, file: AdapterFile, make: Callable[[], None], began_from_file: bool) -> dict[str, object]:
    """By `init_lora`, which takes ranks and alphas from the file, and for alphas that are not in it the ranks. The
    training took `lora_alpha` then, unless it began from a file itself: so does this."""
    config, model = trainer.config, trainer.model
    prefix = f"{model.MODEL_TYPE.value}."
    file.require(_lora_shapes(file.shapes, prefix, model.get_trained_component()), "the modules of this model")
    left: list[str] = []
    add_lora_adapter = model.add_lora_adapter

    def add_and_keep() -> tuple[Any, Any]:
        unknown, missing = add_lora_adapter()
        left.extend(sorted({*unknown, *missing}))
        return unknown, missing

    config.lora_dropout, config.init_lora = 0.0, str(file.path)
    model.add_lora_adapter = add_and_keep
    try:
        make()
    finally:
        del model.add_lora_adapter
        config.init_lora = None
    if left:
        raise ConfigError(
            f"layerprobe_adapter: {file.path} does not fit the LoRA that this config makes: {len(left)} tensors are "
            f"only in the file or only here, such as {left[0]}; use the targets that it was trained with"
        )
    own, alpha = float(model.lora_config.lora_alpha), _trained_alpha(file, prefix)
    if alpha is None:
        taken = began_from_file or any(key.endswith("alpha") for key in file.shapes) or config.lora_alpha is None
        alpha = own if taken else float(config.lora_alpha)
    for layer in model.get_trained_component().modules():
        if alpha != own and ADAPTER in getattr(layer, "scaling", {}):
            layer.set_scale(ADAPTER, alpha / own)
    return {"adapter": file.sha256, "adapter_alpha": alpha}


def _lora_shapes(given: Shapes, prefix: str, denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes that LoRA's matrices of these names must have on this model: the other side of each is its rank."""
    weights = {name: shape for name, _, shape in module_table(denoiser) if len(shape) >= 2}
    expected = {}
    for key, shape in given.items():
        name, _, part = key.removeprefix(prefix).partition(".lora_")
        weight = weights.get(name, ()) if key.startswith(prefix) else ()
        if part == "A.weight" and weight and shape:
            expected[key] = (shape[0], *weight[1:])
        elif part == "B.weight" and weight and len(shape) >= 2:
            expected[key] = (weight[0], shape[1], *(1 for _ in weight[2:]))
        elif weight or name.partition(".alpha")[0] in weights:
            expected[key] = shape  # a vector of DoRA, an alpha
    return expected


def _trained_alpha(file: AdapterFile, prefix: str) -> float | None:
    """The alpha of the training, where diffusers wrote it into the file and it is one for all modules."""
    try:
        kept = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        if kept.get(f"{prefix}alpha_pattern"):
            return None
        return float(kept[f"{prefix}lora_alpha"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _without_dropout(modules: Iterable[nn.Module]) -> None:
    """SimpleTuner's loop leaves the model in training mode, where an adapter would drop out at random."""
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, 0.0)
