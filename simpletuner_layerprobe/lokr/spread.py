"""How an adapter's change is spread: over modules, and summed over blocks, kinds of layers and streams.

Shape letters: M modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.lokr.groups import RATIOS

OTHER = "other"
"""The block, kind or stream of modules that lie in none that is known."""


@dataclass(frozen=True)
class Part:
    """The modules of one block, kind or stream together.

    update: the Frobenius norm of all of their updates, weight: that of these modules' weights, None if it is not known.
    share: of the adapter's squared update, 0..1. parameters: trained; planned: by the config, None without one.
    """

    name: str
    modules: int
    update: float
    weight: float | None
    share: float
    parameters: int
    planned: int | None

    @property
    def relative(self) -> float | None:
        """The update's norm as a share of the weight's; None if that is 0 or not known."""
        return self.update / self.weight if self.weight else None


@dataclass(frozen=True)
class AdapterUpdates:
    """Where an adapter put its change. Its modules are in the model's order, or by their names where that is not known.

    path, base, config: the adapter's file, the folder of the base's weights and the plan's config; None if not known.
    names, algorithms, blocks, kinds, streams: of each module; kinds and streams are () where the model is not known.
    update_M: float64, Frobenius norm of what is added to each weight, as it is used with SimpleTuner's multiplier 1.
    weight_M: float64, that of the weight, NaN if it is not known. parameters_M: int64, trained numbers.
    planned_M: int64, those that the config means for each module, None without a config. left_out: modules that it
    means to have an adapter and that the file has none for. notes: what else to know, a line each.
    """

    path: Path
    base: Path | None
    config: Path | None
    names: tuple[str, ...]
    algorithms: tuple[str, ...]
    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    streams: tuple[str, ...]
    update_M: NDArray[np.float64]
    weight_M: NDArray[np.float64]
    parameters_M: NDArray[np.int64]
    planned_M: NDArray[np.int64] | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def relative_M(self) -> NDArray[np.float64]:
        """(M,) norm of each update as a share of its weight's; NaN if that is 0 or not known."""
        weight_M = np.where(self.weight_M > 0, self.weight_M, np.nan)
        return self.update_M / weight_M

    @property
    def whole(self) -> Part:
        """All modules together."""
        return self._part("all", np.ones(len(self.names), dtype=np.bool_))

    @property
    def by_block(self) -> tuple[Part, ...]:
        """The blocks that have a module, in the model's order."""
        return self._parts(self.blocks)

    @property
    def by_kind(self) -> tuple[Part, ...]:
        """Feed-forward, attention and modulation, and what is neither; () where the model is not known."""
        return self._parts(self.kinds)

    @property
    def by_stream(self) -> tuple[Part, ...]:
        """The streams whose modules their names tell apart, and "joint"; () where they are not told."""
        return self._parts(self.streams)

    def _parts(self, labels: Sequence[str]) -> tuple[Part, ...]:
        label_M = np.array(labels, dtype=object)
        order = (*RATIOS, *dict.fromkeys(labels))  # kinds as plans have them, the rest as it comes
        names = sorted(set(labels), key=lambda name: (name == OTHER, order.index(name)))
        return tuple(self._part(name, label_M == name) for name in names)

    def _part(self, name: str, inside_M: NDArray[np.bool_]) -> Part:
        whole = float(np.linalg.norm(self.update_M))
        update = float(np.linalg.norm(self.update_M[inside_M]))
        weight = float(np.linalg.norm(self.weight_M[inside_M]))
        return Part(
            name,
            int(inside_M.sum()),
            update,
            weight if isfinite(weight) else None,
            (update / whole) ** 2 if whole else 0.0,
            int(self.parameters_M[inside_M].sum()),
            None if self.planned_M is None else int(self.planned_M[inside_M].sum()),
        )
