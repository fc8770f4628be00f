"""Module tables and streams of architectures that are known by name or by their config.json.

They are built on the meta device by diffusers' own classes: no weights, no download. Where the class that SimpleTuner
trains instead has parts of other class names, the table has SimpleTuner's: a LyCORIS config can go by them. torch and
diffusers are imported inside the calls.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.probe.blocks import find_blocks, stream_blocks
from simpletuner_layerprobe.probe.families import DIFFUSERS, family
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.run.manifest import Module, Stream, Target

# Class names of diffusers' parts -> of the same parts in the class that SimpleTuner trains instead, 4.8 to 4.10.
TRAINED_AS: dict[str, dict[str, str]] = {
    "FluxTransformer2DModel": {"FluxAttention": "Attention"},
    "WanTransformer3DModel": {"WanAttention": "Attention"},
    "PixArtTransformer2DModel": {"BasicTransformerBlock": "PixArtSelfFlowTransformerBlock"},
}


@dataclass(frozen=True)
class Architecture:
    """A denoiser without its weights.

    family, flavour: SimpleTuner's names, "" if unknown. model_class: the denoiser's class. streams: the blocks that
    update each stream, targets: what a LoKr config covers in them; both () for a class that the probe does not know.
    modules: its module table.
    """

    family: str
    flavour: str
    model_class: str
    streams: tuple[Stream, ...]
    targets: tuple[Target, ...]
    modules: tuple[Module, ...]


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

    A path may be the file, or a folder that holds it or a `transformer` folder with it. Raises ModelError for
    what is neither, a file that is not such a config, and a class that diffusers does not have.
    """
    named = NAMED.get(str(name_or_path))
    if named is not None:
        return _architecture(named.model_class, named.config, named.flavour, str(name_or_path))
    path = _config_path(Path(name_or_path))
    config = read_object(path, "a diffusers transformer config.json")
    model_class = config.get("_class_name")
    if not isinstance(model_class, str):
        raise ModelError(f"{path} has no _class_name; expected a diffusers transformer config.json")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    return _architecture(model_class, settings, "", str(path))


def _config_path(path: Path) -> Path:
    candidates = (path, path / "config.json", path / "transformer" / "config.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelError(
        f"there is no architecture {str(path)!r}: it is neither one of {', '.join(NAMED)} "
        "nor a diffusers transformer config.json, nor a folder with one"
    )


def _architecture(model_class: str, config: dict[str, Any], flavour: str, where: str) -> Architecture:
    import diffusers
    import torch

    known: Any = getattr(diffusers, model_class, None)
    is_model = inspect.isclass(known) and issubclass(known, diffusers.ModelMixin)
    if not is_model:
        raise ModelError(
            f"{where} is of the class {model_class!r}; expected a model that diffusers {diffusers.__version__} has"
        )
    try:
        with torch.device("meta"):
            model = known.from_config(config)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"diffusers cannot build {model_class} from {where}: {said}") from error
    seams = DIFFUSERS.get(model_class)
    streams = stream_blocks(find_blocks(model, seams)) if seams else {}
    targets = family(seams.name, model_class).targets if seams else ()
    trained_as = TRAINED_AS.get(model_class, {})
    return Architecture(
        family=seams.name if seams else "",
        flavour=flavour,
        model_class=model_class,
        streams=tuple(Stream(name, blocks) for name, blocks in streams.items()),
        targets=tuple(Target(each.blocks, each.at_factor, each.at_double) for each in targets),
        modules=tuple(Module(name, trained_as.get(kind, kind), shape) for name, kind, shape in module_table(model)),
    )
