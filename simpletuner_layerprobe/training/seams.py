"""What the probe needs of SimpleTuner's Trainer, and whether a SimpleTuner has it. Imports no torch."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path

# Method of Trainer -> its parameters. All of them must be there as named, or the flag refuses to run.
SEAMS = {
    "__init__": ("self", "config", "disable_accelerator", "job_id", "exit_on_error"),
    "parse_arguments": ("self", "args", "disable_accelerator", "exit_on_error"),
    "init_trainable_peft_adapter": ("self",),
    "init_optimizer": ("self",),
    "init_trackers": ("self",),
    "init_prepare_models": ("self", "lr_scheduler"),
    "_compute_model_prediction_loss": ("self", "prepared_batch"),
    "_get_trainable_parameters": ("self",),
    "_any_rank_reached_epoch_end": ("self", "reached_epoch_end"),
    "checkpoint_state_save": ("self", "output_dir", "suffix"),
    "train": ("self",),
    "cleanup": ("self",),
}


def missing_seams(trainer_class: type) -> list[str]:
    """What a Trainer class lacks of SEAMS, one plain line each; [] if nothing."""

    def parameters(name: str) -> tuple[str, ...] | None:
        method = getattr(trainer_class, name, None)
        return None if method is None else tuple(inspect.signature(method).parameters)

    return _missing(parameters)


def missing_seams_in_source(path: Path) -> list[str]:
    """The same from the source file of `simpletuner.helpers.training.trainer`, without importing it."""
    parameters: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    arguments = method.args
                    parameters[method.name] = tuple(
                        argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                    )
    return _missing(parameters.get)


def _missing(parameters: Callable[[str], tuple[str, ...] | None]) -> list[str]:
    lines = []
    for name, expected in SEAMS.items():
        actual = parameters(name)
        if actual is None:
            lines.append(f"Trainer.{name} is missing")
        elif actual != expected:
            lines.append(f"Trainer.{name} takes ({', '.join(actual)}), expected ({', '.join(expected)})")
    return lines


def simpletuner_version() -> str:
    try:
        return importlib.metadata.version("simpletuner")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
