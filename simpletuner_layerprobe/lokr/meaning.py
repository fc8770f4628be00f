"""What the author of a LyCORIS config must have meant for each module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.lokr.groups import Model, layer_kind
from simpletuner_layerprobe.lokr.network import fresh_wrapper
from simpletuner_layerprobe.lokr.presets import written_preset

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module


def reading(config: Mapping[str, Any], model: Model) -> Iterator[tuple[Module, dict[str, Any]]]:
    """The modules that are meant to get an adapter, each with the settings to overrule the global ones."""
    meant = rules_of(config)
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
            around = [classes.get(path, "") for path in self_and_parents(module.name) if not meant.is_excluded(path)]
            inner = next((name for name in around if name in meant.MODULE_ALGO_MAP), None)
            if inner is not None:
                settings = meant.MODULE_ALGO_MAP[inner]
            elif targets.intersection(around) or matches_any(meant, meant.TARGET_REPLACE_NAME, module.name):
                settings = {}
            else:
                continue
        large_kernel = kind == "conv" and prod(module.shape[2:]) > 1
        if large_kernel and not meant.ENABLE_CONV and not settings.get("dim"):
            continue
        yield module, settings


def rules_of(config: Mapping[str, Any]) -> Any:
    """A network of LyCORIS's without modules, for its rules of matching, with the presets as they are meant."""
    wrapper = fresh_wrapper()
    wrapper.LycorisNetwork.apply_preset(written_preset(config))
    return wrapper.LycorisNetwork(None, init_only=True)


def matches_any(meant: Any, patterns: Iterable[str], name: str) -> bool:
    return any(name == pattern or meant.match_fn(pattern, name) for pattern in patterns)


def self_and_parents(name: str) -> list[str]:
    """The paths of `name`, of the modules around it, the nearest first, and of the whole model ("")."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""]
