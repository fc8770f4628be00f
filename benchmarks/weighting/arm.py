"""An arm: one LyCORIS config, and what LyCORIS makes of it on the model. Shape letters: A x C of w1, B x D of w2."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """The adapter of one Linear: its weight changes by kron(w1, w2). rate: what its learning rate is multiplied by."""

    module: str
    w1: tuple[int, int]
    w2: tuple[int, int]
    rate: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the Linear."""
        return self.w1[0] * self.w2[0], self.w1[1] * self.w2[1]

    @property
    def parameters(self) -> int:
        return self.w1[0] * self.w1[1] + self.w2[0] * self.w2[1]


@dataclass(frozen=True)
class Arm:
    """pairs: in the order in which LyCORIS makes them. contrast: among the modules' parameters, for the report."""

    name: str
    config: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    note: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(pair.parameters for pair in self.pairs)

    def initial(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """w1 and w2 as LyCORIS draws them after torch.manual_seed(seed); `lycoris_initial` is LyCORIS itself."""
        drawn = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for pair in self.pairs:
                w1_AC = torch.empty(pair.w1)
                nn.init.kaiming_uniform_(w1_AC, a=sqrt(5))
                drawn.append((w1_AC, torch.zeros(pair.w2)))
        return drawn


def lycoris_network(config: Mapping[str, Any], model: nn.Module, seed: int) -> Any:
    """LyCORIS's own network for a model, made as SimpleTuner makes it, not yet applied."""
    from simpletuner_layerprobe.lokr.network import BY_POSITION, fresh_wrapper, silent

    rest = copy.deepcopy({name: value for name, value in config.items() if name not in BY_POSITION})
    by_position = [int(config.get(name, default)) for name, default in BY_POSITION.items()]
    wrapper = fresh_wrapper()
    with silent(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "apply_preset" in rest:
            wrapper.LycorisNetwork.apply_preset(rest["apply_preset"])
        return wrapper.create_lycoris(model, *by_position, **rest)


def lycoris_initial(config: Mapping[str, Any], model: nn.Module, seed: int) -> list[tuple[str, Tensor, Tensor]]:
    """(module, w1, w2) of every adapter that LyCORIS makes. Refuses those that are not two full matrices."""
    names = {id(module): name for name, module in model.named_modules()}
    made = []
    for lora in lycoris_network(config, model, seed).loras:
        tensors = dict(lora.named_parameters())
        name = names[id(lora.org_module[0])]
        if set(tensors) != {"lokr_w1", "lokr_w2"} or lora.scale != 1 or tensors["lokr_w2"].dim() != 2:
            raise ValueError(f"the adapter of {name} is not two full matrices of scale 1: {sorted(tensors)}")
        made.append((name, tensors["lokr_w1"].detach(), tensors["lokr_w2"].detach()))
    return made


def make_arm(name: str, config: Mapping[str, Any], model: nn.Module, *, by_rms: bool = False, note: str = "") -> Arm:
    """The arm of a config. Raises ValueError if `Arm.initial` does not draw what LyCORIS draws.

    by_rms: scale each module's learning rate by the inverse of the rms that its w1 is drawn with, to a mean of 1 over
    the parameters. With full matrices a factor changes how far one step moves the weight; this takes it back.
    """
    made = lycoris_initial(config, model, 0)
    pairs = tuple(Pair(module, tuple(w1.shape), tuple(w2.shape)) for module, w1, w2 in made)
    if by_rms:
        pairs = with_rates(pairs)
    arm = Arm(name, dict(config), pairs, note)
    for (module, w1_AC, w2_BD), (own_AC, own_BD) in zip(made, arm.initial(0), strict=True):
        if not (torch.equal(w1_AC, own_AC) and torch.equal(w2_BD, own_BD)):
            raise ValueError(f"{name}: {module} does not start as LyCORIS starts it")
    return arm


def with_rates(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Rates by the inverse rms of w1, which is uniform in +-1 / sqrt(C): its rms is 1 / sqrt(3 C)."""
    rates = [sqrt(3 * pair.w1[1]) for pair in pairs]
    parameters = [pair.parameters for pair in pairs]
    mean = sum(rate * count for rate, count in zip(rates, parameters, strict=True)) / sum(parameters)
    return tuple(Pair(pair.module, pair.w1, pair.w2, rate / mean) for pair, rate in zip(pairs, rates, strict=True))


@dataclass(frozen=True)
class Training:
    """One training: an arm, the seed of its start and its data, its learning rate."""

    arm: Arm
    seed: int
    rate: float
