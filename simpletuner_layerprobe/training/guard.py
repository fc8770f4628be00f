"""The adapter of a normal training beside its config, before the first step: what SimpleTuner has really made of it.

The training half looks, and knows nothing of plans: what the looks mean is asked of the verdicts that plugin.py brings.
Nothing of the training is changed, its random numbers neither, and an error in here ends no training.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import ADAPTER_NAME, BESIDE_ADAPTER
from simpletuner_layerprobe.probe.modules import module_table, norm_widths
from simpletuner_layerprobe.probe.wrappers import named_modules, unwrapped
from simpletuner_layerprobe.run.manifest import Module
from simpletuner_layerprobe.training.adapter import ADAPTER, BF16_ROUNDING, differences, header


@dataclass(frozen=True)
class Base:
    """The denoiser before it got its adapter: what a check needs of a model."""

    model_class: str
    modules: tuple[Module, ...]
    streams: tuple[()] = ()
    targets: tuple[()] = ()

    @classmethod
    def of(cls, denoiser: nn.Module) -> Base:
        widths = norm_widths(denoiser)
        modules = tuple(Module(*row, widths.get(row[0], 0)) for row in module_table(denoiser))
        return cls(type(unwrapped(denoiser)).__name__, modules)


class Verdict(Protocol):
    """lines: for the user. wrong: what is otherwise than written, "" if nothing is."""

    @property
    def lines(self) -> tuple[str, ...]: ...
    @property
    def wrong(self) -> str: ...


class Verdicts(Protocol):
    """Of lokr/guard.py, which has their words."""

    def lycoris_verdict(
        self, config: Mapping[str, Any], where: str, model: Any, loras: Mapping[str, Any]
    ) -> Verdict: ...

    def lora_verdict(
        self, ranks: Mapping[str, int], parameters: int, asked: int | None, held: Mapping[str, int], idle: Sequence[str]
    ) -> Verdict: ...


def guarded(trainer: Any, mode: str, verdicts: Callable[[], Verdicts], make: Callable[[], None]) -> None:
    """`make`, SimpleTuner's making of the adapter, and then a look at it: printed by the main process.

    mode: one of options.GUARD_MODES. Raises ConfigError where mode is "stop" and something is not as it is written.
    """
    if mode == "off" or "lora" not in str(trainer.config.model_type):
        make()
        return
    base = None
    with _forgiving(trainer):
        base = Base.of(trainer.model.get_trained_component())
    make()
    wrong: list[str] = []
    if base is not None:
        with _forgiving(trainer), random_numbers_kept():
            verdict = _look(trainer, base, verdicts())
            _say(trainer, verdict.lines)
            wrong += [verdict.wrong] if verdict.wrong else []
    with _forgiving(trainer):
        lost = _resumed(trainer)
        _say(trainer, lost)
        wrong += lost
    if wrong and mode == "stop":
        raise ConfigError(
            f"layerprobe_guard stops this training before its first step, it is not as its config says: {wrong[0]}; "
            "mend the config, or set layerprobe_guard to warn"
        )


def _say(trainer: Any, lines: Sequence[str]) -> None:
    if trainer.accelerator.is_main_process:
        for line in lines:
            print(f"layerprobe: guard: {line}", flush=True)


@contextmanager
def _forgiving(trainer: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is: a training is worth more than a look at it
        _say(trainer, [f"could not look at this training, which goes on: {type(error).__name__}: {error}"])


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """LyCORIS draws the first values of what is built for comparison: nothing on a device, and these are put back."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


def _look(trainer: Any, base: Base, verdicts: Verdicts) -> Verdict:
    config, denoiser = trainer.config, trainer.model.get_trained_component()
    if str(config.lora_type).lower() == "lycoris":
        with open(config.lycoris_config) as file:  # as SimpleTuner reads it
            written = json.load(file)
        names = {id(module): name for name, module in named_modules(denoiser)}
        network = trainer.accelerator._lycoris_wrapped_network
        loras = {names[id(lora.org_module[0])]: lora for lora in network.loras}
        where = Path(config.lycoris_config)
        short = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
        return verdicts.lycoris_verdict(written, str(short), base, loras)
    layers: dict[str, Any] = {name: layer for name, layer in named_modules(denoiser) if ADAPTER in _ranks(layer)}
    parameters = sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)
    targets = trainer.model.lora_config.target_modules if getattr(config, "peft_lora_target_modules", None) else ()
    names_of_model = [module.name for module in base.modules]
    idle = [
        target
        for target in sorted(() if isinstance(targets, str) else targets or ())
        if not any(f".{name}".endswith(f".{target}") for name in names_of_model)
    ]
    ranks = {name: int(layer.r[ADAPTER]) for name, layer in layers.items()}
    held = _held(config.init_lora, f"{trainer.model.MODEL_TYPE.value}.")
    asked = None if config.init_lora and not held else int(config.lora_rank)
    return verdicts.lora_verdict(ranks, parameters, asked, held, idle)


def _ranks(layer: Any) -> Mapping[str, int]:
    ranks = getattr(layer, "r", None)
    return ranks if isinstance(ranks, dict) else {}


def _held(init_lora: Any, prefix: str) -> dict[str, int]:
    """Name of a module -> its rank in the file of init_lora: the rows of each matrix that leads down.

    Nothing for a file with the names of other programs, which SimpleTuner renames.
    """
    if not init_lora or not Path(str(init_lora)).is_file():
        return {}
    held = {}
    for key, shape in header(Path(str(init_lora)))[0].items():
        name, _, part = key.partition(".lora_")
        if key.startswith(prefix) and part in ("A.weight", "down.weight"):
            held[name.removeprefix(prefix)] = shape[0]
    return held


def _resumed(trainer: Any) -> list[str]:
    """How the adapter that a checkpoint holds differs from the one that was made, before SimpleTuner loads it."""
    path = _checkpoint(trainer.config)
    if path is None:
        return []
    shapes = {key: shape for key, shape in header(path)[0].items() if not key.startswith(BESIDE_ADAPTER)}
    other_alphas = []
    if str(trainer.config.lora_type).lower() == "lycoris":
        network = trainer.accelerator._lycoris_wrapped_network
        made = {name: tuple(each.shape) for name, each in network.state_dict().items()}
        other_alphas = _other_alphas(network, path)
    else:
        prefix = f"{trainer.model.MODEL_TYPE.value}."
        if not all(key.startswith(prefix) for key in shapes):
            return []  # as other programs name them: SimpleTuner renames them when it loads
        marked = f".{ADAPTER}"
        parameters = trainer.model.get_trained_component().named_parameters()
        made = {prefix + name.replace(marked, ""): tuple(each.shape) for name, each in parameters if ".lora_" in name}
    return [f"it would resume from {path}, and {problem}" for problem in differences(made, shapes) + other_alphas]


def _other_alphas(network: Any, path: Path) -> list[str]:
    """What loads without a word: LyCORIS takes alpha from the file, and goes on with the scale that it was made with.

    Full matrices of LoKr's have the scale 1 whatever their alpha.
    """
    scaled = {f"{lora.lora_name}.alpha": lora for lora in network.loras if hasattr(lora, "alpha")}
    with safe_open(path, "pt") as opened:
        other = {
            key: (float(opened.get_tensor(key)), float(lora.alpha))
            for key, lora in scaled.items()
            if key in opened.keys()  # noqa: SIM118 - not a mapping
            and not (getattr(lora, "use_w1", False) and getattr(lora, "use_w2", False))
        }
    other = {key: pair for key, pair in other.items() if not math.isclose(*pair, rel_tol=BF16_ROUNDING)}
    if not other:
        return []
    key, (held, here) = next(iter(other.items()))
    return [f"{len(other)} have another alpha, such as {key}: {held:g} in the file, {here:g} here, which scales it"]


def _checkpoint(config: Any) -> Path | None:
    """The adapter file that this training resumes from; None if it begins anew, or from what is not here."""
    wanted = str(config.resume_from_checkpoint or "")
    folder = Path(str(config.output_dir))
    if wanted == "latest":
        found = [path for path in folder.glob("checkpoint-*") if not path.name.endswith("tmp")]
        wanted = max(found, key=lambda path: int(path.name.split("-")[1])).name if found else ""
    path = folder / Path(wanted).name / ADAPTER_NAME
    return path if wanted and path.is_file() else None
