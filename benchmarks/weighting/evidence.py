"""What the arms go by beside the probe's readings: the base's mean gradient, and what a large adapter used.

Shape letters: O x I of a weight, A x C of w1, B x D of w2; L blocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner_layerprobe.lokr.adapter import LOKR, planned_adapter, steps
from weighting.arm import Arm, Training
from weighting.engine import Engine, Samples
from weighting.stack import Stack
from weighting.task import BATCH, Task, read_json

ORACLE_SEED, ORACLE_RATE, GRADIENT_SEED = 5000, 2e-3, 6000


@dataclass(frozen=True)
class Evidence:
    """angle, ablation, oracle: (L,) contributions in 0 to 1. critical: blocks of the article's recipe with factor 1.
    energy: module -> factor -> the part of the mean gradient's squared norm that a LoKr of this factor can hold."""

    angle: tuple[float, ...]
    ablation: tuple[float, ...]
    oracle: tuple[float, ...]
    energy: dict[str, dict[str, float]]
    critical: tuple[int, ...] = ()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_contributions(path: Path, base: str, blocks: int, *, allow_placeholder: bool) -> dict[str, Sequence[float]]:
    """The base's entry of contributions.json. Raises ValueError for a placeholder, unless it is allowed."""
    entry = read_json(path)[base]
    if not entry.get("measured", True) and not allow_placeholder:
        raise ValueError(f"{path.name}: the contributions of {base} are a placeholder, not measured")
    for name in ("angle", "ablation"):
        values = entry[name]
        if len(values) != blocks or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{path.name}: {name} of {base} is not {blocks} numbers from 0 to 1")
    return {name: entry.get(name, []) for name in ("angle", "ablation", "critical")}


def mean_gradient(engine: Engine, task: Task, rounds: int) -> dict[str, Tensor]:
    """(O, I) of every adapted weight, over all training pictures `rounds` times, captions and sigmas drawn."""
    stack = Stack(engine.model, [Training(Arm("none", {}, ()), 0, 0.0)])
    batches = task.batches([GRADIENT_SEED], rounds * len(task.train) // BATCH)
    seed_E = torch.zeros(1, dtype=torch.long, device=engine.device)
    total = [torch.zeros_like(weight) for weight in stack.weights]
    steps_made = rounds * len(task.train) // BATCH
    for step in range(steps_made):
        samples: Samples = batches([GRADIENT_SEED], step)
        loss = engine.losses(stack, samples, seed_E).mean()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, stack.weights), strict=True):
            sum_ += gradient / steps_made
    return {
        name: part.cpu()
        for leaf, weight in zip(stack.leaves, total, strict=True)
        for name, part in zip(leaf.modules, weight[0].split(leaf.shape[0]), strict=True)
    }


def energies(gradients: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Squared largest singular value of each gradient rearranged to (A C, B D), by factor (Van Loan, Pitsianis 1993).

    What one kron(w1, w2) can hold at most of the gradient's squared norm.
    """
    found: dict[str, dict[str, float]] = {}
    for name, gradient_OI in gradients.items():
        shape = tuple(gradient_OI.shape)
        found[name] = {}
        for factor in steps(LOKR, [shape]):
            (A, C), (B, D) = (sizes for _, sizes in planned_adapter(LOKR, shape, factor).tensors)
            split = gradient_OI.double().view(A, B, C, D).permute(0, 2, 1, 3).reshape(A * C, B * D)
            gram = split @ split.T if A * C <= B * D else split.T @ split
            found[name][str(factor)] = float(torch.linalg.eigvalsh(gram)[-1])
    return found


def oracle(engine: Engine, task: Task, arm: Arm, train_steps: int) -> tuple[float, ...]:
    """Of a large trained adapter the relative norm of its change in each block, from 0 for the least to 1."""
    batches = task.batches([ORACLE_SEED], train_steps)
    stack, _ = engine.train([Training(arm, ORACLE_SEED, ORACLE_RATE)], batches, train_steps)
    blocks = len(engine.model.transformer_blocks)
    change, base = [0.0] * blocks, [0.0] * blocks
    for pair in arm.pairs:
        number = int(pair.module.split(".")[1])
        module: nn.Module = engine.model.get_submodule(pair.module)
        w1, w2 = stack.adapter(0, pair.module)
        change[number] += float(w1.square().sum() * w2.square().sum())
        base[number] += float(module.weight.square().sum())
    share = [(part / whole) ** 0.5 for part, whole in zip(change, base, strict=True)]
    low, high = min(share), max(share)
    return tuple((one - low) / (high - low) for one in share)
