"""Rows: N recorded samples in memory, all numpy.

Shape letters: N samples, C columns (a stream's blocks, or fewer for a reading over several blocks in a row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.manifest import Manifest

FACTS: dict[str, np.dtype[Any]] = {
    "image": np.dtype(np.uint64),
    "repeat": np.dtype(np.int32),
    "caption_words": np.dtype(np.int32),
    "caption_characters": np.dtype(np.int32),
    "text_tokens": np.dtype(np.int32),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "crop_top": np.dtype(np.int32),
    "crop_left": np.dtype(np.int32),
    "dropped": np.dtype(np.int8),
    "backend": np.dtype(object),
}
"""What is known of a sample beside its sigma, loss and distances.

image: 64-bit hash of the data backend and the file path. repeat: how often this image came before in this run, from 0.
caption_words, caption_characters: of the caption that the model got. text_tokens: the valid ones, where a mask says
them. width, height: pixels. crop_top, crop_left: the crop's origin in pixels. dropped: 1 if the caption was dropped,
else 0. backend: the data backend's id.
"""

UNKNOWN: dict[str, Any] = dict.fromkeys(FACTS, -1) | {"image": 0, "width": 0, "height": 0, "backend": ""}
"""The value of a fact that is not known."""


def image_hash(backend: str, path: str) -> int:
    """The `image` fact of a file: 64 bits of BLAKE2b over the backend's id and the file's path, never 0."""
    digest = hashlib.blake2b(f"{backend}\0{path}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") or 1


def column_name(stream: str, reading: str) -> str:
    """The name of the column with one stream's distances in one reading."""
    return f"{stream}.{reading}"


@dataclass(frozen=True)
class Rows:
    """N recorded samples. Building them checks nothing; `validate` does.

    sigma_N: float64 in [0, 1]. loss_N: float32, NaN if unknown. facts: name of FACTS -> (N,); those that are left out
    are filled with their value of UNKNOWN. distances: (stream, reading), such as ("image", "last"), -> (N, C) angular
    distances, or what a further reading gives, float32, or float64 where float32 would change a value; NaN and
    infinity are allowed here and counted by whoever averages.
    """

    sigma_N: NDArray[np.float64]
    loss_N: NDArray[np.float32]
    facts: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    distances: Mapping[tuple[str, str], NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.facts if name not in FACTS]
        if unknown:
            raise RunError(f"the rows have the fact {unknown[0]!r:.80}; expected of {', '.join(FACTS)}")
        count = len(self.sigma_N)
        facts = {
            name: np.asarray(self.facts[name], dtype) if name in self.facts else np.full(count, UNKNOWN[name], dtype)
            for name, dtype in FACTS.items()
        }
        object.__setattr__(self, "facts", facts)

    def __len__(self) -> int:
        return len(self.sigma_N)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Everything by the name of its column in a run."""
        named = {column_name(*key): distance_NC for key, distance_NC in self.distances.items()}
        return {"sigma": self.sigma_N, "loss": self.loss_N, **self.facts, **named}

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """The rows of several, at least one, in order; all must have the same distances."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return Rows(
            np.concatenate([part.sigma_N for part in parts]),
            np.concatenate([part.loss_N for part in parts]),
            {name: np.concatenate([part.facts[name] for part in parts]) for name in FACTS},
            {key: np.concatenate([part.distances[key] for part in parts]) for key in first.distances},
        )

    def validate(self, manifest: Manifest) -> None:
        """Check shapes, dtypes and ranges against the manifest; RunError for the first that is wrong."""
        count = len(self)
        _check_array("sigma", self.sigma_N, (np.float64,), (count,))
        _check_array("loss", self.loss_N, (np.float32,), (count,))
        columns = manifest.columns()
        if self.distances.keys() != columns.keys():
            raise RunError(f"the rows have distances for {_keys(self.distances)}; the manifest has {_keys(columns)}")
        for key, blocks in columns.items():
            _check_array(column_name(*key), self.distances[key], (np.float32, np.float64), (count, len(blocks)))
        for name, fact_N in self.facts.items():
            _check_array(name, fact_N, (FACTS[name].type,), (count,))
        for name, values_N in {"sigma": self.sigma_N, **self.facts}.items():
            problem = out_of_range(name, values_N)
            if problem:
                raise RunError(f"the rows' {problem}")


def out_of_range(name: str, values_N: NDArray[Any]) -> str:
    """What is wrong with a column, "" if nothing is: a sigma outside [0, 1], a fact below its unknown value."""
    if name == "sigma":
        # "Not all inside" rather than "any outside": a NaN is neither below nor above.
        outside_N = ~((values_N >= 0) & (values_N <= 1))
        return f"sigma holds {values_N[outside_N][0]}; expected 0 to 1" if outside_N.any() else ""
    if name == "backend":
        strings = all(isinstance(value, str) for value in set(values_N.tolist()))
        return "" if strings else "backend holds something else than strings; expected strings"
    if name in FACTS and len(values_N) and values_N.min() < UNKNOWN[name]:
        return f"{name} holds {values_N.min()}; expected at least {UNKNOWN[name]}"
    return ""


def _check_array(name: str, array: object, dtypes: tuple[type[Any], ...], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.type not in dtypes or array.shape != shape:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        wanted = f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)} {shape}"
        raise RunError(f"the rows' {name} is {got}; expected {wanted}")


def _keys(keys: Mapping[tuple[str, str], object]) -> str:
    return ", ".join(sorted(map(".".join, keys))) or "nothing"
