"""Module tables and streams of architectures that are known by name or by their config.json.

They are built on the meta device by diffusers' own classes: no weights, no download. Where the class that SimpleTuner
trains instead has parts of other class names, the table has SimpleTuner's: a LyCORIS config can go by them. torch and
diffusers are imported inside the calls.
"""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.probe.families import Family, family, find_blocks, stream_blocks
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.run.manifest import Module, Stream

if TYPE_CHECKING:
    from torch import nn

NOT_IN_THE_NAMED = ("transformers", "peft", "torchao", "torchvision", "bitsandbytes", "scipy")
"""Packages that diffusers imports if they are there and that the models in NAMED do not use."""
FAMILY_OF_CLASS = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
# Class names of diffusers' parts -> of the same parts in SimpleTuner's own class of that name, 4.8 to 4.10.
TRAINED_AS: dict[str, dict[str, str]] = {"FluxTransformer2DModel": {"FluxAttention": "Attention"}}


@dataclass(frozen=True)
class Architecture:
    """A denoiser without its weights.

    family, flavour: SimpleTuner's names, "" if unknown. model_class: the denoiser's class. modules: its
    module table. streams: the blocks that update each stream, () for a family that the probe does not know.
    """

    family: str
    flavour: str
    model_class: str
    modules: tuple[Module, ...]
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class _Named:
    flavour: str
    model_class: str
    config: dict[str, Any]


# From the transformer/config.json that each model was published with.
_SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
NAMED = {
    "sd35-large": _Named("large", "SD3Transformer2DModel", _SD35 | _SD35_LARGE),
    "sd35-medium": _Named("medium", "SD3Transformer2DModel", _SD35 | _SD35_MEDIUM),
    "flux-dev": _Named("dev", "FluxTransformer2DModel", _FLUX_DEV),
}


def architecture(name_or_path: str | os.PathLike[str]) -> Architecture:
    """The architecture called so in NAMED, or that of a diffusers transformer config.json.

    A path may be the file, or a folder that holds it or a `transformer` folder with it. Raises ProbeError for
    what is neither, a file that is not such a config, and a class that diffusers does not have.
    """
    named = NAMED.get(str(name_or_path))
    if named is not None:
        return _architecture(named.model_class, named.config, named.flavour, str(name_or_path))
    path = _config_path(Path(name_or_path))
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not JSON ({error}); expected a diffusers transformer config.json") from None
    model_class = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(model_class, str):
        raise ProbeError(f"{path} has no _class_name; expected a diffusers transformer config.json")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return _architecture(model_class, settings, "", str(path))


def streams(model: nn.Module, family: Family) -> tuple[Stream, ...]:
    """The streams of a denoiser of this family with the blocks that update each, in the table's order.

    In SD3 the last block does not update the text; in Flux all blocks update both, the double blocks first.
    """
    return tuple(Stream(name, blocks) for name, blocks in stream_blocks(find_blocks(model, family)).items())


def _config_path(path: Path) -> Path:
    candidates = (path, path / "config.json", path / "transformer" / "config.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ProbeError(
        f"there is no architecture {str(path)!r}: it is neither one of {', '.join(NAMED)} "
        "nor a diffusers transformer config.json, nor a folder with one"
    )


def _architecture(model_class: str, config: dict[str, Any], flavour: str, where: str) -> Architecture:
    import diffusers
    import torch

    known: Any = getattr(diffusers, model_class, None)
    is_model = inspect.isclass(known) and issubclass(known, diffusers.ModelMixin)
    if not is_model:
        raise ProbeError(
            f"{where} is of the class {model_class!r}; expected a model that diffusers {diffusers.__version__} has"
        )
    try:
        with torch.device("meta"):
            model = known.from_config(config)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ProbeError(f"diffusers cannot build {model_class} from {where}: {said}") from error
    name = FAMILY_OF_CLASS.get(model_class, "")
    known_streams = streams(model, family(name, model_class)) if name else ()
    trained_as = TRAINED_AS.get(model_class, {})
    modules = tuple(replace(one, type=trained_as.get(one.type, one.type)) for one in module_table(model))
    return Architecture(name, flavour, model_class, modules, known_streams)
