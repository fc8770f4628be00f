"""The probe's options: what they are called, what they mean, what they may be."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from simpletuner_layerprobe import ProbeError

SIGMA_MODES = ("uniform", "stratified", "training")


@dataclass(frozen=True)
class Option:
    """One SimpleTuner option. `kind` is the name of SimpleTuner's FieldType."""

    name: str
    label: str
    kind: str
    default: object
    help: str
    choices: tuple[tuple[str, str], ...] = ()


OPTIONS = (
    Option(
        "layerprobe",
        "Probe-only run",
        "CHECKBOX",
        False,
        "Run a probe-only epoch: log how far each transformer block turns the hidden states, and train nothing. "
        "No weights, checkpoints or validation images are made.",
    ),
    Option(
        "layerprobe_dir",
        "Probe run folder",
        "TEXT",
        None,
        "Folder that the probe writes to. Default: the folder 'layerprobe' inside output_dir. "
        "A run that is started again with the same settings goes on in the same folder.",
    ),
    Option(
        "layerprobe_sigmas",
        "Probe noise levels",
        "SELECT",
        "uniform",
        "uniform: each sample draws its sigma evenly from 0 to 1, without schedule shift. stratified: as even, but "
        "consecutive samples fill equal strata, so that fewer samples are needed. training: your own noise schedule.",
        (
            ("uniform", "Uniform over [0, 1]"),
            ("stratified", "Stratified over [0, 1]"),
            ("training", "This config's own noise schedule"),
        ),
    ),
    Option(
        "layerprobe_samples",
        "Probe samples",
        "NUMBER",
        0,
        "Stop after so many samples in all, over all GPUs and earlier starts of the same run. "
        "0: num_train_epochs or max_train_steps decide.",
    ),
    Option(
        "layerprobe_discover",
        "Probe unknown model families",
        "CHECKBOX",
        False,
        "For a model family that the probe does not know: guess its blocks and record their image stream. Text tokens "
        "that share a sequence with the image count as image. Without this option such a family is refused.",
    ),
    Option(
        "layerprobe_flush_seconds",
        "Probe flush interval (seconds)",
        "NUMBER",
        30.0,
        "Write the samples recorded so far to disk every so many seconds. A crash loses at most these.",
    ),
)


@dataclass(frozen=True)
class ProbeSettings:
    """The checked options of one probe-only run.

    directory: the run folder. sigmas: one of SIGMA_MODES. samples: total number of samples of the run, 0 if the
    epochs or max_train_steps decide. flush_seconds: seconds between two writes, above 0. discover: whether to guess
    the blocks of an unknown model family.
    """

    directory: str
    sigmas: str = "uniform"
    samples: int = 0
    flush_seconds: float = 30.0
    discover: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ProbeSettings | None:
        """Read SimpleTuner's parsed options. None if the run is not a probe-only run. Raises ProbeError."""
        if not config.layerprobe:
            return None
        directory = config.layerprobe_dir or os.path.join(config.output_dir, "layerprobe")
        return cls(
            directory=os.path.expanduser(str(directory)),
            sigmas=_choice("layerprobe_sigmas", config.layerprobe_sigmas),
            samples=_whole_number("layerprobe_samples", config.layerprobe_samples),
            flush_seconds=_seconds("layerprobe_flush_seconds", config.layerprobe_flush_seconds),
            discover=bool(config.layerprobe_discover),
        )


def _choice(name: str, value: object) -> str:
    if value not in SIGMA_MODES:
        raise ProbeError(f"{name} is {value!r}; it must be one of {', '.join(SIGMA_MODES)}")
    return str(value)


def _whole_number(name: str, value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ProbeError(f"{name} is {value!r}; it must be a whole number, 0 or more") from None
    if not (number >= 0 and number.is_integer()):
        raise ProbeError(f"{name} is {value}; it must be a whole number, 0 or more")
    return int(number)


def _seconds(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ProbeError(f"{name} is {value!r}; it must be a number of seconds above 0") from None
    if not 0 < number < float("inf"):
        raise ProbeError(f"{name} is {value}; it must be a number of seconds above 0")
    return number


def register_options(registry_module: Any) -> None:
    """Add the options to SimpleTuner's field registry: its argument parser and its WebUI read them from there.

    `registry_module` is `simpletuner.simpletuner_sdk.server.services.field_registry.registry`. Values are checked
    by ProbeSettings and not by argparse, so that a wrong one gives one line instead of a traceback; the WebUI
    still offers the choices (`dynamic_choices` keeps them out of the parser).
    """
    types = sys.modules[registry_module.__package__ + ".types"]
    for order, option in enumerate(OPTIONS):
        field = types.ConfigField(
            name=option.name,
            arg_name=f"--{option.name}",
            ui_label=option.label,
            field_type=types.FieldType[option.kind],
            tab="training",
            section="layer_probe",
            default_value=option.default,
            choices=[{"value": value, "label": label} for value, label in option.choices] or None,
            dynamic_choices=bool(option.choices),
            help_text=option.help,
            tooltip=option.help,
            importance=types.ImportanceLevel.ADVANCED,
            parser_type=None if option.kind == "CHECKBOX" else types.ParserType.STRING,
            order=order + 1,
        )
        registry_module.field_registry._add_field(field)
