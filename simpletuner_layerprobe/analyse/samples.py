"""Samples: the distances of one reading of a run, with what is known of each sample.

Shape letters: N samples, L blocks, C columns of a reading (L, fewer for distances over several blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import Reading, parse_reading


@dataclass(frozen=True)
class Samples:
    """All samples of a run in one reading.

    sigma_N: (N,) noise level, 0 clean .. 1 noise. image_N: (N,) uint64, a number per image, 0 where it is not known.
    blocks: stream -> paths of its L blocks, the image stream first. distances: stream -> (N, C), fractions of pi for
    an angle. reading: its name. facts: name -> (N,), as run/records.py names them. stratified: whether sigmas were
    drawn so that consecutive samples fill the bins evenly. Raises ProbeError if the shapes do not fit.
    """

    sigma_N: NDArray[np.floating]
    image_N: NDArray[np.unsignedinteger]
    blocks: Mapping[str, tuple[str, ...]]
    distances: Mapping[str, NDArray[np.floating]]
    reading: str = "last"
    facts: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    stratified: bool = False
    cells: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # see units.py

    def __post_init__(self) -> None:
        if not self.blocks or self.blocks.keys() != self.distances.keys():
            raise ProbeError(
                f"the samples have distances of the streams {sorted(self.distances)}, blocks of {sorted(self.blocks)}"
            )
        N = len(self.sigma_N)
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
        shapes = {"image": (np.shape(self.image_N), (N,))}
        shapes |= {name: (np.shape(fact_N), (N,)) for name, fact_N in self.facts.items()}
        for name, paths in self.blocks.items():
            shapes[f"the {name} stream"] = (np.shape(self.distances[name]), (N, len(self.kind.columns(paths))))
        for name, (shape, wanted) in shapes.items():
            if shape != wanted:
                raise ProbeError(f"{name} has the shape {shape}, expected {wanted} for {N} samples")

    @cached_property
    def kind(self) -> Reading:
        """What the reading is. Raises ProbeError if there is no such one."""
        return parse_reading(self.reading)

    @property
    def samples(self) -> int:
        return len(self.sigma_N)

    @cached_property
    def images(self) -> int | None:
        """How many different images the samples come from; None if that of any sample is not known."""
        if not self.samples or not np.all(self.image_N):
            return None
        return len(np.unique(self.image_N))

    def require(self) -> None:
        """Raises ProbeError if there are no samples."""
        if not self.samples:
            raise ProbeError("there are no samples yet: probe first, with layerprobe: true in a SimpleTuner config")
