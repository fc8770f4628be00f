"""Proof of a LyCORIS config: what LyCORIS really builds, module by module, against what was meant.

A skeleton of the denoiser is made from the module table on the meta device (no weights), and LyCORIS's own
network is built on it in the way SimpleTuner's `init_trainable_peft_adapter` does. The only file that knows
LyCORIS. torch and LyCORIS are imported inside the calls.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from math import prod
from types import CodeType
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.config import Planned, layer_kind
from simpletuner_layerprobe.lokr.factors import AUTO_FACTOR, factorisation
from simpletuner_layerprobe.lokr.ranks import PlannedRank
from simpletuner_layerprobe.run.manifest import Module

if TYPE_CHECKING:
    from torch import nn

MAX_DIMENSION = 2**22  # LyCORIS looks for divisors one by one
MAX_NUMBER = 2**63  # of a setting
MAX_PRESET_BYTES = 1024 * 1024
MATCH_SECONDS = 5.0  # that the regular expressions of a config may take for one model; most take a thousandth
NOT_IN_A_SKELETON = ("bitsandbytes", "quanto", "optimum.quanto", "peft")
"""Packages whose layers LyCORIS would know in a model, imported with it if they are there. A skeleton has none of
their classes, whatever its own are called, so it gets the same adapters without them."""
_LEAF = "module"  # the one layer of the model on which a single adapter is built
# What SimpleTuner takes out of the config and hands to `create_lycoris` by position, or keeps.
_BY_POSITION = {"multiplier": 1, "linear_dim": 4, "linear_alpha": 1}
_KEPT = ("tlora_min_rank", "tlora_alpha")
_LISTS = ("target_module", "target_name", "exclude_name")
_MAPS = ("name_algo_map", "module_algo_map")
# Preset keys that LyCORIS accepts and `apply_preset` does not read.
_WITHOUT_EFFECT = (
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
)


@dataclass(frozen=True)
class Adapter:
    """What trains beside one module.

    algo: LyCORIS's name for it ("lora" also for "locon"). factor: the LoKr factor asked for, None if the
    algorithm has none or it is not known (LyCORIS keeps only the shapes). tensors: (name, shape) of every
    trainable tensor. scale: what its output is multiplied by (for OFT and BOFT the constraint).
    """

    algo: str
    factor: int | None
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    scale: float

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(prod(shape) for _, shape in self.tensors)

    @property
    def factorisation(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """LoKr's split, ((out_l, out_k), (in_m, in_n)): w1 is out_l x in_m. None without a full w1 and w2."""
        shapes = dict(self.tensors)
        if "lokr_w1" not in shapes or "lokr_w2" not in shapes:
            return None
        w1, w2 = shapes["lokr_w1"], shapes["lokr_w2"]
        return (w1[0], w2[0]), (w1[1], w2[1])

    def same_as(self, other: Adapter) -> bool:
        """Whether both train the same: the factor that was asked for does not count, what came of it does."""
        return (self.algo, self.tensors, self.scale) == (other.algo, other.tensors, other.scale)

    def __str__(self) -> str:
        factor = "" if self.factor is None else f" factor {self.factor}"
        shapes = " + ".join("x".join(map(str, shape)) for _, shape in self.tensors)
        scale = "" if self.scale == 1 else f" scale {self.scale:g}"
        return f"{self.algo}{factor} ({shapes}){scale}"


@dataclass(frozen=True)
class Row:
    """One module: what it was meant to get and what LyCORIS builds for it; None is no adapter."""

    name: str
    type: str
    shape: tuple[int, ...]
    intended: Adapter | None
    got: Adapter | None

    @property
    def ok(self) -> bool:
        if self.intended is None or self.got is None:
            return self.intended is self.got
        return self.intended.same_as(self.got)

    def __str__(self) -> str:
        return f"{self.name}: meant {self.intended or 'no adapter'}, gets {self.got or 'no adapter'}"


@dataclass(frozen=True)
class Check:
    """What LyCORIS (or PEFT) builds from a config on a model.

    rows: the modules that were meant to get an adapter or get one, in the model's order. unmatched: name
    patterns and classes that the model has nothing for. notes: what else the reader should know of the
    config, one line each. lycoris: the version that built it. builder: LyCORIS, or PEFT with its version there.
    """

    rows: tuple[Row, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    lycoris: str
    builder: str = "LyCORIS"

    @property
    def wrong(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def missing(self) -> tuple[Row, ...]:
        """The modules that were meant to get an adapter and get none."""
        return tuple(row for row in self.rows if row.got is None)

    @property
    def extra(self) -> tuple[Row, ...]:
        """The modules that get an adapter and were meant to have none."""
        return tuple(row for row in self.rows if row.intended is None)

    @property
    def intended_parameters(self) -> int:
        """Trainable numbers, as meant."""
        return sum(row.intended.parameters for row in self.rows if row.intended is not None)

    @property
    def parameters(self) -> int:
        """Trainable numbers that LyCORIS really makes."""
        return sum(row.got.parameters for row in self.rows if row.got is not None)

    def block_parameters(self, block: str) -> int:
        """Trainable numbers that LyCORIS really makes inside the block at the path `block`."""
        rows = (row for row in self.rows if row.name.startswith(block + "."))
        return sum(row.got.parameters for row in rows if row.got is not None)

    def require(self) -> None:
        """Raise ProbeError, naming the first difference, unless every module gets what was meant."""
        if self.wrong:
            raise ProbeError(
                f"{self.builder} {self.lycoris} builds {len(self.wrong)} of {len(self.rows)} modules otherwise than "
                f"meant, first {self.wrong[0]}"
            )


def verify(
    config: Mapping[str, Any],
    plan: Sequence[Planned] | Sequence[PlannedRank],
    modules: Sequence[Module],
    *,
    model_class: str = "",
) -> Check:
    """Build a config of full-matrix LoKr, LoHa or LoCon with LyCORIS on the model of the table; compare with the plan.

    What a planned factor or rank means for a module is computed without LyCORIS. model_class: the denoiser's
    class name, if known. Raises ProbeError for a config or a table that nothing can be built from.
    """
    _check_form(config)
    return _compare(config, {one.name: _planned_adapter(one) for one in plan}, modules, model_class)


def check_config(
    config: Mapping[str, Any], modules: Sequence[Module], *, model_class: str = "", where: str = "the config"
) -> Check:
    """Read a LyCORIS config as its author must have meant it, and compare that with what LyCORIS builds.

    The reading: the name pattern that LyCORIS's own rule finds for a module decides (the name itself, else
    the first pattern in the order of the file: fnmatch over the whole name with `use_fnmatch`, else a regular
    expression from its start). Without one, the innermost class around the module that `module_algo_map`
    names; else the global settings, for what lies in a class of `target_module` or matches `target_name`.
    What settings mean for a module is what LyCORIS builds from them for that module alone. `where` names the
    config in errors. Raises ProbeError for a config that SimpleTuner or LyCORIS refuses, and for a table
    that nothing can be built from.
    """
    _check_form(config, where)
    _check_matching_ends(config, modules, where)
    intended: dict[str, Adapter] = {}
    built: dict[tuple[str, tuple[int, ...], str], Adapter | None] = {}
    for module, settings in _reading(config, modules, model_class):
        key = (module.type, module.shape, json.dumps(settings, sort_keys=True))
        if key not in built:
            built[key] = _alone(config, module, settings)
        adapter = built[key]
        if adapter is not None:
            intended[module.name] = adapter
    return _compare(config, intended, modules, model_class)


def skeleton(modules: Sequence[Module], model_class: str = "") -> nn.Module:
    """The model of a module table on the meta device: same names, order and class names, no weights.

    Linear layers, convolutions, LayerNorm and GroupNorm are torch's own or subclasses of them, all else is an
    empty module of the class name. Biases are assumed. Raises ProbeError for a table that no model can have.
    """
    import torch

    with torch.device("meta"):
        root = _plain_module(model_class or "Denoiser")
        built: dict[str, nn.Module] = {"": root}
        for module in modules:
            if not module.name:
                continue
            parent, _, child = module.name.rpartition(".")
            if module.name in built or parent not in built or not child or hasattr(built[parent], child):
                raise ProbeError(
                    f"the module table cannot be a model's: {module.name!r} comes twice, before its parent, "
                    "or under a name that a module cannot have"
                )
            built[module.name] = _skeleton_module(module)
            built[parent].add_module(child, built[module.name])
    return root


def _planned_adapter(planned: Planned | PlannedRank) -> Adapter:
    if isinstance(planned, PlannedRank):
        algo = "lora" if planned.algo == "locon" else planned.algo
        return Adapter(algo, None, planned.tensors, planned.alpha / planned.rank)
    parts = factorisation(planned.shape, planned.factor)
    tensors = (("lokr_w1", parts.w1_shape), ("lokr_w2", parts.w2_shape))
    return Adapter("lokr", planned.factor, tensors, 1.0)


def _compare(
    config: Mapping[str, Any],
    intended: Mapping[str, Adapter],
    modules: Sequence[Module],
    model_class: str,
) -> Check:
    got = _build(config, modules, model_class)
    known = {module.name for module in modules}
    rows = tuple(
        Row(module.name, module.type, module.shape, intended.get(module.name), got.get(module.name))
        for module in modules
        if module.name in intended or module.name in got
    ) + tuple(Row(name, "", (), adapter, None) for name, adapter in intended.items() if name not in known)
    return Check(
        rows=rows,
        unmatched=_unmatched(config, modules, model_class),
        notes=_notes(config, modules, rows),
        lycoris=_lycoris_version(),
    )


# What LyCORIS builds


def _build(config: Mapping[str, Any], modules: Sequence[Module], model_class: str) -> dict[str, Adapter]:
    """The adapters that SimpleTuner would get from LyCORIS, by module name."""
    model = skeleton(modules, model_class)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: adapter for module, adapter in _adapters(config, model)}


def _alone(config: Mapping[str, Any], module: Module, settings: Mapping[str, Any]) -> Adapter | None:
    """What LyCORIS makes of `settings`, with the config's global ones, on this module and nothing else."""
    preset = {"target_module": [], "name_algo_map": {_LEAF: dict(settings)}, "use_fnmatch": True}
    global_settings = {key: value for key, value in config.items() if key != "preset"}
    model = skeleton([Module(_LEAF, module.type, module.shape)])
    for _, adapter in _adapters(global_settings | {"apply_preset": preset}, model):
        factor = settings.get("factor", config.get("factor", AUTO_FACTOR))
        return replace(adapter, factor=int(factor)) if adapter.algo == "lokr" else adapter
    return None


def _adapters(config: Mapping[str, Any], model: nn.Module) -> list[tuple[nn.Module, Adapter]]:
    """LyCORIS's adapters for this model with the module that each belongs to; none without parameters.

    Built as SimpleTuner 4.10.1's `init_trainable_peft_adapter` does. Raises ProbeError, with LyCORIS's own
    words, if it refuses.
    """
    import torch

    rest = copy.deepcopy(dict(config))
    # LyCORIS keeps a preset in attributes of LycorisNetwork. A copy of the class that is used once starts as
    # in a new process, and leaves the one that others imported as it is.
    wrapper = _fresh_wrapper()
    preset = rest.get("apply_preset")
    by_position = [int(rest.pop(key, default)) for key, default in _BY_POSITION.items()]
    for key in _KEPT:
        rest.pop(key, None)
    try:
        with torch.device("meta"), _weightless(), _silent(), _little_garbage():
            if preset:
                wrapper.LycorisNetwork.apply_preset(preset)
            network = wrapper.create_lycoris(model, *by_position, **rest)
    except Exception as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise ProbeError(
            f"LyCORIS {_lycoris_version()} cannot build the config: {type(error).__name__}: {said}"
        ) from error
    algorithms = {made: algo for algo, made in reversed(wrapper.network_module_dict.items())}
    return [
        (lora.org_module[0], _adapter(lora, algorithms.get(type(lora), "norm")))
        for lora in network.loras
        if any(True for _ in lora.parameters())
    ]


def _adapter(lora: Any, algo: str) -> Adapter:
    tensors = tuple((name, tuple(tensor.shape)) for name, tensor in lora.named_parameters())
    scale = next((getattr(lora, name) for name in ("scale", "constraint") if hasattr(lora, name)), 1.0)
    return Adapter(algo, None, tensors, float(scale))


def _lycoris_version() -> str:
    return importlib.metadata.version("lycoris-lora")


def _fresh_wrapper() -> Any:
    """LyCORIS's `wrapper` module, executed anew and known to nobody else."""
    spec, code = _wrapper_code()
    wrapper = importlib.util.module_from_spec(spec)
    exec(code, vars(wrapper))
    return wrapper


@cache
def _wrapper_code() -> tuple[ModuleSpec, CodeType]:
    spec = importlib.util.find_spec("lycoris.wrapper")
    code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        raise ProbeError("LyCORIS's module lycoris.wrapper is not there; install lycoris-lora 4.1")
    return spec, code


@contextmanager
def _weightless() -> Iterator[None]:
    """Let LyCORIS run on meta tensors: .cpu() leaves them there, the small tensors of numbers are real."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Weightless(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.cpu and args[0].is_meta:
                return args[0]
            if func is torch.tensor and kwargs.get("device") is None:
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)

    with Weightless():
        yield


@contextmanager
def _silent() -> Iterator[None]:
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


# The skeleton


def _skeleton_module(module: Module) -> nn.Module:
    """One module of the skeleton, on the current device."""
    import torch
    from torch import nn

    kind = layer_kind(module)
    if kind and any(not 1 <= dimension <= MAX_DIMENSION for dimension in module.shape):
        raise ProbeError(
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
    if kind == "weight" and module.type == "LayerNorm":
        return nn.LayerNorm(module.shape)
    if kind == "weight" and module.type == "GroupNorm":
        return nn.GroupNorm(1, module.shape[0])
    made = _plain_module(module.type)
    if kind == "weight":
        made.register_parameter("weight", nn.Parameter(torch.empty(module.shape)))
    return made


def _class(name: str, base: Any) -> Any:
    """`base` under the class name `name`: LyCORIS looks at class names."""
    return base if name == base.__name__ else type(_class_name(name), (base,), {})


def _plain_module(class_name: str) -> nn.Module:
    from torch import nn

    made: nn.Module = _class(class_name, nn.Module)()
    return made


def _class_name(name: str) -> str:
    if not name.isidentifier():
        raise ProbeError(f"the module table has the class name {name!r}; expected a Python class name")
    return name


# What the config's author meant


def _reading(
    config: Mapping[str, Any], modules: Sequence[Module], model_class: str
) -> Iterator[tuple[Module, dict[str, Any]]]:
    """The modules that are meant to get an adapter, each with the settings to overrule the global ones."""
    meant = _as_meant(config)
    classes = {module.name: module.type for module in modules} | {"": model_class}
    targets = set(meant.TARGET_REPLACE_MODULE)
    if not config.get("train_llm_adapter"):
        targets.discard("LLMAdapterTransformerBlock")
    for module in modules:
        kind = layer_kind(module)
        if not kind or meant.is_excluded(module.name):
            continue
        settings = meant.find_conf_for_name(module.name)
        if settings is None:
            around = [classes.get(path, "") for path in _self_and_parents(module.name) if not meant.is_excluded(path)]
            inner = next((name for name in around if name in meant.MODULE_ALGO_MAP), None)
            if inner is not None:
                settings = meant.MODULE_ALGO_MAP[inner]
            elif targets.intersection(around) or _matches_any(meant, meant.TARGET_REPLACE_NAME, module.name):
                settings = {}
            else:
                continue
        large_kernel = kind == "conv" and prod(module.shape[2:]) > 1
        if large_kernel and not meant.ENABLE_CONV and not settings.get("dim"):
            continue
        yield module, settings


def _as_meant(config: Mapping[str, Any]) -> Any:
    """A network of LyCORIS's without modules, for its rules of matching, with the preset the config asks for.

    LyCORIS applies `preset` ("full" if there is none) on top of `apply_preset`; what is written out is meant
    to stand.
    """
    wrapper = _fresh_wrapper()
    wrapper.LycorisNetwork.apply_preset(_named_preset(config))
    wrapper.LycorisNetwork.apply_preset(config.get("apply_preset") or {})
    return wrapper.LycorisNetwork(None, init_only=True)


def _named_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind the config's `preset`, one that LyCORIS ships or a TOML file. Raises ProbeError."""
    wrapper = _fresh_wrapper()
    name = config.get("preset", "full")
    if name not in wrapper.PRESET and not (os.path.isfile(name) and os.path.getsize(name) <= MAX_PRESET_BYTES):
        raise ProbeError(
            f"the config's preset {name!r} is neither one of LyCORIS's ({', '.join(wrapper.PRESET)}) "
            f"nor a TOML file of at most {MAX_PRESET_BYTES} bytes"
        )
    with _silent():
        preset = wrapper.PRESET.get(name) or wrapper.read_preset(name)
    if preset is None:
        raise ProbeError(
            f"the config's preset {name!r} is neither one of LyCORIS's ({', '.join(wrapper.PRESET)}) "
            "nor a TOML file that it can read"
        )
    return dict(preset)


def _matches_any(meant: Any, patterns: Sequence[str], name: str) -> bool:
    return any(name == pattern or meant.match_fn(pattern, name) for pattern in patterns)


def _self_and_parents(name: str) -> list[str]:
    """The paths of `name`, of the modules around it, the nearest first, and of the whole model ("")."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""]


def _unmatched(config: Mapping[str, Any], modules: Sequence[Module], model_class: str) -> tuple[str, ...]:
    """The name patterns and classes of the config's own preset that no module of the model has."""
    preset = config.get("apply_preset") or {}
    meant = _as_meant(config)
    patterns = [*preset.get("name_algo_map", ()), *preset.get("target_name", ())]
    classes = [*preset.get("target_module", ()), *preset.get("module_algo_map", ())]
    present = {module.type for module in modules} | {model_class}
    return tuple(
        [name for name in patterns if not any(_matches_any(meant, [name], module.name) for module in modules)]
        + [name for name in classes if name not in present]
    )


def _notes(config: Mapping[str, Any], modules: Sequence[Module], rows: Sequence[Row]) -> tuple[str, ...]:
    """What a reader of the config should know, one line each."""
    preset = config.get("apply_preset") or {}
    notes = []
    for key, default in _BY_POSITION.items():
        value = config.get(key, default)
        if value != int(value):
            notes.append(f"{key} {value:g} is read as {int(value)} by SimpleTuner")
    if not any(row.got for row in rows):
        notes.append("no module of the model gets an adapter: nothing would train")
    if "target_module" not in preset:
        notes.append(
            "target_module is left out, so LyCORIS adapts its default classes everywhere in the model; "
            'write "target_module": [] for the names alone'
        )
    if preset.get("target_module") and preset.get("name_algo_map") and not all(row.ok for row in rows):
        notes.append(
            "LyCORIS builds the classes in target_module before it looks at name_algo_map, and a name's "
            'settings leak into the next class; write "target_module": [] and let the names decide'
        )
    if preset.get("enable_conv") is False and _named_preset(config).get("enable_conv"):
        notes.append("enable_conv false has no effect: LyCORIS turns it on again when it builds the network")
    notes += [f"{key} has no effect in apply_preset" for key in _WITHOUT_EFFECT if key in preset]
    notes += _swallowed(config)
    weightless = sum(module.type == "LayerNorm" and not module.shape for module in modules)
    if config.get("train_norm") and weightless:
        notes.append(
            f"train_norm: the model has {weightless} LayerNorms without a weight; where LyCORIS takes one, "
            "training stops at the first step"
        )
    return tuple(notes)


def _swallowed(config: Mapping[str, Any]) -> list[str]:
    """One line for each setting of single names or classes that their algorithm takes and never looks at."""
    modules = _fresh_wrapper().network_module_dict
    preset = config.get("apply_preset") or {}
    where: dict[tuple[str, str], list[str]] = {}
    for names in _MAPS:
        for name, settings in preset.get(names, {}).items():
            algo = settings.get("algo", config["algo"].lower())
            looked_at = {*inspect.signature(modules[algo]).parameters, "algo", "dim"}
            for key in settings:
                if key not in looked_at:
                    where.setdefault((key, algo), []).append(name)
    return [
        f"{key} has no effect with {algo} (given for {names[0]}{', ...' if len(names) > 1 else ''})"
        for (key, algo), names in where.items()
    ]


# The form of a config


def _check_form(config: Mapping[str, Any], where: str = "the config") -> None:
    """Raise ProbeError for a config that SimpleTuner or LyCORIS does not take, or takes for another."""
    wrapper = _fresh_wrapper()
    if not isinstance(config, Mapping):
        raise ProbeError(f"{where} is a {type(config).__name__}; expected a JSON object")
    needed = ["algo", "multiplier", "linear_alpha"]
    needed += [] if config.get("full_matrix") is True else ["linear_dim"]
    absent = [key for key in needed if key not in config]
    if absent:
        raise ProbeError(f"{where} has no {absent[0]}; SimpleTuner stops at a LyCORIS config without it")
    for key in _BY_POSITION:
        if key in config and not _is_number(config[key]):
            raise ProbeError(f"{key} in {where} is {config[key]!r}; expected a number")
    if not isinstance(config.get("preset", "full"), str):
        raise ProbeError(f"preset in {where} is {config['preset']!r}; expected the name of a preset")
    algo = config["algo"]
    # The global algorithm may be in capitals; those of single names and classes may not.
    _check_settings({**config, "algo": algo.lower() if isinstance(algo, str) else algo}, where, wrapper)
    preset = config.get("apply_preset")
    if preset is None:
        return
    if not isinstance(preset, dict):
        raise ProbeError(f"apply_preset in {where} is a {type(preset).__name__}; expected an object")
    for key in preset:
        if key not in wrapper.VALID_PRESET_KEYS:
            raise ProbeError(
                f"apply_preset in {where} has the unknown key {key!r}; LyCORIS knows: "
                f"{', '.join(wrapper.VALID_PRESET_KEYS)}"
            )
    for key in _LISTS:
        names = preset.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ProbeError(f"{key} in {where} is {names!r}; expected a list of strings")
    for key in _MAPS:
        overrides = preset.get(key, {})
        if not isinstance(overrides, dict):
            raise ProbeError(f"{key} in {where} is a {type(overrides).__name__}; expected an object")
        for name, settings in overrides.items():
            if not isinstance(settings, dict):
                raise ProbeError(f"{key}[{name!r}] in {where} is {settings!r}; expected an object of settings")
            _check_settings(settings, f"{key}[{name!r}] in {where}", wrapper)
    if not preset.get("use_fnmatch"):
        for key in ("name_algo_map", "target_name", "exclude_name"):
            for pattern in preset.get(key, ()):
                _check_regular_expression(pattern, f"{key} in {where}")


def _check_settings(settings: Mapping[str, Any], where: str, wrapper: Any) -> None:
    algo = settings.get("algo", "lora")
    if not isinstance(algo, str) or algo not in wrapper.network_module_dict:
        known = ", ".join(wrapper.network_module_dict)
        raise ProbeError(f"the algo in {where} is {algo!r}; LyCORIS knows: {known}")
    factor = settings.get("factor", AUTO_FACTOR)
    if not _is_whole(factor) or (int(factor) < 1 and int(factor) != AUTO_FACTOR):
        raise ProbeError(
            f"the factor in {where} is {factor!r}; expected a whole number, 1 or more, or -1 for automatic"
        )


def _check_regular_expression(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ProbeError(
            f"{pattern!r} in {where} is not a regular expression ({error}); set use_fnmatch for patterns with *"
        ) from None


def _check_matching_ends(config: Mapping[str, Any], modules: Sequence[Module], where: str) -> None:
    """Raise ProbeError if the config's regular expressions take longer than MATCH_SECONDS for these names.

    LyCORIS matches each with each name, and Python cannot interrupt that: one such as (a+)+$ takes longer than anybody
    waits, here and in the training. With a single repetition in it none does; others are tried in a process that can
    be ended.
    """
    preset = config.get("apply_preset") or {}
    if preset.get("use_fnmatch"):
        return
    patterns = [
        pattern
        for key in ("name_algo_map", "target_name", "exclude_name")
        for pattern in preset.get(key, ())
        if sum(map(pattern.count, "*+{?")) > 1
    ]
    if not patterns:
        return
    names = [module.name for module in modules]
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_ALL],
            input=json.dumps([patterns, names]).encode(),
            timeout=MATCH_SECONDS,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(
            f"the regular expressions in {where} take over {MATCH_SECONDS:g} s to match with this model's names; "
            "write them without repetitions inside repetitions, or use fnmatch patterns (use_fnmatch)"
        ) from None
    except subprocess.CalledProcessError:
        raise ProbeError(f"the regular expressions in {where} cannot be matched with this model's names") from None


_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    match = re.compile(pattern).match
    for name in names:
        match(name)
"""


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < MAX_NUMBER
    return isinstance(value, float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)
