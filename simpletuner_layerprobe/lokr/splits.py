"""What a LoKr factor did: how LyCORIS split the two sides of each weight, and how many numbers train therefore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from simpletuner_layerprobe.lokr.adapter import LOKR
from simpletuner_layerprobe.lokr.factors import AUTO_FACTOR

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.check import Row


def splits(rows: Iterable[Row]) -> tuple[str, ...]:
    """One line for each factor and shape: "factor 16 of 2432 x 9728: 16 x 16 times 152 x 608, ...".

    The two are w1 and w2 as LyCORIS built them; one that it holds as a product of smaller ones is in brackets. The line
    of the smallest factor comes first. Without modules that did not get their factor.
    """
    counts = Counter(
        (row.got.factor if row.got.factor is not None else row.intended.factor, row.shape, row.got.tensors)
        for row in rows
        if row.ok and row.got and row.intended and row.got.algo == LOKR
    )
    lines = []
    for (factor, shape, tensors), count in sorted(counts.items(), key=lambda item: (item[0][0] or 0, item[0][1])):
        asked = "automatic" if factor == AUTO_FACTOR else str(factor)
        sizes = dict(tensors)
        numbers = next(row.got.parameters for row in rows if row.got and row.got.tensors == tensors)
        lines.append(
            f"factor {asked} of {_by(shape)}: {_matrix(sizes, '1')} times {_matrix(sizes, '2')}, "
            f"{numbers:,} parameters in each of {count:,}"
        )
    return tuple(lines)


def _matrix(sizes: dict[str, tuple[int, ...]], number: str) -> str:
    """w1 or w2: whole, or what it is the product of."""
    whole = sizes.get(f"lokr_w{number}")
    if whole:
        return _by(whole)
    parts = [shape for name, shape in sizes.items() if name.startswith((f"lokr_w{number}_", f"lokr_t{number}"))]
    return "".join(f"({_by(shape)})" for shape in parts)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
