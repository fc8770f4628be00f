"""The size of what a run's own config trains, to which plans are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import LORA, planned_adapter
from simpletuner_layerprobe.lokr.groups import Model, layer_kind

INSTEAD = "give --params N, the path of a LyCORIS config as --params, or --preset article"


@dataclass(frozen=True)
class Own:
    """What a run's own config trains: `training` as training/own.py says it, on a model.

    problem: why it is not known, "" if it is.
    """

    model: Model = field(repr=False)
    training: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @cached_property
    def parameters(self) -> int:
        """Its trainable numbers: what the probe has counted, else, for a LyCORIS config, as LyCORIS builds it.

        Raises ConfigError if they are unknown.
        """
        problem, count = self.problem, 0
        if not problem and self.training.get("init_lora"):
            problem = "it goes on from the adapter in init_lora, whose size is that file's"
        elif not problem and self.training.get("model_type") != "lora":
            problem = "it trains the whole model"
        elif not problem:
            problem, count = self._counted()
        if problem:
            raise ConfigError(f"the size of what the run's own config trains is not known: {problem}; {INSTEAD}")
        return count

    @property
    def known_parameters(self) -> int | None:
        """`parameters`, None if they are unknown."""
        try:
            return self.parameters
        except ConfigError:
            return None

    def _counted(self) -> tuple[str, int]:
        """What is in the way, "" if nothing is, and the number."""
        if count := whole_number(self.training.get("parameters")):
            return "", count
        if str(self.training.get("lora_type")).lower() == "lycoris":
            from simpletuner_layerprobe.lokr.proof import check_config

            config = self.training.get("lycoris_config")
            if not isinstance(config, dict):
                return "it names no lycoris_config", 0
            try:
                count = check_config(config, self.model, where="its lycoris_config").parameters
            except ConfigError as error:
                return str(error), 0
        else:
            targets = self.training.get("lora_target_modules")
            if not isinstance(targets, list):
                return "its LoRA's target modules are the model's defaults, which this run did not keep", 0
            count = lora_parameters(self.model, targets, self.training.get("lora_rank"))
        return ("" if count else "it gives no module of this model an adapter"), count


def lora_parameters(model: Model, targets: list[Any], rank: Any) -> int:
    """The trainable numbers of PEFT's LoRA on the linear and convolution layers whose names end with a target."""
    if not whole_number(rank):
        return 0
    ends = tuple(f".{target}" for target in targets)
    adapted = [m for m in model.modules if f".{m.name}".endswith(ends) and layer_kind(m) in ("linear", "conv")]
    return sum(rank * planned_adapter(LORA, module.shape, 1).parameters for module in adapted)


def whole_number(value: Any) -> int:
    """A whole number from 1 in what was read from a file; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
