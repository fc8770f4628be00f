"""Proof of a LyCORIS config: what LyCORIS really builds, module by module, against what was meant.

A skeleton of the denoiser is made from the module table on the meta device (no weights), and LyCORIS's own
network is built on it in the way SimpleTuner does. torch and LyCORIS are imported inside the calls.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.lokr.adapter import LOKR, Adapter
from simpletuner_layerprobe.lokr.check import Check, rows_of
from simpletuner_layerprobe.lokr.factors import AUTO_FACTOR
from simpletuner_layerprobe.lokr.form import check_form, check_matching_ends
from simpletuner_layerprobe.lokr.groups import Model, layer_kind
from simpletuner_layerprobe.lokr.meaning import reading
from simpletuner_layerprobe.lokr.network import adapters_of, adapters_on, lycoris_version
from simpletuner_layerprobe.lokr.notes import notes_of, unmatched
from simpletuner_layerprobe.lokr.skeleton import skeleton
from simpletuner_layerprobe.lokr.stops import stops_of

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module

_LEAF = "module"  # the one layer of the model on which a single adapter is built


def verify(config: Mapping[str, Any], intended: Mapping[str, Adapter], model: Model) -> Check:
    """Build a config with LyCORIS on the model of the table; compare with what each module is meant to get.

    Raises ConfigError for a config or a table that nothing can be built from.
    """
    check_form(config)
    return _compare(config, intended, model)


def check_config(
    config: Mapping[str, Any] | str | os.PathLike[str], model: Model, *, where: str = "the config"
) -> Check:
    """Read a LyCORIS config as its author must have meant it, and compare that with what LyCORIS builds.

    The reading: the name pattern that LyCORIS's own rule finds for a module decides (the name itself, else
    the first pattern in the order of the file: fnmatch over the whole name with `use_fnmatch`, else a regular
    expression from its start). Without one, the innermost class around the module that `module_algo_map`
    names; else the global settings, for what lies in a class of `target_module` or matches `target_name`.
    What settings mean for a module is what LyCORIS builds from them for that module alone.

    config: the config, or the path of its file. model: a run's manifest, or an architecture. where: what errors call a
    config that is no path. Raises ConfigError for a config that SimpleTuner or LyCORIS refuses, and for a model without
    a module table, or with one that nothing can be built from.
    """
    if isinstance(config, str | os.PathLike):
        path = config
        config, where = read_object(path, "a LyCORIS config"), str(path)
        made = check_config(config, model, where=where)
        return replace(made, notes=(*written_twice(path), *made.notes))
    if not model.modules:
        raise ConfigError("the run has no module table (it was imported without --model); name the model with --model")
    check_form(config, where)
    check_matching_ends(config, model.modules, where)
    return _compare(config, _meant(config, model), model)


def check_network(
    config: Mapping[str, Any], model: Model, loras: Mapping[str, Any], *, where: str = "the config"
) -> Check:
    """The same for a network of LyCORIS's that is there already, in a training.

    loras: name of a module of the model -> LyCORIS's own module on it. Raises ConfigError for a config that
    `check_config` refuses.
    """
    check_form(config, where)
    trained = {name: lora for name, lora in loras.items() if any(True for _ in lora.parameters())}
    got = dict(zip(trained, adapters_of(trained.values()), strict=True))
    return _checked(config, _meant(config, model), got, model)


def _meant(config: Mapping[str, Any], model: Model) -> dict[str, Adapter]:
    """Name of a module -> the adapter that the config's author must have meant for it."""
    intended: dict[str, Adapter] = {}
    built: dict[tuple[str, tuple[int, ...], str], Adapter | None] = {}
    for module, settings in reading(config, model):
        key = (module.type, module.shape, json.dumps(settings, sort_keys=True))
        if key not in built:
            built[key] = _alone(config, module, settings)
        adapter = built[key]
        if adapter is not None:
            intended[module.name] = adapter
    return intended


def written_twice(path: str | os.PathLike[str]) -> list[str]:
    """One line for each key that an object of the file has more than once: all but the last are lost."""
    twice: dict[str, None] = {}

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice.update(dict.fromkeys(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
        return value

    with open(path, encoding="utf-8") as file:
        json.load(file, object_pairs_hook=counted)
    return [f"{key} is written more than once; the last counts" for key in twice]


def _compare(config: Mapping[str, Any], intended: Mapping[str, Adapter], model: Model) -> Check:
    """What LyCORIS builds, as SimpleTuner would get it, beside what was meant."""
    built = skeleton(model.modules, model.model_class)
    names = {id(module): name for name, module in built.named_modules()}
    return _checked(
        config, intended, {names[id(module)]: adapter for module, adapter in adapters_on(config, built)}, model
    )


def _checked(
    config: Mapping[str, Any], intended: Mapping[str, Adapter], got: Mapping[str, Adapter], model: Model
) -> Check:
    rows = rows_of(model.modules, intended, got)
    notes = notes_of(config, model, rows)
    layers = tuple(module.name for module in model.modules if layer_kind(module) in ("linear", "conv"))
    stops = stops_of(config, rows)
    return Check(rows, unmatched(config, model), notes, lycoris_version(), stops=stops, layers=layers)


def _alone(config: Mapping[str, Any], module: Module, settings: Mapping[str, Any]) -> Adapter | None:
    """What LyCORIS makes of `settings`, with the config's global ones, on this module and nothing else."""
    preset = {"target_module": [], "name_algo_map": {_LEAF: dict(settings)}, "use_fnmatch": True}
    global_settings = {key: value for key, value in config.items() if key != "preset"}
    model = skeleton([replace(module, name=_LEAF)])
    for _, adapter in adapters_on(global_settings | {"apply_preset": preset}, model):
        factor = settings.get("factor", config.get("factor", AUTO_FACTOR))
        return replace(adapter, factor=int(factor)) if adapter.algo == LOKR else adapter
    return None
