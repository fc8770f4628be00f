"""The arms by their names, as LyCORIS configs in the product's own form.

uniform, uniform-110             the planner's equal plan; at 110% of the parameters
angle-4, against-angle-4         by contribution with this contrast; turned around. Also ablation, oracle, and by
                                 depth alone ends, middle, front, back
shuffle-03                       angle-12 with the contributions permuted over the blocks
attention-x2, image-x2           equal over blocks, the parameters of a kind or of a side doubled against the others
freeze-ablation-2, freeze-random-3   equal, without the two blocks that ablation needs least; without two drawn ones
article-full, uniform-article-size   the article's recipe at its own size, the equal plan of that size
energy, energy-limited           module by module, by what a factor can hold of the base's mean gradient
NAME-lr                          an arm with a learning rate per module, see `make_arm`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from simpletuner_layerprobe.analyse.contribution import Contribution
from simpletuner_layerprobe.lokr.adapter import LOKR
from simpletuner_layerprobe.lokr.budget import LESS, MORE, UNIFORM
from simpletuner_layerprobe.lokr.config import lycoris_config
from simpletuner_layerprobe.lokr.groups import Group, module_groups
from simpletuner_layerprobe.lokr.plan import make_plan
from simpletuner_layerprobe.models import Architecture
from simpletuner_layerprobe.readings import all_blocks
from weighting.arm import Arm, make_arm
from weighting.evidence import Evidence
from weighting.split import split_by_energy, split_by_weight

BUDGET, ORACLE_BUDGET = 300_000, 2_000_000
TOLERANCE, LARGEST_GAP = 0.001, 0.005
SHUFFLED = "angle-12"
READINGS = ("angle", "against-angle", "ablation", "against-ablation")
CONTRASTS = ("1.5", "2", "4", "12")
SHUFFLES = tuple(f"shuffle-{number:02}" for number in range(12))
NAMED = (
    "uniform", "uniform-90", "uniform-110", "uniform-125",
    *(f"{reading}-{contrast}" for reading in READINGS for contrast in CONTRASTS),
    "ends-2", "middle-2", "front-2", "back-2",
    "attention-x2", "feed-forward-x2", "modulation-x2", "image-x2", "text-x2",
    "freeze-ablation-2", *(f"freeze-random-{number}" for number in range(4)),
    "article-full", "uniform-article-size",
    "energy", "energy-limited", "oracle-2", "oracle-4", "uniform-lr", "angle-4-lr",
)  # fmt: skip
OWN_SIZE = {"uniform-90": 0.9, "uniform-110": 1.1, "uniform-125": 1.25}


class Planner:
    """Arms of one model. frozen: draws for freeze-random-N differ in nothing but their blocks."""

    def __init__(self, model: nn.Module, architecture: Architecture, evidence: Evidence):
        self.model, self.architecture, self.evidence = model, architecture, evidence
        self.blocks = all_blocks([stream.blocks for stream in architecture.streams])

    def arm(self, name: str) -> Arm:
        """The arm, its size checked. Raises ValueError for an unknown name or a size that is off by over 0.5%."""
        config, note = self._config(name.removesuffix("-lr"))
        arm = make_arm(name, config, self.model, by_rms=name.endswith("-lr"), note=note)
        wanted = round(BUDGET * OWN_SIZE.get(name, 1.0))
        if name in ("article-full", "uniform-article-size"):
            wanted = make_plan(self.architecture, self._contribution("angle"), **self._article()).parameters
        gap = abs(arm.parameters / wanted - 1)
        if gap > LARGEST_GAP:
            raise ValueError(f"{name} has {arm.parameters:,} parameters, {gap:.2%} off {wanted:,}")
        return arm if gap <= TOLERANCE + 1e-9 else replace(arm, note=f"{note} {gap:.2%} off the budget".strip())

    def large(self) -> Arm:
        """The equal plan of the adapter that the oracle looks at."""
        return make_arm("large", self._plan(parameters=ORACLE_BUDGET, direction=UNIFORM), self.model)

    def _values(self, reading: str) -> NDArray[np.float64]:
        depth_L = np.linspace(0, 1, len(self.blocks))
        by_depth = {"front": 1 - depth_L, "back": depth_L, "ends": np.abs(2 * depth_L - 1)}
        by_depth["middle"] = 1 - by_depth["ends"]
        return by_depth[reading] if reading in by_depth else np.array(getattr(self.evidence, reading))

    def _contribution(self, values: str | NDArray[np.float64]) -> Contribution:
        value_L = self._values(values) if isinstance(values, str) else values
        return Contribution(self.blocks, value_L, np.ones(len(self.blocks), dtype=np.bool_), {})

    def _plan(
        self, values: str | NDArray[np.float64] = "front", parameters: int = BUDGET, **options: Any
    ) -> Mapping[str, Any]:
        return make_plan(self.architecture, self._contribution(values), preset=parameters, **options).config()

    def _article(self) -> dict[str, Any]:
        return {"preset": "article", "critical": tuple(self.evidence.critical)}

    def _config(self, name: str) -> tuple[Mapping[str, Any], str]:
        if match := re.fullmatch(r"uniform(?:-(\d+))?", name):
            return self._plan(parameters=BUDGET * int(match[1] or 100) // 100, direction=UNIFORM), ""
        if match := re.fullmatch(r"(against-)?(angle|ablation|oracle|ends|middle|front|back)-([\d.]+)", name):
            return self._plan(match[2], contrast=float(match[3]), direction=LESS if match[1] else MORE), ""
        if match := re.fullmatch(r"shuffle-(\d+)", name):
            return self._shuffled(int(match[1]))
        if match := re.fullmatch(r"(attention|feed-forward|modulation|image|text)-x([\d.]+)", name):
            return self._by_kind(match[1], float(match[2])), ""
        if match := re.fullmatch(r"freeze-(ablation|random)-(\d+)", name):
            return self._frozen(match[1], int(match[2]))
        if name == "article-full":
            return make_plan(self.architecture, self._contribution("angle"), **self._article()).config(), ""
        if name == "uniform-article-size":
            size = make_plan(self.architecture, self._contribution("angle"), **self._article()).parameters
            return self._plan(parameters=size, direction=UNIFORM), ""
        if name in ("energy", "energy-limited"):
            return self._by_energy(2.0 if name == "energy-limited" else None), ""
        raise ValueError(f"there is no arm {name!r}")

    def _shuffled(self, number: int) -> tuple[Mapping[str, Any], str]:
        reading, contrast = SHUFFLED.split("-")
        order = np.random.default_rng(number).permutation(len(self.blocks))
        return self._plan(self._values(reading)[order], contrast=float(contrast)), f"order {order.tolist()}"

    def _by_kind(self, kind: str, times: float) -> Mapping[str, Any]:
        streams = {s.name: s.blocks for s in self.architecture.streams} if kind in ("image", "text") else None
        groups = module_groups(self.architecture, self.blocks, streams=streams)
        numbers = split_by_weight(groups, BUDGET, lambda group: times if kind in (group.kind, group.stream) else 1.0)
        return self._write(groups, numbers)

    def _frozen(self, by: str, number: int) -> tuple[Mapping[str, Any], str]:
        if by == "ablation":
            freeze = sorted(np.argsort(self._values("ablation"), kind="stable")[:number].tolist())
        else:
            freeze = sorted(np.random.default_rng(100 + number).permutation(len(self.blocks))[:2].tolist())
        return self._plan(direction=UNIFORM, freeze=tuple(freeze)), f"without blocks {freeze}"

    def _by_energy(self, limit: float | None) -> Mapping[str, Any]:
        equal = make_plan(self.architecture, self._contribution("front"), preset=BUDGET, direction=UNIFORM)
        factor_of = {
            module.name: number
            for group, number in zip(equal.groups, equal.numbers, strict=True)
            for module in group.modules
        }
        groups = [replace(group, modules=(module,)) for group in equal.groups for module in group.modules]

        def allowed(group: Group, number: int) -> bool:
            equal_number = factor_of[group.modules[0].name]
            return limit is None or equal_number / limit <= number <= equal_number * limit

        return self._write(groups, split_by_energy(groups, BUDGET, self.evidence.energy, allowed))

    def _write(self, groups: Sequence[Group], numbers: Sequence[int]) -> Mapping[str, Any]:
        return lycoris_config(LOKR, groups, numbers, self.architecture.targets)
