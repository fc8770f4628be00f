"""What LyCORIS builds: its own network on a skeleton, in the way SimpleTuner's `init_trainable_peft_adapter` does.

With form.py and meaning.py the only files that know LyCORIS, which is imported inside the calls.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache, lru_cache
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import CodeType
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

# What SimpleTuner takes out of the config and hands to `create_lycoris` by position, or keeps.
BY_POSITION = {"multiplier": 1, "linear_dim": 4, "linear_alpha": 1}
KEPT = ("tlora_min_rank", "tlora_alpha")


def adapters_on(config: Mapping[str, Any], model: nn.Module) -> list[tuple[nn.Module, Adapter]]:
    """LyCORIS's adapters for this model with the module that each belongs to; none without parameters.

    Raises ConfigError, with LyCORIS's own words, if it refuses.
    """
    loras = built_on(config, model)
    return list(zip((lora.org_module[0] for lora in loras), adapters_of(loras), strict=True))


def adapters_of(loras: Iterable[Any]) -> list[Adapter]:
    """What LyCORIS's own modules train, one for one."""
    algorithms = {made: algo for algo, made in reversed(fresh_wrapper().network_module_dict.items())}
    return [_adapter(lora, algorithms.get(type(lora), "norm")) for lora in loras]


def tensors_on(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    """What LyCORIS saves: its name of a module -> the module, and each tensor of the file by its name.

    The tensors have shapes and no numbers, but for alpha.
    """
    with weightless():
        return {lora.lora_name: (lora.org_module[0], lora.state_dict()) for lora in built_on(config, model)}


def built_on(config: Mapping[str, Any], model: nn.Module) -> list[Any]:
    """LyCORIS's own modules for this model, without those that have no parameters.

    Built as SimpleTuner 4.10.1's `init_trainable_peft_adapter` does. Raises ConfigError, with LyCORIS's own
    words, if it refuses.
    """
    import torch

    rest = copy.deepcopy(dict(config))
    # LyCORIS keeps a preset in attributes of LycorisNetwork. A copy of the class that is used once starts as
    # in a new process, and leaves the one that others imported as it is.
    wrapper = fresh_wrapper()
    preset = rest.get("apply_preset")
    by_position = [int(rest.pop(key, default)) for key, default in BY_POSITION.items()]
    for key in KEPT:
        rest.pop(key, None)
    try:
        with torch.device("meta"), weightless(), silent(), _little_garbage():
            if preset:
                wrapper.LycorisNetwork.apply_preset(preset)
            network = wrapper.create_lycoris(model, *by_position, **rest)
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise ConfigError(
            f"LyCORIS {lycoris_version()} cannot build the config: {type(error).__name__}: {said}"
        ) from error
    return [lora for lora in network.loras if any(True for _ in lora.parameters())]


def _adapter(lora: Any, algo: str) -> Adapter:
    tensors = tuple((name, tuple(tensor.shape)) for name, tensor in lora.named_parameters())
    scale = next((getattr(lora, name) for name in ("scale", "constraint") if hasattr(lora, name)), 1.0)
    return Adapter(algo, None, tensors, float(scale))


def lycoris_version() -> str:
    return importlib.metadata.version("lycoris-lora")


def fresh_wrapper() -> Any:
    """LyCORIS's `wrapper` module, executed anew and known to nobody else."""
    spec, code = _wrapper_code()
    wrapper = importlib.util.module_from_spec(spec)
    exec(code, vars(wrapper))
    wrapper.__dict__["re"] = _Compiled
    return wrapper


class _Compiled:
    """The `re` of LyCORIS's wrapper, without the limit of 512 patterns beyond which Python compiles each anew."""

    @staticmethod
    def match(pattern: str, name: str) -> re.Match[str] | None:
        return _compiled(pattern).match(name)


_compiled = lru_cache(maxsize=2**15)(re.compile)


def wrapper_source() -> str:
    """The text of LyCORIS's `wrapper` module."""
    spec, _ = _wrapper_code()
    source = spec.loader.get_source(spec.name) if isinstance(spec.loader, InspectLoader) else None
    if source is None:
        raise ConfigError("LyCORIS is installed without its source; install lycoris-lora 4.1")
    return source


@cache
def _wrapper_code() -> tuple[ModuleSpec, CodeType]:
    spec = importlib.util.find_spec("lycoris.wrapper")
    code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        raise ConfigError("LyCORIS's module lycoris.wrapper is not there; install lycoris-lora 4.1")
    return spec, code


def weightless() -> Any:
    """Let LyCORIS run on meta tensors, which need no first values: .cpu() leaves them there, small tensors are real."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Weightless(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.cpu and args[0].is_meta:
                return args[0]
            if getattr(func, "__module__", "") == "torch.nn.init" and kwargs["tensor"].is_meta:
                return kwargs["tensor"]
            if func is torch.tensor and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)

    return Weightless()


@contextmanager
def silent() -> Iterator[None]:
    """Keep LyCORIS from printing; its logger is afterwards as it was."""
    logger = logging.getLogger("LyCORIS")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.disabled = was_disabled


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Set aside all objects there are: LyCORIS's T-LoRA collects garbage once per module, 0.4 s each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
