"""Turns SimpleTuner's Trainer into a probe-only one: the only file that names Trainer internals.

`install` wraps the methods in SEAMS once, when SimpleTuner's trainer module was imported. Without the flag
every wrapper passes straight through. With it, SimpleTuner's own loop, dataloaders, batch preparation and noise
run as always; the forward runs without autograd under an Observer, and the place of the backward pass is taken
by keeping the distances.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import ProbeError, SeamError
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.blocks import discover
from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.probe.wrappers import unwrapped
from simpletuner_layerprobe.training import adapter, cpu, given, guard, loop, overrides, own, signals
from simpletuner_layerprobe.training.options import ProbeSettings, guard_mode
from simpletuner_layerprobe.training.seams import SEAMS, missing_seams, simpletuner_version
from simpletuner_layerprobe.training.session import OwnParameters, Session, Watcher

logger = logging.getLogger("SimpleTuner")

# What of the training config decides the recorded numbers: a run goes on only if these are the same.
RUN_SETTINGS = (
    "model_flavour",
    "base_model_precision",
    "mixed_precision",
    "resolution",
    "resolution_type",
    "caption_dropout_probability",
)

WatchersOf = Callable[[ProbeSettings, Callable[[], Sequence[Any]], Callable[[], int]], Sequence[Watcher]]
"""(settings, the trackers of the run, its step) -> who looks at the run while it is recorded."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
WRAPPERS: dict[str, Wrapper] = {}


def install(
    module: Any, watchers_of: WatchersOf, verdicts: Callable[[], guard.Verdicts], own_parameters: OwnParameters
) -> None:
    """Wrap the Trainer of `simpletuner.helpers.training.trainer`. If a seam is missing, only refuse the flag.

    verdicts: gives what the guard of normal trainings asks. own_parameters: counts what a config trains.
    """
    sys.excepthook = one_line_errors(sys.excepthook)
    cpu.install_pin_memory_fallback()
    trainer_class = module.Trainer
    trainer_class.layerprobe_watchers_of = staticmethod(watchers_of)
    trainer_class.layerprobe_verdicts = staticmethod(verdicts)
    trainer_class.layerprobe_own_parameters = staticmethod(own_parameters)
    missing = missing_seams(trainer_class)
    if missing:
        trainer_class.__init__ = _refusing(trainer_class.__init__, missing)
        return
    for name, wrapper in WRAPPERS.items():
        setattr(trainer_class, name, wrapper(getattr(trainer_class, name)))


def uninstall(module: Any) -> None:
    """Take the wrappers off again."""
    trainer_class = module.Trainer
    for name in SEAMS:
        method = getattr(trainer_class, name, None)
        if method is not None and getattr(method, "layerprobe", False):
            setattr(trainer_class, name, method.__wrapped__)
    del trainer_class.layerprobe_watchers_of, trainer_class.layerprobe_verdicts
    del trainer_class.layerprobe_own_parameters
    if getattr(sys.excepthook, "layerprobe", False):
        sys.excepthook = vars(sys.excepthook)["__wrapped__"]
    cpu.uninstall_pin_memory_fallback()


def _refusing(original: Callable[..., None], missing: list[str]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if getattr(self.config, "layerprobe", False):
            raise SeamError(
                f"simpletuner-layerprobe {__version__} does not fit SimpleTuner {simpletuner_version()}: "
                f"{'; '.join(missing)}; install versions that fit each other ('layerprobe doctor' shows them)"
            )

    __init__.layerprobe = True  # type: ignore[attr-defined]
    return __init__


def one_line_errors(original: Any) -> Any:
    """An excepthook that prints a ProbeError as one line and leaves all others to `original`."""

    @functools.wraps(original)
    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, ProbeError):
            print(f"layerprobe: error: {error}", file=sys.stderr, flush=True)
            signals.refused()
        else:
            original(kind, error, trace)

    excepthook.layerprobe = True  # type: ignore[attr-defined]
    return excepthook


def session_of(trainer: Any) -> Session | None:
    """The probe session of a Trainer, or None if it trains."""
    return trainer.__dict__.get("layerprobe_session")


def _without_session(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    return original(self, *args, **kwargs)


def _wrapper(probe: Callable[..., Any], training: Callable[..., Any] = _without_session) -> Callable[..., Any]:
    """Register `probe(original, session, self, ...)` to run instead of the Trainer method of the same name.

    training: what runs without a probe session, the original and nothing else unless it is given.
    """
    name = probe.__name__

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            session = session_of(self)
            if session is None:
                return training(original, self, *args, **kwargs)
            return probe(original, session, self, *args, **kwargs)

        method.layerprobe = True  # type: ignore[attr-defined]
        return method

    WRAPPERS[name] = wrap
    return probe


def _parse_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def parse_arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(self, *args, **kwargs)
        except Exception:
            # It sets up what a probe-only run refuses, and may fail at that: say what the probe has to say first.
            if getattr(getattr(self, "config", None), "layerprobe", False):
                overrides.refuse(self.config)
            raise
        if self.config.layerprobe:
            signals.announce()
        given.check_flag()
        settings = ProbeSettings.from_config(self.config)
        if settings is not None:
            self.layerprobe_session = start_session(self, settings)
        else:
            guard_mode(self.config)  # a word that is none is said now, and not when the models are loaded
        return result

    parse_arguments.layerprobe = True  # type: ignore[attr-defined]
    return parse_arguments


WRAPPERS["parse_arguments"] = _parse_arguments


def start_session(trainer: Any, settings: ProbeSettings) -> Session:
    """Check that this config can be probed, switch off what trains, and make the session. Raises ProbeError."""
    config = trainer.config
    overrides.refuse(config)
    if settings.noise_seed is not None:
        overrides.refuse_with_noise_seed(config)
    if not settings.discover or families.is_known(config.model_family):
        families.family(config.model_family)
    watchers = trainer.layerprobe_watchers_of(
        settings, lambda: trainer.accelerator.trackers, lambda: trainer.state["global_step"]
    )
    session = Session(settings, given.given_options(), watchers, trainer.layerprobe_own_parameters)
    with contextlib.suppress(ProbeError):  # a probe needs no file of what it does not train
        session.training = own.own_training(lambda name: getattr(config, name, None))
    session.changed = overrides.override(config, session.options, ("lycoris_config",) if session.adapter else ())
    backend = overrides.switch_off_compilation(trainer.accelerator)
    if backend != "no" and "dynamo_backend" not in session.options:
        session.changed.append(f"no compilation: {backend}, from `accelerate config` or the environment")
    if config.seed is not None and session.goal.recorded:
        # The loop starts from its first image again; other noise and crops make the samples new ones.
        config.seed = int(config.seed) + session.goal.recorded
        other = "other noise than" if settings.noise_seed is None else "images in another order than"
        session.changed.append(f"seed: {other} the {session.goal.recorded} samples recorded so far")
    session.stop.before_the_loop()
    return session


def guarded_adapter(original: Any, self: Any) -> None:
    """In a normal training the guard looks at what was made."""
    guard.guarded(self, guard_mode(self.config), self.layerprobe_verdicts, lambda: original(self))


@functools.partial(_wrapper, training=guarded_adapter)
def init_trainable_peft_adapter(original: Any, session: Session, self: Any) -> None:
    """No adapter is made but one to be probed. What else the original does and a forward feels: for PEFT's LoRA it sets
    the strength of the assistant LoRA; for LyCORIS it leaves that as it was loaded."""
    config, model, denoiser = self.config, self.model, self.model.get_trained_component()
    if session.adapter is not None:
        session.base = module_table(denoiser), fingerprint(denoiser)
        began_from_file = bool(session.options.get("init_lora"))
        session.adapter_settings = adapter.load(self, session.adapter, lambda: original(self), began_from_file)
    if getattr(model, "assistant_lora_loaded", False):
        session.assistant = 1.0
        if "lora" in config.model_type and config.lora_type.lower() == "standard":
            session.assistant = float(getattr(config, "assistant_lora_strength", 1.0))
            if session.adapter is None:  # else the original has put both to work
                denoiser.set_adapters([model.assistant_adapter_name], [session.assistant])
    denoiser.requires_grad_(False)


@_wrapper
def init_trackers(original: Any, session: Session, self: Any) -> None:
    """Lists and mappings among the options, as SimpleTuner has some, become text: TensorBoard refuses the others."""
    accelerator = self.accelerator
    start = accelerator.init_trackers

    def start_with_plain_options(project_name: str, config: Mapping[str, Any], **kwargs: Any) -> None:
        start(project_name, config={name: _plain(value) for name, value in config.items()}, **kwargs)

    accelerator.init_trackers = start_with_plain_options
    try:
        original(self)
    finally:
        del accelerator.init_trackers


@_wrapper
def init_prepare_models(original: Any, session: Session, self: Any, *args: Any, **kwargs: Any) -> None:
    """Every rank keeps a plain model: DistributedDataParallel refuses one without trainable parameters."""
    accelerator = self.accelerator
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
    try:
        original(self, *args, **kwargs)
    finally:
        del accelerator.prepare_model


@_wrapper
def init_optimizer(original: Any, session: Session, self: Any) -> None:
    """An optimizer over one parameter of its own: the loop, its scheduler and accelerate go on as always."""
    self.model.get_trained_component(unwrap_model=False).requires_grad_(False)
    session.idle_parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float32, device=self.accelerator.device))
    self.params_to_optimize = [session.idle_parameter]
    self.optimizer = torch.optim.SGD(self.params_to_optimize, lr=float(self.config.learning_rate))
    self.sidecar_optimizer = None
    self.sidecar_lr = None
    self.sidecar_is_schedulefree = False
    self.sidecar_scheduler_disabled = False


@_wrapper
def _get_trainable_parameters(original: Any, session: Session, self: Any) -> list[torch.nn.Parameter]:
    made = hasattr(session, "idle_parameter")  # not yet where SimpleTuner counts those of an adapter that is probed
    return [session.idle_parameter] if made else list(original(self))


@_wrapper
def _compute_model_prediction_loss(original: Any, session: Session, self: Any, prepared_batch: dict) -> Any:
    if session.recorder is None:
        return original(self, prepared_batch)
    session.arm()
    with torch.no_grad():
        result = original(self, prepared_batch)
    session.commit()
    self.config.max_train_steps = session.last_step(self.state["global_step"], self.config.max_train_steps)
    # The loop ends a training at a loss that is not finite; a probe counts such a sample and goes on.
    return (torch.nan_to_num(result[0], nan=0.0, posinf=0.0, neginf=0.0), *result[1:])


@_wrapper
def _any_rank_reached_epoch_end(original: Any, session: Session, self: Any, reached_epoch_end: bool) -> bool:
    """SimpleTuner's own question to all ranks before each step; it also carries the wish to stop."""
    if not original(self, reached_epoch_end or session.wants_to_stop):
        return False
    epoch_end, stop = session.agree(reached_epoch_end)
    if stop:
        self.config.max_train_steps = self.state["global_step"]
    return epoch_end or stop


@_wrapper
def checkpoint_state_save(original: Any, session: Session, self: Any, *args: Any, **kwargs: Any) -> None:
    logger.info("layerprobe: a probe-only run has nothing to save in a checkpoint")


@_wrapper
def train(original: Any, session: Session, self: Any) -> None:
    if session.goal.nothing_to_do:
        session.last_line.nothing_to_do(session.goal)
        return
    # Built by SimpleTuner before the loop, used in it and in its final export.
    self.validation = None
    self.evaluation = None
    self.hub_manager = None
    config, goal = self.config, session.goal
    targets = own.lora_targets(config, self.model)
    if session.training and targets is not None:
        session.training["lora_target_modules"] = targets
    config.model_type = overrides.LOOP_MODEL_TYPE
    per_step = max(1, int(config.train_batch_size)) * goal.ranks * max(1, config.gradient_accumulation_steps)
    if goal.samples:
        config.max_train_steps = math.ceil((goal.samples - goal.recorded) / per_step)
        config.strict_epoch_limit = False
    denoiser = self.model.get_trained_component()
    session.family = family_of(config, denoiser, session)
    settings = {name: _plain(getattr(config, name, None)) for name in RUN_SETTINGS}
    versions = {name: importlib.metadata.version(name) for name in ("simpletuner", "torch", "diffusers")}
    with (
        session.recording(
            denoiser,
            flavour=str(config.model_flavour or ""),
            settings=settings | {"assistant_lora": session.assistant},
            versions=versions | {"simpletuner-layerprobe": __version__},
            to_come=config.max_train_steps * per_step / goal.ranks,
        ),
        loop.observed(self, session),
        loop.no_backward(self, session),
        loop.probe_progress(original, session),
        loop.counted_at_the_end(self, session),
        loop.probe_sigmas(self, session),
        loop.fixed_noise(self, session),
    ):
        if goal.rank == 0:
            print(session.start_text(str(self.accelerator.device)), flush=True)
        original(self)


def family_of(config: Any, denoiser: torch.nn.Module, session: Session) -> families.Family:
    """The table's entry for this denoiser, or a guess where the user asked for one. Raises ModelError."""
    name = config.model_family
    if not session.settings.discover or families.is_known(name):
        return families.family(name, type(unwrapped(denoiser)).__name__)
    guess = discover(denoiser, name)
    if session.goal.rank == 0:
        print(
            f"layerprobe: warning: model family {name!r} is not in the probe's table; guessed blocks: "
            f"{', '.join(entry.path for entry in guess.blocks)}. Only the image stream is recorded, and text tokens "
            f"that share its sequence count as image",
            flush=True,
        )
    return guess


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


@_wrapper
def cleanup(original: Any, session: Session, self: Any) -> None:
    original(self)
    session.last_line.print()
