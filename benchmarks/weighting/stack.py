"""The adapters of E trainings in buckets of equal shape, the weights that they give, and AdamW on all of them.

A bucket holds the pairs of one module shape and one split, over trainings, arms and blocks: the number of kernels grows
with the number of splits only. All parameters lie in one flat tensor of which the buckets are views.

Shape letters: E trainings, R rows of a bucket, P parameters, O x I of a module, A x C of w1, B x D of w2 (O = A B, I =
C D), J modules that are used together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from weighting.arm import Training
from weighting.block import parts_of

# SimpleTuner 4.10.1's own for the optimizer of the emoji environments, adamw_bf16 (optimizer_param.py).
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-6, 0.01
WARM_UP = 10


@dataclass(frozen=True)
class Leaf:
    """The weights of a part of one block for all trainings: rows `start` to `start + E * J` of its shape's tensor."""

    block: int
    part: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    start: int


def leaves_of(model: nn.Module, E: int) -> list[Leaf]:
    """Every part of every block, shape by shape."""
    made: list[Leaf] = []
    rows: dict[tuple[int, int], int] = {}
    for number, block in enumerate(model.transformer_blocks):
        for part, modules in parts_of(block).items():
            shape = tuple(block.get_submodule(modules[0]).weight.shape)
            names = tuple(f"transformer_blocks.{number}.{name}" for name in modules)
            made.append(Leaf(number, part, names, shape, rows.get(shape, 0)))
            rows[shape] = rows.get(shape, 0) + E * len(modules)
    return made


@dataclass(frozen=True)
class Bucket:
    """row_R: which row of the shape's weights; module_R: which of the shape's modules it starts from."""

    shape: tuple[int, int]
    row_R: Tensor
    module_R: Tensor
    w1_RAC: Tensor
    w2_RBD: Tensor
    gradient_1_RAC: Tensor
    gradient_2_RBD: Tensor


class Stack:
    """The weights and adapters of E trainings on the model's device."""

    def __init__(self, model: nn.Module, trainings: Sequence[Training]):
        self.trainings = tuple(trainings)
        self.E = len(self.trainings)
        self.device = next(model.parameters()).device
        self.leaves = leaves_of(model, self.E)
        self.shapes = list(dict.fromkeys(leaf.shape for leaf in self.leaves))
        modules = {
            shape: [n for leaf in self.leaves if leaf.shape == shape for n in leaf.modules] for shape in self.shapes
        }
        self._base_MOI = {
            shape: torch.stack([model.get_submodule(name).weight.detach().float() for name in names])
            for shape, names in modules.items()
        }
        self._weight_OI: dict[tuple[int, int], Tensor] = {
            shape: self._base_MOI[shape].new_empty((len(names) * self.E, *shape)) for shape, names in modules.items()
        }
        self._gradient_OI = {shape: torch.empty_like(weight) for shape, weight in self._weight_OI.items()}
        self._place = {name: (shape, number) for shape, names in modules.items() for number, name in enumerate(names)}
        self._row = {
            name: (leaf.start + j, len(leaf.modules)) for leaf in self.leaves for j, name in enumerate(leaf.modules)
        }
        self.weights = [
            self._rows(leaf).view(self.E, -1, leaf.shape[1]).detach().requires_grad_() for leaf in self.leaves
        ]
        self._make_buckets()
        self._start_weights()

    def _rows(self, leaf: Leaf) -> Tensor:
        return self._weight_OI[leaf.shape][leaf.start : leaf.start + self.E * len(leaf.modules)]

    @torch.no_grad()
    def _start_weights(self) -> None:
        """The base's weights everywhere: rows without an adapter keep them."""
        for leaf in self.leaves:
            numbers = [self._place[name][1] for name in leaf.modules]
            self._rows(leaf).view(self.E, len(numbers), *leaf.shape).copy_(self._base_MOI[leaf.shape][numbers])

    def _make_buckets(self) -> None:
        found: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[int, int]]] = {}
        initial = [training.arm.initial(training.seed) for training in self.trainings]
        for e, training in enumerate(self.trainings):
            for place, pair in enumerate(training.arm.pairs):
                if pair.shape != self._place[pair.module][0]:
                    raise ValueError(f"{pair.module} has another shape than {pair.shape}")
                found.setdefault((pair.w1, pair.w2), []).append((e, place))
        count = sum(len(members) * (prod(w1) + prod(w2)) for (w1, w2), members in found.items())
        self.value_P, rate_P = torch.empty(count), torch.empty(count)
        self.gradient_P = torch.zeros(count, device=self.device)
        starts, start = [], 0
        for (w1, w2), members in found.items():
            starts.append(start)
            rates = torch.tensor(
                [self.trainings[e].rate * self.trainings[e].arm.pairs[place].rate for e, place in members]
            )
            for number, shape in enumerate((w1, w2)):
                end = start + len(members) * prod(shape)
                values = torch.stack([initial[e][place][number] for e, place in members])
                self.value_P[start:end] = values.flatten()
                rate_P[start:end] = rates.repeat_interleave(prod(shape))
                start = end
        self.value_P, self.rate_P = self.value_P.to(self.device), rate_P.to(self.device)
        self.first_P, self.second_P = torch.zeros_like(self.value_P), torch.zeros_like(self.value_P)
        self.steps = 0
        self.buckets: list[Bucket] = []
        self._found: dict[tuple[int, str], tuple[int, int]] = {}
        for number, (((a, c), (b, d)), members) in enumerate(found.items()):
            R = len(members)
            names = [self.trainings[e].arm.pairs[place].module for e, place in members]
            rows = [self._row[name][0] + e * self._row[name][1] for (e, _), name in zip(members, names, strict=True)]
            first, second = starts[number] + R * a * c, starts[number] + R * (a * c + b * d)
            ends = (starts[number], first, second)
            w1, g1 = (flat[ends[0] : ends[1]].view(R, a, c) for flat in (self.value_P, self.gradient_P))
            w2, g2 = (flat[ends[1] : ends[2]].view(R, b, d) for flat in (self.value_P, self.gradient_P))
            row_R = torch.tensor(rows, device=self.device)
            module_R = torch.tensor([self._place[name][1] for name in names], device=self.device)
            self.buckets.append(Bucket((a * b, c * d), row_R, module_R, w1, w2, g1, g2))
            self._found |= {(e, name): (number, r) for r, ((e, _), name) in enumerate(zip(members, names, strict=True))}

    def adapter(self, e: int, module: str) -> tuple[Tensor, Tensor]:
        """w1 and w2 of one training now."""
        number, r = self._found[e, module]
        return self.buckets[number].w1_RAC[r], self.buckets[number].w2_RBD[r]

    @torch.no_grad()
    def write_weights(self) -> None:
        """Base plus kron(w1, w2), in place, into what `weights` are views of."""
        for bucket in self.buckets:
            R, A, C = bucket.w1_RAC.shape
            _, B, D = bucket.w2_RBD.shape
            new = self._base_MOI[bucket.shape].index_select(0, bucket.module_R)
            new.view(R, A, B, C, D).addcmul_(bucket.w1_RAC[:, :, None, :, None], bucket.w2_RBD[:, None, :, None, :])
            self._weight_OI[bucket.shape].index_copy_(0, bucket.row_R, new)

    @torch.no_grad()
    def read_gradients(self, gradients: Sequence[Tensor]) -> None:
        """From the gradients of `weights` to those of the adapters."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            rows = self._gradient_OI[leaf.shape][leaf.start : leaf.start + self.E * len(leaf.modules)]
            # Strided: the gradient of a product with a transposed matrix comes transposed.
            split = (self.E, len(leaf.modules), *leaf.shape)
            rows.view(split).copy_(gradient.view(split))
        for bucket in self.buckets:
            R, A, C = bucket.w1_RAC.shape
            _, B, D = bucket.w2_RBD.shape
            split = (
                self._gradient_OI[bucket.shape]
                .view(-1, A, B, C, D)
                .permute(0, 1, 3, 2, 4)
                .index_select(0, bucket.row_R)
            )
            split_RMN = split.reshape(R, A * C, B * D)
            torch.bmm(split_RMN, bucket.w2_RBD.reshape(R, B * D, 1), out=bucket.gradient_1_RAC.view(R, A * C, 1))
            torch.bmm(bucket.w1_RAC.reshape(R, 1, A * C), split_RMN, out=bucket.gradient_2_RBD.view(R, 1, B * D))

    @torch.no_grad()
    def update(self) -> None:
        """A step of AdamW as torch does it, the learning rate as SimpleTuner warms it up: 0 at the first step."""
        warm = min(1.0, self.steps / WARM_UP)
        self.steps += 1
        beta_1, beta_2 = BETAS
        self.first_P.lerp_(self.gradient_P, 1 - beta_1)
        self.second_P.mul_(beta_2).addcmul_(self.gradient_P, self.gradient_P, value=1 - beta_2)
        denominator_P = self.second_P.sqrt().div_((1 - beta_2**self.steps) ** 0.5).add_(EPS)
        rate_P = self.rate_P * warm
        self.value_P.sub_(self.value_P * rate_P, alpha=WEIGHT_DECAY)
        self.value_P.sub_(self.first_P * rate_P / denominator_P, alpha=1 / (1 - beta_1**self.steps))
