"""The two presets of a LyCORIS config, and what of them counts: `apply_preset`, and `preset`, a name or a TOML file.

SimpleTuner applies `apply_preset` first; LyCORIS then applies `preset` ("full" if there is none) on top of it, and
reads of either only what its network has a place for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.network import fresh_wrapper, silent

FULL = "full"
MAX_PRESET_BYTES = 1024 * 1024
MAPS = ("name_algo_map", "module_algo_map")


def named_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind the config's `preset`, one that LyCORIS ships or a TOML file. Raises ConfigError."""
    wrapper = fresh_wrapper()
    name = config.get("preset", FULL)
    neither = f"the config's preset {name!r} is neither one of LyCORIS's ({', '.join(wrapper.PRESET)}) nor a TOML file"
    if is_file(config) and not (os.path.isfile(name) and os.path.getsize(name) <= MAX_PRESET_BYTES):
        raise ConfigError(f"{neither} of at most {MAX_PRESET_BYTES} bytes")
    with silent():
        preset = wrapper.PRESET.get(name) or wrapper.read_preset(name)
    if preset is None:
        raise ConfigError(f"{neither} that it can read")
    return dict(preset)


def is_file(config: Mapping[str, Any]) -> bool:
    """Whether the config's `preset` is no name that LyCORIS knows."""
    return config.get("preset", FULL) not in fresh_wrapper().PRESET


def written_preset(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both presets as their author must have meant them: what `apply_preset` says stands."""
    return named_preset(config) | (config.get("apply_preset") or {})


def replaced(config: Mapping[str, Any]) -> list[str]:
    """The keys of `apply_preset` that count for nothing, as `preset` sets them to something else."""
    named = named_preset(config)
    written = config.get("apply_preset") or {}
    return [key for key in written if key in living_keys() and key in named and named[key] != written[key]]


@cache
def living_keys() -> frozenset[str]:
    """The keys of a preset that LyCORIS's network keeps; it takes others and never looks at them."""
    wrapper = fresh_wrapper()
    living = set()
    for key in wrapper.VALID_PRESET_KEYS:
        before = dict(vars(wrapper.LycorisNetwork))
        wrapper.LycorisNetwork.apply_preset({key: object()})
        if any(before[name] is not value for name, value in vars(wrapper.LycorisNetwork).items()):
            living.add(key)
    return frozenset(living)
