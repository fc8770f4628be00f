"""A finished adapter as SimpleTuner saves it: which modules it changes, and the update of each, read one by one.

LyCORIS writes `lycoris_transformer_blocks_0_attn_to_q.lokr_w1`: the dots of the module's name are lost and come back
from the model's own names. PEFT writes `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, its alphas into the
file's metadata (as diffusers does) or, for ComfyUI, beside the tensors. An alpha that is nowhere is the rank.
Source: SimpleTuner 4.10.1, helpers/training/save_hooks.py and lora_format.py; diffusers 0.42.1, loaders/lora_base.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.update import Update, lycoris_update
from simpletuner_layerprobe.lokr.weights import open_tensors, read_tensor

METADATA = "lora_adapter_metadata"  # diffusers' name of PEFT's settings in the file
WHAT = "an adapter that SimpleTuner saved"
_LYCORIS = re.compile(r"([^.]+)\.(lokr_\w+|hada_\w+|lora_(?:up|down|mid)\.weight|alpha)")
_PEFT = re.compile(
    r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora\.(down|up)\.weight|lora_(down|up)\.weight|(alpha))"
)
_DORA = re.compile(r".*\.(dora_scale|lora_magnitude_vector)(\..*)?")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_UNDERSCORED = ("lycoris_", "lora_unet_", "lora_transformer_")
_TEXT = ("text_encoder", "lora_te", "lycoris_te")


@dataclass(frozen=True)
class Saved:
    """An adapter file.

    keys: module as the file calls it -> name of the tensor as LyCORIS has it ("lora_A" is "lora_down") -> its key.
    others: modules of text encoders, which are left out.
    """

    path: Path
    keys: Mapping[str, Mapping[str, str]]
    others: int
    _file: Any = field(repr=False)

    @property
    def underscored(self) -> bool:
        """Whether the names have lost their dots, as LyCORIS's have."""
        return not any("." in module for module in self.keys)

    def names(self, known: Collection[str]) -> dict[str, str]:
        """Module as the file calls it -> its name among `known`, without those that are not there.

        With nothing known, the names as far as they can be told: without prefix, LyCORIS's with all their underscores.
        """
        bare = {module: bare_name(module) for module in self.keys}
        if not known:
            return bare
        dotless: dict[str, str] = {}
        for name in known:
            dotless.setdefault(name.replace(".", "_"), name)  # of two that read alike LyCORIS adapts the first
        told = {module: module if module in known else name for module, name in bare.items()}
        matched = {module: name if name in known else dotless.get(name) for module, name in told.items()}
        return {module: name for module, name in matched.items() if name is not None}

    def update(self, module: str) -> Update:
        """The update of one module. Raises ConfigError, naming it, for tensors that make none, and for DoRA."""
        tensors = {name: read_tensor(self._file, key) for name, key in self.keys[module].items()}
        if "alpha" not in tensors and "lora_down" in tensors:
            tensors |= self._peft_alpha(bare_name(module), tensors["lora_down"].shape[0])
        try:
            return lycoris_update(tensors)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {module} {error}") from None

    def _peft_alpha(self, name: str, rank: int) -> dict[str, NDArray[np.float64]]:
        """The alpha that PEFT's settings in the file give a module: none if they say nothing."""
        settings = self._settings
        patterns = settings.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        fits = (value for key, value in patterns.items() if f".{name}".endswith(f".{key.lstrip('^')}"))
        alpha = next(fits, settings.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            return {}
        # Rank-stabilised: alpha / sqrt(rank).
        return {"alpha": np.array(alpha * (sqrt(rank) if settings.get("use_rslora") else 1.0))}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """PEFT's settings for the denoiser; diffusers puts its component's name before each."""
        try:
            value = json.loads((self._file.metadata() or {}).get(METADATA, "{}"))
        except (ValueError, RecursionError):
            raise ConfigError(f"{self.path}: {METADATA} in it is not JSON; expected {WHAT}") from None
        settings = value if isinstance(value, dict) else {}
        of_denoiser = {key: inner for key, inner in settings.items() if not key.startswith(_TEXT)}
        return {re.sub(r"^(transformer|unet)\.", "", key): inner for key, inner in of_denoiser.items()}


def read_adapter(path: str | os.PathLike[str]) -> Saved:
    """Open an adapter file; of its tensors only the names are read.

    Raises ConfigError for what is no safetensors file, keys of no known algorithm, DoRA, and without any module.
    """
    path = Path(path)
    file = open_tensors(path, WHAT)
    keys: dict[str, dict[str, str]] = {}
    others = set()
    for key in file.keys():  # noqa: SIM118 - not a mapping
        module, tensor = _parted(key, path)
        if module.startswith(_TEXT):
            others.add(module)
        else:
            keys.setdefault(module, {})[tensor] = key
    if not keys:
        raise ConfigError(f"{path} has no module of a denoiser; expected {WHAT}")
    return Saved(path, dict(sorted(keys.items(), key=lambda item: natural(item[0]))), len(others), file)


def bare_name(module: str) -> str:
    """A module's name without the prefix of the file's format."""
    prefixes = _PREFIXES if "." in module else _UNDERSCORED
    prefix = next((prefix for prefix in prefixes if module.startswith(prefix)), "")
    return module.removeprefix(prefix)


def named_block(name: str) -> str:
    """The block that a name tells of, up to its first number: "transformer_blocks.0"; "" if it has none."""
    parts = re.match(r"(.*?)[._](\d+)(?=[._])", name)
    return f"{parts[1]}.{parts[2]}" if parts else ""


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """What to sort by, so that block 10 comes after block 2."""
    return tuple((word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d{0,18})", name))


def _parted(key: str, path: Path) -> tuple[str, str]:
    """(module, tensor as LyCORIS names it) of a key. Raises ConfigError if no known algorithm has it."""
    if _DORA.fullmatch(key):
        raise ConfigError(
            f"{path} has {key}: DoRA (weight decomposition) scales whole weights anew, which is no update beside them; "
            "only adapters without it can be shown"
        )
    if lycoris := _LYCORIS.fullmatch(key):
        return lycoris[1], lycoris[2].removesuffix(".weight")
    if peft := _PEFT.fullmatch(key):
        side = {"A": "down", "B": "up"}.get(peft[2] or "", peft[3] or peft[4])
        return peft[1], peft[5] or f"lora_{side}"
    raise ConfigError(f"{path} has {key!r:.120}, of no algorithm that is known; expected lokr, loha, locon or lora")
