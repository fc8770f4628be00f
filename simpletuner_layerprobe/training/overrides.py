"""What a probe-only run changes in SimpleTuner's options, and what it cannot work with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simpletuner_layerprobe.errors import SeamError

# Set whatever the user's config says, grouped by reason; the summary at the start names those that the user had given
# other values.
OVERRIDES: dict[str, dict[str, Any]] = {
    "no adapter": {
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
    # Hooks do not fire inside a compiled forward.
    "no compilation": {
        "dynamo_backend": "no",
        "dynamo_mode": None,
        "dynamo_fullgraph": False,
        "dynamo_dynamic": False,
        "dynamo_use_regional_compilation": False,
        "dynamo_cache_export": None,
        "dynamo_hub_repo_id": None,
    },
    "every token through every block": {"tread_config": None, "diffusion_blocks_config": None},
    "one noise level per sample": {"mixflow_enabled": False},
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

LOOP_MODEL_TYPE = "probe"
"""SimpleTuner's `model_type` inside the training loop: what neither scales nor exports an adapter or a model.

Until then it is the user's, as is `lora_type`: what is loaded, quantised and cached depends on both.
"""

# `accelerate launch` and SimpleTuner's own launcher hand the choice of a compiler on by these.
COMPILER_VARIABLES = {
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    "TRAINING_DYNAMO_BACKEND": "no",
}

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

# Options whose draws no noise seed fixes: SimpleTuner draws them when it loads a batch, or by Python's generator.
# Option -> (how the names of the families begin that it counts for, is it on?, what to set instead).
REFUSED_WITH_NOISE_SEED: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "caption_dropout_probability": ("", lambda value: float(value or 0) > 0, "0"),
    "offset_noise": ("", bool, "false"),
    "flux_guidance_mode": ("flux", lambda value: value == "random-range", "constant"),
    "ltx_i2v_prob": ("ltx", lambda value: float(value or 0) > 0, "0"),
    "vae_cache_disable": ("", bool, "false"),
}
# The same in the config of a data backend: latents are drawn, and cropped, anew.
BACKEND_REFUSED_WITH_NOISE_SEED = ("vae_cache_disable", "vae_cache_clear_each_epoch")


def refuse_with_noise_seed(config: Any) -> None:
    """Raises SeamError naming an option whose draws layerprobe_noise_seed cannot fix."""
    for name, (families, is_on, instead) in REFUSED_WITH_NOISE_SEED.items():
        value = getattr(config, name, None)
        if str(config.model_family).startswith(families) and is_on(value):
            raise SeamError(
                f"{name} is {_short(repr(value))}, whose draws layerprobe_noise_seed cannot fix; set {name} to "
                f"{instead}"
            )


def refuse_backends_with_noise_seed(backends: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises SeamError naming a data backend (id -> what SimpleTuner keeps of it) whose latents are drawn anew."""
    for backend, kept in backends.items():
        for name in BACKEND_REFUSED_WITH_NOISE_SEED:
            if (kept.get("config") or {}).get(name):
                raise SeamError(
                    f"{name} is on in the data backend {backend!r}: its latents are drawn anew, which "
                    f"layerprobe_noise_seed cannot fix; switch it off"
                )


def refuse(config: Any) -> None:
    """Raises SeamError naming an option or a variable that is on and that a probe-only run cannot work with."""
    for name, is_on in REFUSED.items():
        value = getattr(config, name, None)
        if is_on(value):
            raise SeamError(
                f"{name} is {_short(repr(value))}; a probe-only run cannot work with it, remove it from this config"
            )
    for name in REFUSED_VARIABLES:
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise SeamError(
                f"{name} is {os.environ[name]!r}, from `accelerate config` or the environment; a probe-only run cannot "
                f"work with it: each GPU needs the whole model, launch it with plain data parallelism"
            )


def override(config: Any, options: Mapping[str, Any], kept: Sequence[str] = ()) -> list[str]:
    """Set OVERRIDES in the options, but those in `kept`. Returns a line per group in which one that the user gave had
    another value."""
    lines = []
    for reason, values in OVERRIDES.items():
        changed = []
        for name, value in values.items():
            if name in kept or not hasattr(config, name):
                continue
            before = getattr(config, name)
            if name in options and before != value and not (_is_off(before) and _is_off(value)):
                changed.append(f"{name} (was {_short(before)})")
            setattr(config, name, value)
        if changed:
            lines.append(f"{reason}: {', '.join(changed)}")
    return lines


def switch_off_compilation(accelerator: Any) -> str:
    """Take the compiler out of accelerate, which SimpleTuner has set up by now; returns the one that was on, or "no".

    It comes from an option (OVERRIDES) or from the variables that `accelerate launch` sets.
    """
    from accelerate.utils import TorchDynamoPlugin

    backend: str = accelerator.state.dynamo_plugin.backend.value.lower()
    os.environ.update(COMPILER_VARIABLES)
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    return backend


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "None", "none", "no", "0", "unmodified")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
