"""What the training of an adapter holds in memory for it: its weights, their gradients, the optimizer's states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DTYPE_BYTES = {"bf16": 2, "fp16": 2}
STATES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("torch-adam", "torch-adamw", "torch-radam", "torch-nadam", "torch-adadelta"), (4, 8)),
    **dict.fromkeys(("torch-adamax", "sdnq-adamw+no_quant"), (4, 8)),
    **dict.fromkeys(("torch-rmsprop", "torch-adagrad", "torch-asgd", "muon"), (2, 4)),
    **dict.fromkeys(("torch-sgd", "torch-adafactor", "sdnq-adafactor"), (0, 0)),
    "adamw_bf16": (6, 6),
    **dict.fromkeys(("adamw_schedulefree", "adamw_schedulefree+aggressive"), (6, 12)),
    **dict.fromkeys(("optimi-adam", "optimi-adamw", "optimi-stableadamw", "optimi-radam"), (6, 8)),
    "optimi-lion": (4, 4),
    "optimi-ranger": (8, 12),
    "optimi-adan": (10, 16),
    "optimi-sgd": (2, 0),
    "prodigy": (2.4, 4.4),
    **dict.fromkeys(("ao-adamw8bit", "ao-adamfp8", "ao-adamwfp8"), (2, 2)),
    "ao-adamw4bit": (1, 1),
    "sdnq-adamw": (2.5, 2.5),
    **dict.fromkeys(("sdnq-lion", "sdnq-muon+quantized_matmul"), (1.25, 1.25)),
    **dict.fromkeys(("bnb-adam", "bnb-adamw", "bnb-adamw-paged"), (8, 8)),
    **dict.fromkeys(("bnb-adam8bit", "bnb-adamw8bit", "bnb-adamw8bit-paged"), (2, 2)),
    **dict.fromkeys(("bnb-lion", "bnb-lion-paged", "bnb-adagrad"), (4, 4)),
    **dict.fromkeys(("bnb-lion8bit", "bnb-lion8bit-paged", "bnb-adagrad8bit"), (1, 1)),
    **dict.fromkeys(("bnb-ademamix", "bnb-ademamix-paged"), (12, 12)),
    **dict.fromkeys(("bnb-ademamix8bit", "bnb-ademamix8bit-paged"), (3, 3)),
}
"""What SimpleTuner's optimizers keep: bytes for each parameter in 16 and in 32 bits.

A test measures them on SimpleTuner's own classes and settings, with a matrix; bitsandbytes, which needs a GPU, by its
source. SOAP's depend on the shapes.
"""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in the training's precision. optimizer: its name; states: what it keeps, None if that is not known."""

    weights: int
    gradients: int
    optimizer: str
    states: int | None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + (self.states or 0)


def training_memory(parameters: int, training: Mapping[str, Any]) -> TrainingMemory:
    """Of so many trainable parameters with the optimizer and the precision of a config (training/own.py).

    Without activations, and without what a step needs for a moment. SimpleTuner keeps adapters in mixed_precision.
    """
    size = _DTYPE_BYTES.get(str(training.get("mixed_precision")), 4)
    name = str(training.get("optimizer"))
    kept = STATES.get(name)
    states = None if kept is None else round(parameters * kept[size > 2])
    return TrainingMemory(parameters * size, parameters * size, name, states)
