"""Architectures: what SimpleTuner trains of a model known by name, or by a config.json, without its weights.

The module table is that of SimpleTuner's own class on the meta device (training/denoisers.py), which the family table
names. torch, diffusers and SimpleTuner are imported inside the calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.probe.blocks import find_blocks, stream_blocks
from simpletuner_layerprobe.probe.families import FAMILIES, Family, family, is_known
from simpletuner_layerprobe.probe.modules import module_table, norm_widths
from simpletuner_layerprobe.published import NAMED
from simpletuner_layerprobe.run.manifest import Module, Stream, Target
from simpletuner_layerprobe.training.denoisers import denoiser
from simpletuner_layerprobe.training.precision import quantised

SUBFOLDERS = ("transformer", "unet", "prior", "dit", "ace_step_transformer")
"""Where pipelines keep their denoiser."""

OTHER_NAMES = {
    "UNet2DConditionModel": "FlowMapUNet2DConditionModel",
    "Transformer2DModel": "PixArtTransformer2DModel",  # as PixArt's own files still say
}
"""Class names of a config.json -> of the class that SimpleTuner loads from it."""

TOLD_BY: dict[str, tuple[str, Any]] = {
    "deepfloyd": ("addition_embed_type", "text"),
    "kolors": ("encoder_hid_dim_type", "text_proj"),
    "sdxl": ("addition_embed_type", "text_time"),
}
"""Families that share a class with others -> the setting that tells them, in this order."""


@dataclass(frozen=True)
class Architecture:
    """A denoiser without its weights.

    family, flavour: SimpleTuner's names, flavour "" if unknown. model_class: the class that SimpleTuner trains.
    streams: the blocks that update each stream, targets: what a LoKr config covers in them. modules: its module table.
    precision: the base_model_precision that the table was made for; "" as it was built, without having been asked.
    """

    family: str
    flavour: str
    model_class: str
    streams: tuple[Stream, ...]
    targets: tuple[Target, ...]
    modules: tuple[Module, ...]
    precision: str = ""


def architecture(name_or_path: str | os.PathLike[str], *, precision: str = "", alone: bool = False) -> Architecture:
    """The architecture called so in NAMED, or that of a config.json of a diffusers pipeline's denoiser.

    A path may be the file, its folder or the pipeline's; "FAMILY:PATH" says whose it is where families share a class.
    precision: SimpleTuner's base_model_precision, which replaces layers. alone: see `denoiser`.
    Raises ModelError for what is neither, a file that is not such a config, a class that no family has, and where
    SimpleTuner's class cannot be imported or built.
    """
    text = os.fspath(name_or_path)
    named = NAMED.get(text)
    if named is not None:
        return _architecture(
            family(named.family, named.class_name), named.config, named.flavour, text, precision, alone
        )
    name, _, path = text.partition(":") if _names_family(text) else ("", "", text)
    where = _config_path(Path(path))
    config = read_object(where, "a diffusers transformer config.json")
    return _architecture(_entry(name, config, str(where)), config, "", str(where), precision, alone)


def _names_family(text: str) -> bool:
    name, _, path = text.partition(":")
    return bool(path) and is_known(name)


def _config_path(path: Path) -> Path:
    candidates = (path, *(path / name / "config.json" for name in SUBFOLDERS), path / "config.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        f"there is no architecture {str(path)!r}: it is neither one of {', '.join(NAMED)} "
        "nor a diffusers transformer config.json, nor a folder with one"
    )


def _entry(name: str, config: Mapping[str, Any], where: str) -> Family:
    """The table's entry for a config: of the family called `name`, else of the one that has its class."""
    given = config.get("_class_name")
    class_name = OTHER_NAMES.get(str(given), str(given))
    if name:
        return family(name, class_name if sum(entry.name == name for entry in FAMILIES) > 1 else "")
    if not isinstance(given, str):
        raise ModelError(f"{where} has no _class_name; expected a diffusers transformer config.json")
    entries = [entry for entry in FAMILIES if entry.source.endswith(f":{class_name}")]
    if not entries:
        raise ModelError(
            f"{where} is of the class {given!r}, which no model family of SimpleTuner has; if it is one of theirs, "
            "say which: FAMILY:PATH"
        )
    told = [name for name, (key, value) in TOLD_BY.items() if config.get(key) == value]
    return next((entry for name in told for entry in entries if entry.name == name), entries[0])


def _architecture(
    entry: Family, config: Mapping[str, Any], flavour: str, where: str, precision: str, alone: bool
) -> Architecture:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    model = denoiser(entry.source, settings, where, alone=alone)
    if precision:
        model = quantised(model, entry.name, precision)
    widths = norm_widths(model)
    return Architecture(
        family=entry.name,
        flavour=flavour,
        model_class=type(model).__name__,
        streams=tuple(Stream(name, blocks) for name, blocks in stream_blocks(find_blocks(model, entry)).items()),
        targets=tuple(Target(each.blocks, each.at_factor, each.at_double) for each in entry.targets),
        modules=tuple(Module(*row, widths.get(row[0], 0)) for row in module_table(model)),
        precision=precision,
    )
