"""The update that an adapter adds to one weight: exact in float64, and its norm without building it.

A weight of shape (out, in, *kernel) is taken as the matrix (out, in * kernel) that LyCORIS and PEFT work with too.
There a LoKr is kron(w1, w2), a LoHa the product of two matrices number by number, a LoRA one matrix; each of these is
whole, or a product of two narrow ones. The scale is that of the forward pass, alpha / rank, once. (LyCORIS 4.1.3's
`get_diff_weight`, with which it merges, takes it twice for lokr and loha.)
Source: LyCORIS 4.1.3, modules/{lokr,loha,locon}.py, `get_weight`; PEFT 0.21.2, tuners/lora/layer.py,
`get_delta_weight`.

Shape letters: O out, I in times kernel, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import LOKR, LORA

LOHA = "loha"
ROWS_AT_ONCE = 256  # of a LoHa, whose norm needs all of its numbers, but not at the same time

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """A matrix (O, I), whole or a narrow (O, R) times a wide (R, I). Raises ValueError for what does not fit."""

    factors: tuple[Array, ...]

    def __post_init__(self) -> None:
        if any(factor.ndim != 2 for factor in self.factors):
            raise ValueError("expected matrices")
        if len(self.factors) == 2 and self.factors[0].shape[1] != self.factors[1].shape[0]:
            raise ValueError("their ranks differ")

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the matrix."""
        return reduce(np.matmul, self.factors[1:], self.factors[0][start:stop])

    def norm(self) -> float:
        """The Frobenius norm. A narrow factor counts by its triangle alone, which turns into the same length."""
        *narrow, last_RI = self.factors
        if narrow:
            last_RI = np.linalg.qr(narrow[0], mode="r") @ last_RI
        return float(np.linalg.norm(last_RI))


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight.

    algo: "lokr", "loha" or "lora" (also for locon). parts: of lokr w1 and w2, of loha both factors, of lora the matrix.
    scale: what all is multiplied by. parameters: trained numbers, without alpha.
    """

    algo: str
    parts: tuple[Product, ...]
    scale: float
    parameters: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in * kernel) of the weight that it fits."""
        shapes = [part.shape for part in self.parts]
        if self.algo == LOKR:
            return prod(rows for rows, _ in shapes), prod(columns for _, columns in shapes)
        return shapes[0]

    def norm(self) -> float:
        """The Frobenius norm of the update; NaN or infinite if one of its numbers is."""
        if self.algo == LOHA:
            rows = range(0, self.shape[0], ROWS_AT_ONCE)
            parts = [np.linalg.norm(self._hadamard(start, start + ROWS_AT_ONCE)) for start in rows]
            return abs(self.scale) * float(np.linalg.norm(parts))
        return abs(self.scale) * prod(part.norm() for part in self.parts)

    def _hadamard(self, start: int, stop: int) -> Array:
        first, second = self.parts
        return first.rows(start, stop) * second.rows(start, stop)


def lycoris_update(tensors: Mapping[str, Array]) -> Update:
    """The update of LyCORIS's tensors of one module, named as in its files ("lokr_w1", ..., "alpha").

    Without alpha, or with 0, the scale is 1. Raises ConfigError for tensors of no known algorithm, and for those that
    do not fit each other.
    """
    kinds = {
        "lokr": lambda: (LOKR, (_lokr(tensors, "lokr_w1"), _lokr(tensors, "lokr_w2"))),
        "hada": lambda: (LOHA, (_loha(tensors, 1), _loha(tensors, 2))),
        "lora": lambda: (LORA, (_locon(tensors),)),
    }
    alpha = tensors.get("alpha")
    if any(tensor.size == 0 for tensor in tensors.values()) or (alpha is not None and alpha.size != 1):
        raise ConfigError("has an empty tensor, or an alpha that is not a number")
    trained = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
    kind = {name[:4] for name in trained}
    if len(kind) != 1 or not kind <= kinds.keys():
        raise ConfigError(f"has the tensors {', '.join(sorted(trained)) or 'alpha alone'}: of no known algorithm")
    try:
        algo, parts = kinds[kind.pop()]()
        if len({part.shape for part in parts}) > 1 and algo == LOHA:
            raise ValueError("its factors differ in shape")
    except KeyError as error:
        raise ConfigError(f"lacks {error.args[0]}") from None
    except ValueError as error:
        raise ConfigError(f"has tensors that do not fit each other ({error})") from None
    rank = _rank(tensors)
    scale = float(alpha.reshape(())) / rank if rank and alpha is not None and alpha.any() else 1.0
    return Update(algo, parts, scale, sum(tensor.size for tensor in trained.values()))


def _rank(tensors: Mapping[str, Array]) -> int | None:
    """The rank that alpha is divided by, as LyCORIS reads it off the shapes; None for a LoKr without one."""
    if "hada_w1_b" in tensors or "lora_down" in tensors:
        return tensors["hada_w1_b" if "hada_w1_b" in tensors else "lora_down"].shape[0]
    if "lokr_w1_a" in tensors:
        return tensors["lokr_w1_a"].shape[1]
    if "lokr_t2" in tensors:
        return tensors["lokr_t2"].shape[0]
    return tensors["lokr_w2_a"].shape[1] if "lokr_w2_a" in tensors else None


def _lokr(tensors: Mapping[str, Array], name: str) -> Product:
    """One half of a LoKr; a Tucker core makes its factors lie the other way."""
    if name in tensors:
        return Product((_flat(tensors[name]),))
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    core = tensors.get("lokr_t2") if name == "lokr_w2" else None
    return Product((left, _flat(right))) if core is None else _tucker(core, left.T, right)


def _loha(tensors: Mapping[str, Array], number: int) -> Product:
    left, right = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    core = tensors.get(f"hada_t{number}")
    return Product((left, _flat(right))) if core is None else _tucker(core, left.T, right)


def _locon(tensors: Mapping[str, Array]) -> Product:
    up, down = _flat(tensors["lora_up"]), tensors["lora_down"]
    core = tensors.get("lora_mid")
    return Product((up, _flat(down))) if core is None else _tucker(core, up, _flat(down))


def _tucker(core: Array, up_OR: Array, down_RI: Array) -> Product:
    """up (O, R) and down (R, I) on the first two axes of the core (R, R, *kernel)."""
    if core.ndim < 3 or core.shape[:2] != (up_OR.shape[1], down_RI.shape[0]):
        raise ValueError("the Tucker core has another rank")
    return Product((_flat(np.einsum("mn...,om,ni->oi...", core, up_OR, down_RI)),))


def _flat(tensor: Array) -> Array:
    """(O, I, *kernel) as (O, I * kernel)."""
    if tensor.ndim < 2:
        raise ValueError("expected a matrix")
    return tensor.reshape(tensor.shape[0], -1)
