"""The form of a LyCORIS config: what SimpleTuner or LyCORIS would not take, or take for something else, is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.factors import AUTO_FACTOR
from simpletuner_layerprobe.lokr.keys import did_you_mean
from simpletuner_layerprobe.lokr.network import BY_POSITION, fresh_wrapper
from simpletuner_layerprobe.lokr.presets import FULL, MAPS, is_file, named_preset, written_preset

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module

MAX_NUMBER = 2**63  # of a setting
MATCH_SECONDS = 5.0  # that the regular expressions of a config may take for one model; most take a thousandth
MAX_MATCHES = 2_000_000  # names in a config times modules: some seconds; a name per module of SD3.5 Large is 0.3M
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "conv_dim": int,
    "conv_alpha": float,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
    "block_size": int,
    "constraint": float,
}
"""Keys of which LyCORIS makes a number."""
_LISTS = ("target_module", "target_name", "exclude_name")
_PATTERNS = ("name_algo_map", "target_name", "exclude_name")


def check_form(config: Mapping[str, Any], where: str = "the config") -> None:
    """Raise ConfigError for a config that SimpleTuner or LyCORIS does not take, or takes for another."""
    wrapper = fresh_wrapper()
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} is a {type(config).__name__}; expected a JSON object")
    needed = ["algo", "multiplier", "linear_alpha", *([] if config.get("full_matrix") is True else ["linear_dim"])]
    absent = [key for key in needed if key not in config]
    if absent:
        near = did_you_mean(absent[0], config.keys() - {*needed})
        raise ConfigError(f"{where} has no {absent[0]}; SimpleTuner stops at a LyCORIS config without it{near}")
    for key in BY_POSITION:
        if key in config and not _is_taken(config[key]):
            raise ConfigError(f"{key} in {where} is {config[key]!r}; expected a number")
    for key, convert in _NUMBERS.items():
        try:
            convert(config.get(key) or 0)  # as LyCORIS does, which would not name the key
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{key} in {where} is {config[key]!r}; expected a number") from None
    if not isinstance(config.get("preset", FULL), str):
        raise ConfigError(f"preset in {where} is {config['preset']!r}; expected the name of a preset")
    algo = config["algo"]
    # The global algorithm may be in capitals; those of single names and classes may not.
    _check_settings({**config, "algo": algo.lower() if isinstance(algo, str) else algo}, where, wrapper)
    _check_preset(config.get("apply_preset"), where, wrapper)
    if is_file(config):
        _check_preset(named_preset(config), f"preset {config['preset']}", wrapper)
    written = written_preset(config)
    if not written.get("use_fnmatch"):
        for key in _PATTERNS:
            for pattern in written.get(key, ()):
                _check_regular_expression(pattern, f"{key} in {where}")


def _check_preset(preset: object, where: str, wrapper: Any) -> None:
    if preset is None:
        return
    if not isinstance(preset, dict):
        raise ConfigError(f"apply_preset in {where} is a {type(preset).__name__}; expected an object")
    for key in preset:
        if key not in wrapper.VALID_PRESET_KEYS:
            raise ConfigError(
                f"apply_preset in {where} has the unknown key {key!r}; LyCORIS knows: "
                f"{', '.join(wrapper.VALID_PRESET_KEYS)}{did_you_mean(key, wrapper.VALID_PRESET_KEYS)}"
            )
    for key in _LISTS:
        names = preset.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{key} in {where} is {names!r}; expected a list of strings")
    for key in MAPS:
        overrides = preset.get(key, {})
        if not isinstance(overrides, dict):
            raise ConfigError(f"{key} in {where} is a {type(overrides).__name__}; expected an object")
        for name, settings in overrides.items():
            if not isinstance(settings, dict):
                raise ConfigError(f"{key}[{name!r}] in {where} is {settings!r}; expected an object of settings")
            _check_settings(settings, f"{key}[{name!r}] in {where}", wrapper)


def _check_settings(settings: Mapping[str, Any], where: str, wrapper: Any) -> None:
    algo = settings.get("algo", "lora")
    if not isinstance(algo, str) or algo not in wrapper.network_module_dict:
        known = ", ".join(wrapper.network_module_dict)
        raise ConfigError(f"the algo in {where} is {algo!r}; LyCORIS knows: {known}")
    factor = settings.get("factor", AUTO_FACTOR)
    if not _is_number(factor) or factor != int(factor) or (factor < 1 and factor != AUTO_FACTOR):
        raise ConfigError(
            f"the factor in {where} is {factor!r}; expected a whole number, 1 or more, or -1 for automatic"
        )


def _check_regular_expression(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{pattern!r} in {where} is not a regular expression ({error}); set use_fnmatch for patterns with *"
        ) from None


def check_matching_ends(config: Mapping[str, Any], modules: Sequence[Module], where: str) -> None:
    """Raise ConfigError if the config has more patterns than MAX_MATCHES allows for these modules, or if its regular
    expressions take longer than MATCH_SECONDS for their names.

    LyCORIS matches each with each name, and Python cannot interrupt that: one such as (a+)+$ takes longer than anybody
    waits, here and in the training. With a single repetition in it none does; others are tried in a process that can
    be ended.
    """
    preset = written_preset(config)
    count = sum(len(preset.get(key, ())) for key in _PATTERNS)
    if count * len(modules) > MAX_MATCHES:
        raise ConfigError(
            f"{where} has {count:,} names, and each is compared with each of the model's {len(modules):,} modules; "
            f"at most {MAX_MATCHES // len(modules):,} can be checked: write patterns that stand for several"
        )
    if preset.get("use_fnmatch"):
        return
    patterns = [pattern for key in _PATTERNS for pattern in preset.get(key, ()) if sum(map(pattern.count, "*+{?")) > 1]
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
        raise ConfigError(
            f"the regular expressions in {where} take over {MATCH_SECONDS:g} s to match with this model's names; "
            "write them without repetitions inside repetitions, or use fnmatch patterns (use_fnmatch)"
        ) from None
    except subprocess.CalledProcessError:
        raise ConfigError(f"the regular expressions in {where} cannot be matched with this model's names") from None


_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    match = re.compile(pattern).match
    for name in names:
        match(name)
"""


def _is_taken(value: Any) -> bool:
    """Whether int() takes it, as SimpleTuner does: a text of digits too."""
    try:
        return abs(int(value)) < MAX_NUMBER
    except (TypeError, ValueError, OverflowError):
        return False


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < MAX_NUMBER
    return isinstance(value, float) and math.isfinite(value)
