"""Whether an adapter file comes from a LyCORIS config: module by module, the shapes that LyCORIS saves, and alpha."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import BESIDE_ADAPTER, read_object
from simpletuner_layerprobe.lokr.form import check_form, check_matching_ends
from simpletuner_layerprobe.lokr.network import tensors_on
from simpletuner_layerprobe.lokr.saved import WHAT, bare_name
from simpletuner_layerprobe.lokr.skeleton import skeleton
from simpletuner_layerprobe.lokr.weights import open_tensors, stored

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.groups import Model

Tensors = Mapping[str, tuple[int, ...]]

ALPHA = "alpha"
FULL = {"lokr_w1", "lokr_w2"}
"""The tensors of a LoKr module of full matrices, whose scale is 1 whatever its alpha."""
BF16_ROUNDING = 2.0**-8
"""SimpleTuner saves in the training's precision: an alpha of 100.3 is 100.5 in bf16."""


@dataclass(frozen=True)
class Origin:
    """The modules of a config and of an adapter file. missing: in the config alone; strange: in the file alone.

    different: in both, with the tensors that the config makes and those that the file has. alphas: in both with the
    same tensors, but another scale: alpha by the config and in the file.
    """

    same: tuple[str, ...]
    missing: tuple[str, ...]
    strange: tuple[str, ...]
    different: Mapping[str, tuple[Tensors, Tensors]]
    alphas: Mapping[str, tuple[float, float]]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.strange or self.different or self.alphas)


def origin(config: Mapping[str, Any] | str | os.PathLike[str], model: Model, path: str | os.PathLike[str]) -> Origin:
    """Compare what LyCORIS builds from a config, right or wrong, with the adapter file at `path`.

    Raises ConfigError for a config that is refused and for what is no safetensors file of LyCORIS's.
    """
    where = "the config"
    if isinstance(config, str | os.PathLike):
        config, where = read_object(config, "a LyCORIS config"), str(config)
    if not model.modules:
        raise ConfigError("the run has no module table (it was imported without --model); name the model with --model")
    check_form(config, where)
    check_matching_ends(config, model.modules, where)
    built = skeleton(model.modules, model.model_class)
    names = {id(module): name for name, module in built.named_modules()}
    prefix = (config.get("apply_preset") or {}).get("lora_prefix", "lycoris")
    made: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {}
    alpha_of: dict[str, float] = {}
    for saved, (module, tensors) in tensors_on(config, built).items():
        key, name = bare_name(f"lycoris_{saved.removeprefix(prefix).lstrip('_')}"), names[id(module)]
        made[key] = name, {tensor: tuple(value.shape) for tensor, value in tensors.items()}
        if ALPHA in tensors and not tensors.keys() >= FULL:
            alpha_of[key] = tensors[ALPHA].item()
    held, held_alpha = _held(Path(path), prefix)
    alike = [key for key, (_, tensors) in made.items() if held.get(key) == tensors]
    alphas = {
        made[key][0]: (alpha_of[key], held_alpha[key])
        for key in alike
        if key in alpha_of and not isclose(alpha_of[key], held_alpha[key], rel_tol=BF16_ROUNDING)
    }
    return Origin(
        same=tuple(name for name in (made[key][0] for key in alike) if name not in alphas),
        missing=tuple(name for key, (name, _) in made.items() if key not in held),
        strange=tuple(key for key in held if key not in made),
        different={
            name: (tensors, held[key]) for key, (name, tensors) in made.items() if held.get(key, tensors) != tensors
        },
        alphas=alphas,
    )


def _held(path: Path, prefix: str) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[str, float]]:
    """Module, without dots, -> the tensors of the file and their shapes; and -> its alpha."""
    file = open_tensors(path, WHAT)
    held: dict[str, dict[str, tuple[int, ...]]] = {}
    alphas: dict[str, float] = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        module, _, tensor = key.partition(".")
        if key.startswith(BESIDE_ADAPTER):
            continue
        if module in ("transformer", "unet", "base_model", "diffusion_model"):
            raise ConfigError(f"{path} is an adapter of PEFT's ({key}); no LyCORIS config makes one")
        bare = module.removeprefix(f"{prefix}_") if module.startswith(f"{prefix}_") else bare_name(module)
        shape = tuple(stored(file, key).get_shape())
        held.setdefault(bare, {})[tensor] = shape
        if tensor == ALPHA and not shape:
            alphas[bare] = float(file.get_tensor(key))
    return held, alphas
