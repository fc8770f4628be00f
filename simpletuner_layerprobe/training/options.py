"""The probe's options: what they are called, what they mean, what they may be."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.run.manifest import FOLDER_NAME

SIGMA_MODES = ("uniform", "stratified", "training")
ABLATION_MODES = ("none", "blocks", "text", "both")
GUARD_MODES = ("off", "warn", "stop")
AUTO = "auto"
RECOMMENDED_SAMPLES = 600
MOST_SAMPLES = 2_000
"""What `auto` means for a run that ends by itself when it is settled."""


@dataclass(frozen=True)
class Option:
    """One SimpleTuner option.

    kind: the name of SimpleTuner's FieldType. step: what a number's arrows add in the WebUI, which marks other values
    than its multiples as wrong. placeholder: what an empty text field shows.
    """

    name: str
    label: str
    kind: str
    default: object
    help: str
    choices: tuple[tuple[str, str], ...] = ()
    step: float | None = None
    placeholder: str = ""


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
        placeholder="{output_dir}/layerprobe",
    ),
    Option(
        "layerprobe_sigmas",
        "Probe noise levels",
        "SELECT",
        "stratified",
        "stratified: evenly from 0 to 1, without schedule shift, and consecutive samples fill equal strata, so that "
        "fewer samples are needed. uniform: as even, but each sample by itself. training: your own noise schedule.",
        (
            ("uniform", "Uniform over [0, 1]"),
            ("stratified", "Stratified over [0, 1]"),
            ("training", "This config's own noise schedule"),
        ),
    ),
    Option(
        "layerprobe_noise_seed",
        "Probe noise seed",
        "TEXT",
        "none",
        "A whole number that fixes sigma, noise and caption of every image and each of its repeats, whatever ran "
        "before, so that two runs of the same images with one seed are paired sample by sample. Needs a "
        "caption_dropout_probability of 0. none: every run draws its own.",
        placeholder="none",
    ),
    Option(
        "layerprobe_adapter",
        "Adapter to probe",
        "TEXT",
        "none",
        "A finished adapter, a safetensors file that SimpleTuner saved: it is put on the base, and what is recorded is "
        "the adapted model. lora_type and lycoris_config must be those that it was trained with. none: the base alone.",
        placeholder="none",
    ),
    Option(
        "layerprobe_samples",
        "Probe samples",
        "TEXT",
        AUTO,
        "Stop after so many samples in all, over all GPUs and earlier starts of the same run; images come back until "
        f"there are as many. {AUTO}: {RECOMMENDED_SAMPLES}, with layerprobe_stop_when_stable at most {MOST_SAMPLES:,}. "
        "0: num_train_epochs or max_train_steps decide.",
        placeholder=AUTO,
    ),
    Option(
        "layerprobe_stop_when_stable",
        "Stop the probe when settled",
        "NUMBER",
        0.0,
        "Stop as soon as other images like these would very likely give the same factors: when every factor of the "
        "preset in layerprobe_preset is agreed by this share of bootstrap replicates, such as 0.95. Judged now and "
        "then, at about a hundredth of the run's time. 0: do not.",
        step=0.01,
    ),
    Option(
        "layerprobe_preset",
        "Preset to settle",
        "TEXT",
        "article",
        "Whose factors layerprobe_stop_when_stable waits for: article, or the weighted plan for a budget, as a number "
        "of trainable parameters such as 400M or a size in bf16 such as 800MB.",
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
        "layerprobe_residual",
        "Probe block updates too",
        "CHECKBOX",
        False,
        "Also record what each block adds to the hidden states: the relative length of the update, "
        "|after - before| / |before|, and the cosine of its angle to the state before.",
    ),
    Option(
        "layerprobe_block_pairs",
        "Probe several blocks in a row",
        "NUMBER",
        0,
        "Also record the angular distance over 2, 3 ... so many blocks in a row. Keeps so many hidden states of each "
        "stream on the device, and takes longer the larger it is. 0: do not.",
        step=1,
    ),
    Option(
        "layerprobe_ablation",
        "Leave blocks out",
        "SELECT",
        "none",
        "For some samples, also run the forward again with one block left out, for every block, and log how much the "
        "sample's loss rises. blocks: with all that the block does. text: only with what it does to the text stream.",
        (
            ("none", "Do not"),
            ("blocks", "Whole blocks"),
            ("text", "Their updates of the text stream"),
            ("both", "Both, one after the other"),
        ),
    ),
    Option(
        "layerprobe_ablation_samples",
        "Samples with blocks left out",
        "NUMBER",
        200,
        "How many of the run's samples get that, spread evenly over the noise levels and the images. Each takes about "
        "half as many forwards as the model has blocks.",
        step=1,
    ),
    Option(
        "layerprobe_flush_seconds",
        "Probe flush interval (seconds)",
        "NUMBER",
        30.0,
        "Write the samples recorded so far to disk every so many seconds. A crash loses at most these.",
        step=0.1,
    ),
    Option(
        "layerprobe_guard",
        "Guard of adapters",
        "SELECT",
        "warn",
        "For a normal training of a LoRA or LyCORIS adapter: compare what was really built with its config before the "
        "first step, and when it resumes with the checkpoint's adapter. warn: say it. stop: end the training if "
        "something is not as written.",
        (("off", "Do not look"), ("warn", "Say what is otherwise"), ("stop", "Stop if anything is otherwise")),
    ),
)


@dataclass(frozen=True)
class ProbeSettings:
    """The checked options of one probe-only run.

    directory: the run folder. sigmas: one of SIGMA_MODES. noise_seed: what fixes sigma and noise of every repeat of an
    image, below 2^63, None for nothing; never with the sigmas of a training. samples: total number of samples of the
    run, 0 if the epochs or max_train_steps decide. flush_seconds: seconds between two writes, above 0. discover:
    whether to guess the blocks of an unknown model family. stop_when_stable: share of bootstrap replicates, below 1,
    that must agree with every factor for the run to end by itself, 0 if it does not. preset: whose factors these are,
    as the user wrote it (plugin.py reads it). residual: whether to record the blocks' updates. block_pairs: the most
    blocks in a row whose distance is recorded, 0 or 1 for single blocks alone. ablation: one of ABLATION_MODES, what is
    left out; ablation_samples: in how many of the run's samples, 1 or more. adapter: the safetensors file of an adapter
    that is put on the base, "" for none.
    """

    directory: str
    sigmas: str = "stratified"
    samples: int = RECOMMENDED_SAMPLES
    flush_seconds: float = 30.0
    discover: bool = False
    stop_when_stable: float = 0.0
    preset: str = "article"
    residual: bool = False
    block_pairs: int = 0
    ablation: str = "none"
    ablation_samples: int = 200
    noise_seed: int | None = None
    adapter: str = ""

    @property
    def sigma_text(self) -> str:
        """How sigmas are drawn, as the manifest says it."""
        in_image = self.noise_seed is not None and self.sigmas == "stratified"
        return "stratified in each image" if in_image else self.sigmas

    @classmethod
    def from_config(cls, config: Any) -> ProbeSettings | None:
        """Read SimpleTuner's parsed options. None if the run is not a probe-only run. Raises ConfigError."""
        if not config.layerprobe:
            return None
        directory = config.layerprobe_dir or os.path.join(config.output_dir, FOLDER_NAME)
        stop_when_stable = _share("layerprobe_stop_when_stable", config.layerprobe_stop_when_stable)
        return cls(
            directory=os.path.expanduser(str(directory)),
            sigmas=_choice("layerprobe_sigmas", config.layerprobe_sigmas, SIGMA_MODES),
            samples=_samples(config.layerprobe_samples, MOST_SAMPLES if stop_when_stable else RECOMMENDED_SAMPLES),
            flush_seconds=_seconds("layerprobe_flush_seconds", config.layerprobe_flush_seconds),
            discover=bool(config.layerprobe_discover),
            stop_when_stable=stop_when_stable,
            preset="article" if config.layerprobe_preset is None else str(config.layerprobe_preset),
            residual=bool(config.layerprobe_residual),
            block_pairs=_whole_number("layerprobe_block_pairs", config.layerprobe_block_pairs),
            ablation=_choice("layerprobe_ablation", config.layerprobe_ablation, ABLATION_MODES),
            ablation_samples=_whole_number("layerprobe_ablation_samples", config.layerprobe_ablation_samples, 1),
            adapter=_file(config.layerprobe_adapter),
            noise_seed=_noise_seed(config.layerprobe_noise_seed, config.layerprobe_sigmas),
        )


def guard_mode(config: Any) -> str:
    """What layerprobe_guard is: one of GUARD_MODES. Raises ConfigError."""
    return _choice("layerprobe_guard", config.layerprobe_guard, GUARD_MODES)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    return str(value)


def _whole_number(name: str, value: Any, least: int = 0) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more") from None
    if not (number >= least and number.is_integer()):
        raise ConfigError(f"{name} is {value}; it must be a whole number, {least} or more")
    return int(number)


def _samples(value: Any, recommended: int) -> int:
    if str(value).strip().lower() in ("", AUTO):
        return recommended
    try:
        return _whole_number("layerprobe_samples", value)
    except ConfigError as error:
        raise ConfigError(f"{error}, or {AUTO}") from None


def _file(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "none" else os.path.expanduser(text)


def _noise_seed(value: Any, sigmas: str) -> int | None:
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "none"):
        return None
    if not (text.isascii() and text.isdigit() and int(text[:20]) < 2**63 and len(text) < 20):
        raise ConfigError(f"layerprobe_noise_seed is {value!r:.40}; it must be a whole number, from 0 to 2^63 - 1")
    if sigmas == "training":
        raise ConfigError(
            "layerprobe_noise_seed fixes the noise levels, and layerprobe_sigmas is 'training', which draws them anew; "
            "set layerprobe_sigmas to 'uniform' or 'stratified'"
        )
    return int(text)


def _share(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not (number == 0 or 0.5 <= number < 1):
        raise ConfigError(f"{name} is {value!r}; it must be 0, or a share from 0.5 to below 1 such as 0.95")
    return number


def _seconds(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be a number of seconds above 0") from None
    if not 0 < number < float("inf"):
        raise ConfigError(f"{name} is {value}; it must be a number of seconds above 0")
    return number


def register_options(registry_module: Any) -> None:
    """Add the options to SimpleTuner's field registry: its argument parser and its WebUI read them from there.

    `registry_module` is `simpletuner.simpletuner_sdk.server.services.field_registry.registry`. Values are checked
    by ProbeSettings and not by argparse, so that a wrong one gives one line instead of a traceback; the WebUI shows
    the choices, and `given` takes them out of the parser.
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
            help_text=option.help,
            tooltip=option.help,
            placeholder=option.placeholder,
            step=option.step,
            importance=types.ImportanceLevel.ADVANCED,
            parser_type=None if option.kind == "CHECKBOX" else types.ParserType.STRING,
            order=order + 1,
        )
        registry_module.field_registry._add_field(field)
