"""What a run's own config would train if it were no probe: kept in the run folder as training.json.

The file beside SimpleTuner's options, since these name a LyCORIS config by a path, and leave defaults out that differ
from model to model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.training.environment import OPTIONS_NAME, option, read_options

TRAINING_NAME = "training.json"
DEFAULTS: dict[str, object] = {
    "model_type": "full",
    "lora_type": "standard",
    "lora_rank": 16,
    "init_lora": None,
    "optimizer": "adamw_bf16",
    "mixed_precision": "bf16",
}
"""The options that say what is trained, and SimpleTuner's defaults."""


def own_training(asked: Callable[[str], Any], folders: tuple[Path, ...] = (Path(),)) -> dict[str, Any]:
    """What a config trains: DEFAULTS by name, with LyCORIS what its file holds as "lycoris_config".

    asked: the value of an option, None if it is not given. folders: where a relative path may begin.
    Raises ConfigError for a file that is not there, or that is no JSON object.
    """
    own = {name: default if asked(name) is None else asked(name) for name, default in DEFAULTS.items()}
    path = asked("lycoris_config")
    if own["model_type"] == "lora" and str(own["lora_type"]).lower() == "lycoris" and path:
        file = next(filter(Path.is_file, (folder / str(path) for folder in folders)), None)
        if file is None:
            raise ConfigError(f"there is no file {path}, its lycoris_config")
        own["lycoris_config"] = read_object(file, "a LyCORIS config")
    return own


def lora_targets(config: Any, model: Any) -> list[str] | None:
    """The names that PEFT's LoRA looks for at the end of modules' names, by SimpleTuner's model; None if unknown."""
    if config.model_type != "lora" or str(config.lora_type).lower() != "standard":
        return None
    try:
        targets = model.get_lora_target_layers()
    except (AttributeError, NotImplementedError, ValueError):  # which stops a training, and no probe
        return None
    return [str(target) for target in targets] if isinstance(targets, list | tuple) else None


def read_training(run_dir: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a run's own config would train, as `own_training` says it. Raises ConfigError if it is not known.

    A run from before training.json says it by its options; the path in them is looked for in the folders above the run,
    the innermost first, then in the working folder.
    """
    folder = Path(run_dir)
    kept = folder / TRAINING_NAME
    if kept.is_file() and not kept.is_symlink():
        return read_object(kept, "what the run's own config trains")
    if not os.path.lexists(folder / OPTIONS_NAME):
        raise ConfigError("the run has no SimpleTuner config beside it (an imported run has none)")
    options = read_options(folder)
    own = own_training(lambda name: option(options, name), (*folder.resolve().parents, Path()))
    targets = option(options, "peft_lora_target_modules")
    return own | ({"lora_target_modules": targets} if isinstance(targets, list) else {})
