"""Turns SimpleTuner's Trainer into a probe-only one: the only file that names Trainer internals.

`install` wraps the methods in SEAMS once, when SimpleTuner's trainer module was imported. Without the flag
every wrapper passes straight through. With it, SimpleTuner's own loop, dataloaders, batch preparation and noise
run as always; the forward runs without autograd under an Observer, and the place of the backward pass is taken
by keeping the distances.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.rows import Facts
from simpletuner_layerprobe.probe.tokens import positions
from simpletuner_layerprobe.training import cpu, given, signals
from simpletuner_layerprobe.training.noise import RULES as NOISE_RULES
from simpletuner_layerprobe.training.noise import sigma_of
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.seams import SEAMS, missing_seams, simpletuner_version
from simpletuner_layerprobe.training.session import Session

logger = logging.getLogger("SimpleTuner")

# What a probe-only run sets in SimpleTuner's options, whatever the user's config says. Grouped by reason; the
# summary at the start names those that differ from the user's values.
OVERRIDES: dict[str, dict[str, Any]] = {
    "no adapter": {
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": None,
        "init_lora": None,
        "train_text_encoder": False,
    },
    "no optimizer": {
        "optimizer": "adamw_bf16",
        "optimizer_release_gradients": False,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "gradient_precision": "unmodified",
        "use_ema": False,
    },
    "no gradient checkpointing": {
        "gradient_checkpointing": False,
        "gradient_checkpointing_offload_attention": False,
        "gradient_checkpointing_offload_prefetch": False,
    },
    "every token through every block": {"tread_config": None, "diffusion_blocks_config": None},
    "one plain forward per step": {
        "distillation_method": None,
        "scheduled_sampling_max_step_offset": 0,
        "scheduled_sampling_reflexflow": False,
        "twinflow_enabled": False,
        "crepa_enabled": False,
        "irepa_enabled": False,
        "urepa_enabled": False,
        "layersync_enabled": False,
        "internal_guidance_enabled": False,
        "xm_enabled": False,
        "nextlat_enabled": False,
        "self_transcendence_enabled": False,
        "minimax_h3_reference_mode": "vanilla",
    },
    "no checkpoints": {
        "checkpoint_step_interval": None,
        "checkpointing_steps": None,
        "checkpoint_epoch_interval": None,
        "checkpointing_rolling_steps": 0,
        "resume_from_checkpoint": None,
    },
    "no validation": {
        "validation_disable": True,
        "validation_on_startup": False,
        "disable_benchmark": True,
        "eval_steps_interval": None,
        "eval_epoch_interval": None,
    },
    "no upload": {
        "push_to_hub": False,
        "push_checkpoints_to_hub": False,
        "publishing_config": None,
        "post_upload_script": None,
        "post_checkpoint_script": None,
    },
}

# What of the training config decides the recorded numbers: a run goes on only if these are the same.
RUN_SETTINGS = (
    "model_flavour",
    "base_model_precision",
    "mixed_precision",
    "resolution",
    "resolution_type",
    "caption_dropout_probability",
)

# Options that a probe-only run cannot work with: option -> is it on?
REFUSED: dict[str, Callable[[Any], bool]] = {
    "controlnet": bool,
    "control": bool,
    "fsdp_enable": bool,
    "deepspeed_config": lambda value: value not in (None, "", "None", {}),
    "disable_accelerator": bool,
    "context_parallel_size": lambda value: value not in (None, "", "None") and int(value) > 1,
}
# The same by way of `accelerate config`: `accelerate launch` sets these for the training process.
REFUSED_VARIABLES = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)


def install(module: Any) -> None:
    """Wrap the Trainer of `simpletuner.helpers.training.trainer`. If a seam is missing, only refuse the flag."""
    sys.excepthook = one_line_errors(sys.excepthook)
    cpu.install_pin_memory_fallback()
    trainer_class = module.Trainer
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
    if getattr(sys.excepthook, "layerprobe", False):
        sys.excepthook = vars(sys.excepthook)["__wrapped__"]
    cpu.uninstall_pin_memory_fallback()


def _refusing(original: Callable[..., None], missing: list[str]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if getattr(self.config, "layerprobe", False):
            raise ProbeError(
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
        else:
            original(kind, error, trace)

    excepthook.layerprobe = True  # type: ignore[attr-defined]
    return excepthook


def session_of(trainer: Any) -> Session | None:
    """The probe session of a Trainer, or None if it trains."""
    return trainer.__dict__.get("layerprobe_session")


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
WRAPPERS: dict[str, Wrapper] = {}


def _wrapper(probe: Callable[..., Any]) -> Callable[..., Any]:
    """Register `probe(original, session, self, ...)` to run instead of the Trainer method of the same name.

    Without a probe session the original runs and nothing else.
    """
    name = probe.__name__

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            session = session_of(self)
            if session is None:
                return original(self, *args, **kwargs)
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
                refuse(self.config)
            raise
        if self.config.layerprobe:
            signals.announce()
        given.check_flag()
        settings = ProbeSettings.from_config(self.config)
        if settings is not None:
            self.layerprobe_session = start_session(self, settings)
        return result

    parse_arguments.layerprobe = True  # type: ignore[attr-defined]
    return parse_arguments


WRAPPERS["parse_arguments"] = _parse_arguments


def start_session(trainer: Any, settings: ProbeSettings) -> Session:
    """Check that this config can be probed, switch off what trains, and make the session. Raises ProbeError."""
    config = trainer.config
    refuse(config)
    if not settings.discover or families.is_known(config.model_family):
        families.family(config.model_family)
    session = Session(settings, given.given_options())
    changed = override(config, session.options)
    if config.seed is not None and session.recorded:
        # The loop starts from its first image again; other noise and crops make the samples new ones.
        config.seed = int(config.seed) + session.recorded
        changed.append(f"seed: other noise than the {session.recorded} samples recorded so far")
    session.changed = changed
    session.interrupt_on_terminate()
    return session


def refuse(config: Any) -> None:
    """Raises ProbeError naming an option or a variable that is on and that a probe-only run cannot work with."""
    for name, is_on in REFUSED.items():
        value = getattr(config, name, None)
        if is_on(value):
            raise ProbeError(
                f"{name} is {_short(repr(value))}; a probe-only run cannot work with it, remove it from this config"
            )
    for name in REFUSED_VARIABLES:
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise ProbeError(
                f"{name} is {os.environ[name]!r}, from `accelerate config` or the environment; a probe-only run cannot "
                f"work with it: each GPU needs the whole model, launch it with plain data parallelism"
            )


def override(config: Any, options: Mapping[str, Any]) -> list[str]:
    """Set OVERRIDES in the options. Returns a line per group in which one that the user gave had another value."""
    lines = []
    for reason, values in OVERRIDES.items():
        changed = []
        for name, value in values.items():
            if not hasattr(config, name):
                continue
            before = getattr(config, name)
            if name in options and before != value and not (_is_off(before) and _is_off(value)):
                changed.append(f"{name} (was {_short(before)})")
            setattr(config, name, value)
        if changed:
            lines.append(f"{reason}: {', '.join(changed)}")
    return lines


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "None", "none", "0", "unmodified")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


@_wrapper
def init_trainable_peft_adapter(original: Any, session: Session, self: Any) -> None:
    self.model.get_trained_component(unwrap_model=False).requires_grad_(False)


@_wrapper
def init_ema_model(original: Any, session: Session, self: Any) -> None:
    self.ema_model = None


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
    session.idle_parameter = torch.nn.Parameter(torch.zeros((), device=self.accelerator.device))
    self.params_to_optimize = [session.idle_parameter]
    self.optimizer = torch.optim.SGD(self.params_to_optimize, lr=float(self.config.learning_rate))
    self.sidecar_optimizer = None
    self.sidecar_lr = None
    self.sidecar_is_schedulefree = False
    self.sidecar_scheduler_disabled = False


@_wrapper
def _get_trainable_parameters(original: Any, session: Session, self: Any) -> list[torch.nn.Parameter]:
    return [session.idle_parameter]


@_wrapper
def prepare_batch(original: Any, session: Session, self: Any, batch: Any) -> Any:
    prepared = original(self, batch)
    if isinstance(prepared, dict):
        # Scales an adapter that a probe-only run does not have.
        prepared["slider_strength"] = None
    return prepared


@_wrapper
def _prepare_regularisation_parent_targets(original: Any, session: Session, self: Any, prepared_batch: dict) -> None:
    """Without an adapter the model is its own parent: one forward less."""


@_wrapper
def _compute_model_prediction_loss(original: Any, session: Session, self: Any, prepared_batch: dict) -> Any:
    if session.observer is None:
        return original(self, prepared_batch)
    sigma_B = sigma_of(NOISE_RULES[session.family.noise], self.model, prepared_batch)
    text_tokens = text_length(prepared_batch)
    count = len(sigma_B)
    session.arm(prepared_batch, sigma_B, text_mask(prepared_batch, count), sample_facts(prepared_batch, count))
    with torch.no_grad():
        result = original(self, prepared_batch)
    session.commit(loss=result[2], text_tokens=text_tokens)
    self.config.max_train_steps = session.last_step(self.state["global_step"], self.config.max_train_steps)
    # The loop ends a training at a loss that is not finite; a probe counts such a sample and goes on.
    return (torch.nan_to_num(result[0], nan=0.0, posinf=0.0, neginf=0.0), *result[1:])


@_wrapper
def model_predict(original: Any, session: Session, self: Any, *args: Any, **kwargs: Any) -> Any:
    with session.forward():
        return original(self, *args, **kwargs)


@_wrapper
def _any_rank_reached_epoch_end(original: Any, session: Session, self: Any, reached_epoch_end: bool) -> bool:
    """SimpleTuner's own question to all ranks before each step; it also carries the wish to stop."""
    if not original(self, reached_epoch_end or session.wants_to_stop()):
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
    if session.nothing_to_do:
        session.finish_early()
        return
    # Built by SimpleTuner before the loop, used in it and in its final export.
    self.validation = None
    self.evaluation = None
    self.hub_manager = None
    config = self.config
    if session.settings.samples:
        per_step = max(1, int(config.train_batch_size)) * session.ranks * max(1, config.gradient_accumulation_steps)
        config.max_train_steps = math.ceil((session.settings.samples - session.recorded) / per_step)
        config.strict_epoch_limit = False
    versions = {name: importlib.metadata.version(name) for name in ("simpletuner", "torch", "diffusers")}
    denoiser = self.model.get_trained_component()
    session.family = family_of(config, denoiser, session)
    with (
        session.recording(
            denoiser,
            flavour=str(config.model_flavour or ""),
            run_settings={name: _plain(getattr(config, name, None)) for name in RUN_SETTINGS}
            | {"text": session.family.text, "noise": session.family.noise},
            versions={**versions, "simpletuner-layerprobe": __version__},
        ),
        _no_backward(self, session),
        _count_at_the_end(self, session),
        _probe_sigmas(self, session),
        _eager(config),
    ):
        if session.rank == 0:
            print(session.start_text(str(self.accelerator.device)), flush=True)
        # SimpleTuner starts its trackers inside `train`.
        session.show_in(lambda: self.accelerator.trackers, lambda: self.state["global_step"])
        original(self)


def family_of(config: Any, denoiser: torch.nn.Module, session: Session) -> families.Family:
    """The table's entry for this denoiser, or a guess where the user asked for one. Raises ProbeError."""
    name = config.model_family
    if not session.settings.discover or families.is_known(name):
        return families.family(name, type(denoiser).__name__)
    guess = families.discover(denoiser, name, lambda module: list(positions(type(module).forward)))
    if session.rank == 0:
        print(
            f"layerprobe: warning: model family {name!r} is not in the probe's table; guessed blocks: "
            f"{', '.join(entry.path for entry in guess.blocks)}. Only the image stream is recorded, and text tokens "
            f"that share its sequence count as image",
            flush=True,
        )
    return guess


@contextmanager
def _no_backward(self: Any, session: Session) -> Iterator[None]:
    """In place of `accelerator.backward(loss)`: a backward through the idle parameter alone.

    It leaves a zero gradient, so that clipping, gradient scaling and the optimizer find what they expect.
    """
    accelerator = self.accelerator
    backward = accelerator.backward
    accelerator.backward = lambda loss, **kwargs: backward(session.idle_parameter * 0, **kwargs)
    try:
        yield
    finally:
        del accelerator.backward


@contextmanager
def _count_at_the_end(self: Any, session: Session) -> Iterator[None]:
    """Count the run's samples when the loop is over and before the ranks part: every rank has written then."""
    accelerator = self.accelerator
    end_training = accelerator.end_training

    def count_and_end() -> None:
        session.flush()
        accelerator.wait_for_everyone()
        session.show(last=True)
        session.finish()
        end_training()

    accelerator.end_training = count_and_end
    try:
        yield
    finally:
        del accelerator.end_training


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Hooks do not fire inside a compiled forward: run it uncompiled."""
    if _is_off(config.dynamo_backend) or str(config.dynamo_backend).lower() == "no":
        yield
        return
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextmanager
def _probe_sigmas(self: Any, session: Session) -> Iterator[None]:
    """Let the probe draw the noise levels, unless the user's own schedule is asked for."""
    model = self.model
    if session.settings.sigmas == "training":
        yield
        return
    rule = NOISE_RULES[session.family.noise]
    if rule.prescribe is None:
        raise ProbeError(
            f"layerprobe_sigmas is {session.settings.sigmas!r}, but model family {session.family.name!r} chooses its "
            f"noise levels itself; set layerprobe_sigmas to 'training'"
        )
    seed = int(session.options.get("seed", 0) or 0)

    def draw(count: int) -> torch.Tensor:
        sigmas = torch.from_numpy(session.draw_sigmas(count, seed))
        return sigmas.to(device=self.accelerator.device, dtype=torch.float32)

    with rule.prescribe(model, draw):
        yield


def text_mask(prepared_batch: dict, count: int) -> torch.Tensor | None:
    """True for the valid text tokens, (B, S); None if the batch has no mask with a row for each of `count` samples."""
    mask: Any = prepared_batch.get("encoder_attention_mask")
    if not torch.is_tensor(mask) or mask.shape[0] != count:
        return None
    return mask.reshape(mask.shape[0], -1) > 0.5


def text_length(prepared_batch: dict) -> int:
    """Number of text tokens of the batch, padding included; -1 if it has no text."""
    text: Any = prepared_batch.get("encoder_hidden_states")
    return int(text.shape[1]) if torch.is_tensor(text) and text.dim() > 1 else -1


def sample_facts(prepared_batch: dict, count: int) -> Facts:
    """What SimpleTuner knows of each sample of a batch."""
    backend = str(prepared_batch.get("data_backend_id") or "")
    prompts = prepared_batch.get("prompts")
    dropped = [int(not prompt) for prompt in prompts] if isinstance(prompts, list) and len(prompts) == count else None
    sizes = [_pixel_size(path, backend) for path in prepared_batch.get("filepaths") or []]
    if len(sizes) != count:
        sizes = [(0, 0)] * count
    return Facts(
        width=[width for width, _ in sizes],
        height=[height for _, height in sizes],
        caption_dropped=dropped or [-1] * count,
        backend=[backend] * count,
    )


def _pixel_size(path: str, backend: str) -> tuple[int, int]:
    from simpletuner.helpers.training.state_tracker import StateTracker

    metadata = StateTracker.get_metadata_by_filepath(path, data_backend_id=backend) or {}
    size = metadata.get("target_size") or (0, 0)
    return int(size[0]), int(size[1])


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


@_wrapper
def cleanup(original: Any, session: Session, self: Any) -> None:
    original(self)
    session.print_summary()
