"""The adapter of one module: what an algorithm trains there at a number, a LoKr factor or a rank.

LyCORIS's lokr goes by factors; its loha and locon and PEFT's lora go by ranks. A factor divides and a rank counts, so
that factor f stands for one f-th of the largest rank. Alpha is the rank, so that every change has the scale 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt, prod

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.factors import achieved_factor, factor_steps

LOKR, LORA = "lokr", "lora"
LARGEST_RANK = {"locon": 64, "loha": 32, LORA: 64}
"""The algorithms with ranks, and the rank that factor 1 stands for unless another is asked for: SimpleTuner's own."""
ALGORITHMS = (LOKR, *LARGEST_RANK)


@dataclass(frozen=True)
class Adapter:
    """What trains beside one module.

    algo: LyCORIS's name for it ("lora" also for "locon"). factor: the LoKr factor asked for, None if the
    algorithm has none or it is not known (LyCORIS keeps only the shapes). tensors: (name, shape) of every
    trainable tensor. scale: what its output is multiplied by (for OFT and BOFT the constraint).
    """

    algo: str
    factor: int | None
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    scale: float = 1.0

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(prod(shape) for _, shape in self.tensors)

    @property
    def factorisation(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """LoKr's split, ((out_l, out_k), (in_m, in_n)): w1 is out_l x in_m. None without a full w1 and w2."""
        shapes = dict(self.tensors)
        if "lokr_w1" not in shapes or "lokr_w2" not in shapes:
            return None
        w1, w2 = shapes["lokr_w1"], shapes["lokr_w2"]
        return (w1[0], w2[0]), (w1[1], w2[1])

    def same_as(self, other: Adapter) -> bool:
        """Whether both train the same: the factor that was asked for does not count, what came of it does."""
        return (self.algo, self.tensors, self.scale) == (other.algo, other.tensors, other.scale)

    def __str__(self) -> str:
        factor = "" if self.factor is None else f" factor {self.factor}"
        shapes = " + ".join("x".join(map(str, shape)) for _, shape in self.tensors)
        scale = "" if self.scale == 1 else f" scale {self.scale:g}"
        return f"{self.algo}{factor} ({shapes}){scale}"


def planned_adapter(algo: str, shape: tuple[int, ...], number: int) -> Adapter:
    """What a factor or a rank, 1 or more, means for a weight of shape (out, in, *kernel), worked out without LyCORIS.

    A rank stops at `rank_limit`.
    """
    out_dimension, in_dimension, *kernel = shape
    if algo == LOKR:
        out_part, in_part = achieved_factor(out_dimension, number), achieved_factor(in_dimension, number)
        w2 = (out_dimension // out_part, in_dimension // in_part, *kernel)
        return Adapter(LOKR, number, (("lokr_w1", (out_part, in_part)), ("lokr_w2", w2)))
    rank = min(number, rank_limit(algo, shape))
    if algo == "loha":
        a, b = (out_dimension, rank), (rank, in_dimension * prod(kernel))
        return Adapter(algo, None, (("hada_w1_a", a), ("hada_w1_b", b), ("hada_w2_a", a), ("hada_w2_b", b)))
    names = ("lora_A.weight", "lora_B.weight") if algo == LORA else ("lora_down.weight", "lora_up.weight")
    down, up = (rank, in_dimension, *kernel), (out_dimension, rank, *(1 for _ in kernel))
    return Adapter(LORA, None, ((names[0], down), (names[1], up)))


def rank_limit(algo: str, shape: tuple[int, ...]) -> int:
    """The rank from which on a weight of this shape can change in every way; more would be wasted.

    LoHa multiplies two matrices of rank r, which gives up to r * r.
    """
    full = min(shape[0], prod(shape[1:]))
    return isqrt(full - 1) + 1 if algo == "loha" else full


def settings(algo: str, number: int) -> dict[str, int]:
    """The settings of a module in a LyCORIS config."""
    return {"factor": number} if algo == LOKR else {"dim": number, "alpha": number}


def steps(algo: str, shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The numbers that a plan chooses from for weights of these shapes, from the most parameters to the fewest.

    Factors: all that make a difference. Ranks: up to the largest limit, four to an octave.
    """
    shapes = tuple(shapes)
    if algo == LOKR:
        return factor_steps(size for shape in shapes for size in shape[:2])
    limit = max(rank_limit(algo, shape) for shape in shapes)
    ranks = {leading << octave for octave in range(limit.bit_length()) for leading in (1, 2, 3, 5, 7)}
    return tuple(sorted({rank for rank in ranks if rank < limit} | {limit}, reverse=True))


def article_number(algo: str, factor: int, largest: int | None) -> int:
    """The article's factor, or the rank that it stands for: one factor-th of the largest, halves to even, at least 1.

    largest: None for LARGEST_RANK. Raises ConfigError for a largest rank below 1.
    """
    if algo == LOKR:
        return factor
    largest = LARGEST_RANK[algo] if largest is None else largest
    if largest < 1:
        raise ConfigError(f"the largest rank is {largest}; it must be a whole number, 1 or more")
    return max(1, round(largest / factor))
