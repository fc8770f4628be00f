"""What the author of a LyCORIS config must have meant, and what a reader of it should know."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.form import MAPS
from simpletuner_layerprobe.lokr.groups import Model, layer_kind
from simpletuner_layerprobe.lokr.network import BY_POSITION, fresh_wrapper, silent

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.check import Row
    from simpletuner_layerprobe.run.manifest import Module

MAX_PRESET_BYTES = 1024 * 1024
# Preset keys that LyCORIS accepts and `apply_preset` does not read.
_WITHOUT_EFFECT = (
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
)


def reading(config: Mapping[str, Any], model: Model) -> Iterator[tuple[Module, dict[str, Any]]]:
    """The modules that are meant to get an adapter, each with the settings to overrule the global ones."""
    meant = _as_meant(config)
    classes = {module.name: module.type for module in model.modules} | {"": model.model_class}
    targets = set(meant.TARGET_REPLACE_MODULE)
    if not config.get("train_llm_adapter"):
        targets.discard("LLMAdapterTransformerBlock")
    for module in model.modules:
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
    wrapper = fresh_wrapper()
    wrapper.LycorisNetwork.apply_preset(_named_preset(config))
    wrapper.LycorisNetwork.apply_preset(config.get("apply_preset") or {})
    return wrapper.LycorisNetwork(None, init_only=True)


def _named_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind the config's `preset`, one that LyCORIS ships or a TOML file. Raises ConfigError."""
    wrapper = fresh_wrapper()
    name = config.get("preset", "full")
    neither = f"the config's preset {name!r} is neither one of LyCORIS's ({', '.join(wrapper.PRESET)}) nor a TOML file"
    if name not in wrapper.PRESET and not (os.path.isfile(name) and os.path.getsize(name) <= MAX_PRESET_BYTES):
        raise ConfigError(f"{neither} of at most {MAX_PRESET_BYTES} bytes")
    with silent():
        preset = wrapper.PRESET.get(name) or wrapper.read_preset(name)
    if preset is None:
        raise ConfigError(f"{neither} that it can read")
    return dict(preset)


def _matches_any(meant: Any, patterns: Sequence[str], name: str) -> bool:
    return any(name == pattern or meant.match_fn(pattern, name) for pattern in patterns)


def _self_and_parents(name: str) -> list[str]:
    """The paths of `name`, of the modules around it, the nearest first, and of the whole model ("")."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""]


def unmatched(config: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """The name patterns and classes of the config's own preset that no module of the model has."""
    preset = config.get("apply_preset") or {}
    meant = _as_meant(config)
    patterns = [*preset.get("name_algo_map", ()), *preset.get("target_name", ())]
    classes = [*preset.get("target_module", ()), *preset.get("module_algo_map", ())]
    present = {module.type for module in model.modules} | {model.model_class}
    return tuple(
        [name for name in patterns if not any(_matches_any(meant, [name], module.name) for module in model.modules)]
        + [name for name in classes if name not in present]
    )


def notes_of(config: Mapping[str, Any], model: Model, rows: Sequence[Row]) -> tuple[str, ...]:
    """What a reader of the config should know, one line each."""
    preset = config.get("apply_preset") or {}
    notes = []
    for key, default in BY_POSITION.items():
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
    by_class = _by_their_own_class(config, model.modules)
    if by_class and not getattr(model, "precision", "as recorded"):
        notes.append(
            f"layers are reached by their own class ({', '.join(by_class)}), of which a quantised base has fewer: say "
            "its base_model_precision with --precision, such as int8-quanto"
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
    return tuple(notes)


def _by_their_own_class(config: Mapping[str, Any], modules: Sequence[Module]) -> list[str]:
    """The classes of layers that the config's choice of classes has, its default choice too."""
    meant = _as_meant(config)
    chosen = {*meant.TARGET_REPLACE_MODULE, *meant.MODULE_ALGO_MAP}
    return sorted(chosen & {module.type for module in modules if layer_kind(module) in ("linear", "conv")})


def stops_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Why a training with these adapters stops at its first step, one line each."""
    weightless = [row.name for row in rows if row.got is not None and row.got.algo == "norm" and not row.shape]
    if not weightless:
        return ()
    return (
        f"train_norm: LyCORIS takes {len(weightless):,} norms without a weight, first {weightless[0]}, and the "
        "training stops at its first step; leave train_norm out",
    )


def _swallowed(config: Mapping[str, Any]) -> list[str]:
    """One line for each setting of single names or classes that their algorithm takes and never looks at."""
    modules = fresh_wrapper().network_module_dict
    preset = config.get("apply_preset") or {}
    where: dict[tuple[str, str], list[str]] = {}
    for names in MAPS:
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
