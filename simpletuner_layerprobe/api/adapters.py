"""Adapters: where a finished one put its change, module by module, from its file and the base's weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpletuner_layerprobe.api.run import Run
from simpletuner_layerprobe.errors import ConfigError, ProbeError
from simpletuner_layerprobe.lokr.config import LYCORIS_CONFIG_NAME
from simpletuner_layerprobe.lokr.groups import module_groups, owning_block
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.lokr.saved import Saved, named_block, natural, read_adapter
from simpletuner_layerprobe.lokr.spread import OTHER, AdapterUpdates, Part
from simpletuner_layerprobe.lokr.weights import Weights, weights_folder
from simpletuner_layerprobe.models import architecture
from simpletuner_layerprobe.readings import all_blocks
from simpletuner_layerprobe.run.manifest import read_manifest
from simpletuner_layerprobe.training.environment import read_options

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.groups import Model

__all__ = ["AdapterUpdates", "Part", "adapter"]

PathLike = str | os.PathLike[str]
_BASES = ("pretrained_transformer_model_name_or_path", "pretrained_model_name_or_path")


def adapter(
    file: PathLike,
    *,
    model: PathLike | None = None,
    run: Run | PathLike | None = None,
    config: PathLike | None = None,
    modules: Model | None = None,
) -> AdapterUpdates:
    """Where a finished adapter put its change: the norm of each module's update, beside that of the base's weight.

    file: safetensors as SimpleTuner saves them, LyCORIS's lokr, loha and locon or PEFT's lora. model: the base, a
    pipeline or a transformer in diffusers' folders; its config.json alone tells blocks, kinds and streams, not weights.
    run: a probe run of the base; its kept options name the base if `model` does not. config: the LyCORIS config that it
    was made from, by default the lycoris_config.json beside it. modules: the modules of `model`, such as `architecture`
    gives them, if they are known. Without a base, weights and relative norms are NaN.
    Raises ConfigError for a file that is no such adapter, for DoRA, an adapter of another model and numbers that are
    not finite; ModelError for a model that is none.
    """
    notes: list[str] = []
    saved = read_adapter(file)
    if saved.others:
        notes.append(f"{saved.others} modules of text encoders are left out")
    known, base = _base(model, run, modules, notes)
    table = {module.name: module.shape for module in known.modules if len(module.shape) > 1} if known else {}
    weights = Weights(base) if base else None
    name_of = _fitting(saved, weights.file_of if weights else table, base or "the module table")
    order = {name: place for place, name in enumerate(table)}
    keys = sorted(name_of, key=lambda key: (order.get(name_of[key], len(order)), natural(name_of[key])))
    names = tuple(name_of[key] for key in keys)
    algorithms, measured = [], []
    for key, name in zip(keys, names, strict=True):  # all of them at once may be larger than the memory
        update = saved.update(key)
        norm = update.norm()
        if not isfinite(norm):
            raise ConfigError(f"{saved.path}: {key} has numbers that are not finite, or too large; it cannot be used")
        shape = weights.shape(name) if weights else table.get(name)
        if shape is not None and update.shape != (shape[0], prod(shape[1:])):
            raise ConfigError(
                f"{saved.path} is an adapter of another model: {key} changes a weight of {_by(update.shape)}, "
                f"{name} in {base or 'the module table'} has {_by(shape)}"
            )
        algorithms.append(update.algo)
        measured.append((norm, weights.norm(name) if weights else np.nan, update.parameters))
    path, planned = _planned(saved, known, config, notes)
    if weights is None:
        notes.append("the base's weights are not known, so updates are shown alone: name the base with --model FOLDER")
    update_M, weight_M, parameters_M = map(np.array, zip(*measured, strict=True))
    return AdapterUpdates(
        path=saved.path,
        base=base,
        config=path,
        names=names,
        algorithms=tuple(algorithms),
        **_places(known, names),
        update_M=update_M,
        weight_M=weight_M,
        parameters_M=parameters_M,
        planned_M=np.array([planned.get(name, 0) for name in names]) if path else None,
        left_out=tuple(name for name in planned if name not in name_of.values()),
        notes=tuple(notes),
    )


def _base(
    model: PathLike | None, run: Run | PathLike | None, modules: Model | None, notes: list[str]
) -> tuple[Model | None, Path | None]:
    """The base's module table and the folder of its weights, each None if it is not known."""
    manifest, folder = None, None if model is None else weights_folder(model)
    if run is not None:
        manifest, path = (run.manifest, run.path) if isinstance(run, Run) else (read_manifest(run), Path(run))
        folder = _kept_base(path, notes) if model is None else folder
    if manifest is not None and manifest.modules:
        return manifest, folder
    where = folder or model
    if modules is not None or where is None:
        return modules, folder
    try:
        return architecture(where), folder
    except ProbeError as error:
        if folder is None:
            raise
        notes.append(f"blocks are told by their names alone: {error}")
        return None, folder


def _kept_base(path: Path, notes: list[str]) -> Path | None:
    """The folder of the weights that a probe run's kept options name, if it is here."""
    try:
        options = {key.lstrip("-"): value for key, value in read_options(path).items()}
    except ConfigError as error:
        notes.append(str(error))
        return None
    named = [value for value in map(options.get, _BASES) if isinstance(value, str) and value]
    folders = [folder for folder in map(weights_folder, named) if folder]
    if named and not folders:
        notes.append(f"the run's base {named[0]} is no folder with weights here")
    return folders[0] if folders else None


def _fitting(saved: Saved, known: Mapping[str, Any], where: Path | str) -> dict[str, str]:
    """Module as the file calls it -> the model's name. Raises ConfigError if one is not in the model."""
    name_of = saved.names(known)
    strange = [module for module in saved.keys if module not in name_of]
    if strange:
        raise ConfigError(
            f"{saved.path} is an adapter of another model: {len(strange)} of its {len(saved.keys)} modules are not in "
            f"{where}, first {', '.join(strange[:3])}"
        )
    return name_of


def _planned(
    saved: Saved, known: Model | None, config: PathLike | None, notes: list[str]
) -> tuple[Path | None, dict[str, int]]:
    """The config that the adapter was made from, None without, and the parameters that it means for each module.

    A config that only lies beside the file, and cannot be read, is a note and no error.
    """
    path = saved.path.parent / LYCORIS_CONFIG_NAME if config is None else Path(config)
    if config is None and not (saved.underscored and path.is_file()):
        return None, {}
    try:
        if known is None:
            raise ConfigError(f"{path} cannot be compared without the model's modules; give --run or --model")
        rows = check_config(path, known).rows
    except ConfigError as error:
        if config is not None:
            raise
        notes.append(f"the plan is not shown: {error}")
        return None, {}
    return path, {row.name: row.intended.parameters for row in rows if row.intended is not None}


def _places(known: Model | None, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The blocks, kinds and streams of modules, by the model or, if it is not known, the blocks by their names."""
    if known is None or not known.streams:
        return {"blocks": tuple(named_block(name) or OTHER for name in names), "kinds": (), "streams": ()}
    updated = {stream.name: stream.blocks for stream in sorted(known.streams, key=lambda each: each.name != "image")}
    blocks = all_blocks(list(updated.values()))
    owners = tuple(owning_block(name, blocks) or OTHER for name in names)
    try:
        groups = module_groups(known, blocks, streams=updated)
    except ConfigError:
        return {"blocks": owners, "kinds": (), "streams": ()}
    group_of = {module.name: group for group in groups for module in group.modules}
    told = [group_of.get(name) for name in names]
    return {
        "blocks": owners,
        "kinds": tuple(group.kind if group else OTHER for group in told),
        "streams": tuple(group.stream if group else OTHER for group in told),
    }


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
