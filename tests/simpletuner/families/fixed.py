"""Prepares and runs a case twice with one noise seed, from other states of every random generator."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from typing import Any

SEED = 7


def told_of(case: Any) -> dict[str, Any]:
    """{"different": [names of tensors that differ]}, or {"error": the line}."""
    from simpletuner_layerprobe.errors import ProbeError

    try:
        first, second = tensors_of_two_steps(case)
    except ProbeError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"different": sorted(name for name in first.keys() | second.keys() if not same(first, second, name))}


def tensors_of_two_steps(case: Any) -> list[dict[str, Any]]:
    """All tensors of the prepared batch and of the output, by name, of two steps with the same images."""
    import numpy as np
    import torch
    from case import make_model

    from simpletuner_layerprobe.probe import families
    from simpletuner_layerprobe.training.fixed_noise import FixedNoise, NoDraws
    from simpletuner_layerprobe.training.noise import RULES

    def begin(seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    begin(0)
    denoiser = case.denoiser().float().train()
    model = make_model(case, torch.float32, denoiser)
    entry = families.family(case.family, type(denoiser).__name__)
    rule = RULES[entry.noise]
    steps = []
    for seed in (1, 2):
        begin(0)
        batch = case.batch(torch.float32) | {"filepaths": ["a", "b"], "data_backend_id": "made up"}
        fixed = FixedNoise(SEED, True, Counter())

        def draw(count: int, fixed: FixedNoise = fixed) -> torch.Tensor:
            return torch.from_numpy(fixed.sigmas(count)).float()

        begin(seed)
        with torch.no_grad(), rule.prescribe(model, draw) if rule.prescribe else nullcontext():
            with fixed.preparing(batch, case.family, entry.noise == "ddpm"):
                prepared = model.prepare_batch(batch, {"global_step": 0})
            tensors = dict(named("batch", dict(prepared)))
            with NoDraws(case.family):
                tensors |= named("output", model.model_predict(prepared))
        steps.append(tensors)
    return steps


def named(name: str, value: Any) -> dict[str, Any]:
    """Every tensor in nested dicts and lists, copied."""
    import torch

    if torch.is_tensor(value):
        return {name: value.detach().clone()}
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: tensor for key, item in inside for path, tensor in named(f"{name}.{key}", item).items()}


def same(first: dict[str, Any], second: dict[str, Any], name: str) -> bool:
    a, b = first.get(name), second.get(name)
    return a is not None and b is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
