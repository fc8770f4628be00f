"""What a check says: module by module, what was meant and what LyCORIS or PEFT builds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import LOKR, Adapter
from simpletuner_layerprobe.lokr.factors import AUTO_FACTOR

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Module


@dataclass(frozen=True)
class Row:
    """One module: what it was meant to get and what LyCORIS builds for it; None is no adapter."""

    name: str
    type: str
    shape: tuple[int, ...]
    intended: Adapter | None
    got: Adapter | None

    @property
    def ok(self) -> bool:
        if self.intended is None or self.got is None:
            return self.intended is self.got
        return self.intended.same_as(self.got)

    @property
    def difference(self) -> str:
        return f"meant {self.intended or 'no adapter'}, gets {self.got or 'no adapter'}"

    def __str__(self) -> str:
        return f"{self.name}: {self.difference}"


@dataclass(frozen=True)
class Check:
    """What LyCORIS (or PEFT) builds from a config on a model.

    rows: the modules that were meant to get an adapter or get one, in the model's order. unmatched: name
    patterns and classes that the model has nothing for. notes: what else the reader should know of the
    config, one line each. version: of the builder, LyCORIS or PEFT. stops: why a training with it stops at once.
    layers: the names of all linear and convolutional layers of the model.
    """

    rows: tuple[Row, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    version: str
    builder: str = "LyCORIS"
    stops: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def missing(self) -> tuple[Row, ...]:
        """The modules that were meant to get an adapter and get none."""
        return tuple(row for row in self.rows if row.got is None)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """The linear and convolutional layers of the model that get no adapter."""
        covered = {row.name for row in self.rows if row.got is not None}
        return tuple(name for name in self.layers if name not in covered)

    @property
    def extra(self) -> tuple[Row, ...]:
        """The modules that get an adapter and were meant to have none."""
        return tuple(row for row in self.rows if row.intended is None)

    @property
    def intended_parameters(self) -> int:
        """Trainable numbers, as meant."""
        return sum(row.intended.parameters for row in self.rows if row.intended is not None)

    @property
    def parameters(self) -> int:
        """Trainable numbers that LyCORIS really makes."""
        return sum(row.got.parameters for row in self.rows if row.got is not None)

    @property
    def splits(self) -> tuple[str, ...]:
        """What each LoKr factor did to weights of each shape: "factor 16 of 2432 x 9728: 16 x 16 times 152 x 608, ...".

        The two are w1 and w2 as LyCORIS built them; one that it holds as a product of smaller ones is in brackets. The
        line of the smallest factor comes first. Without modules that did not get their factor.
        """
        counts = Counter(
            (row.got.factor if row.got.factor is not None else row.intended.factor, row.shape, row.got.tensors)
            for row in self.rows
            if row.ok and row.got and row.intended and row.got.algo == LOKR
        )
        lines = []
        for (factor, shape, tensors), count in sorted(counts.items(), key=lambda item: (item[0][0] or 0, item[0][1])):
            asked = "automatic" if factor == AUTO_FACTOR else str(factor)
            sizes = dict(tensors)
            numbers = next(row.got.parameters for row in self.rows if row.got and row.got.tensors == tensors)
            lines.append(
                f"factor {asked} of {_by(shape)}: {_matrix(sizes, '1')} times {_matrix(sizes, '2')}, "
                f"{numbers:,} parameters in each of {count:,}"
            )
        return tuple(lines)

    def require(self) -> None:
        """Raise ConfigError, naming the first difference, unless every module gets what was meant and can train."""
        if self.wrong:
            raise ConfigError(
                f"{self.builder} {self.version} builds {len(self.wrong)} of {len(self.rows)} modules otherwise than "
                f"meant, first {self.wrong[0]}"
            )
        if self.stops:
            raise ConfigError(self.stops[0])


def rows_of(modules: Sequence[Module], intended: Mapping[str, Adapter], got: Mapping[str, Adapter]) -> tuple[Row, ...]:
    """The rows of a check, in the order of the modules; those that the model does not have come last."""
    known = {module.name for module in modules}
    return tuple(
        Row(module.name, module.type, module.shape, intended.get(module.name), got.get(module.name))
        for module in modules
        if module.name in intended or module.name in got
    ) + tuple(Row(name, "", (), adapter, None) for name, adapter in intended.items() if name not in known)


def _matrix(sizes: dict[str, tuple[int, ...]], number: str) -> str:
    """w1 or w2: whole, or what it is the product of."""
    whole = sizes.get(f"lokr_w{number}")
    if whole:
        return _by(whole)
    parts = [shape for name, shape in sizes.items() if name.startswith((f"lokr_w{number}_", f"lokr_t{number}"))]
    return "".join(f"({_by(shape)})" for shape in parts)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
