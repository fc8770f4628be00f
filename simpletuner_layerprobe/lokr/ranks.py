"""Contributions to ranks: LyCORIS's LoHa and LoCon, and PEFT's LoRA, with a rank of its own for every module.

A factor divides and a rank counts: where a block would get the LoKr factor f, its feed-forward and modulation get
one f-th of the largest rank and its attention half of that. Alpha is the rank throughout, so that every module's
change has the scale 1. Shape letters: L blocks, 2 levels (a Target's `at_factor` and `at_double`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from math import isqrt, prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.families import Target, lies_at
from simpletuner_layerprobe.lokr.config import Planned, article_plan
from simpletuner_layerprobe.run.manifest import Module

LEVELS = (1, 2)
"""A block's factor is multiplied, and so its rank divided, by this: `at_factor`, `at_double`."""
LARGEST_RANK = {"locon": 64, "loha": 32, "lora": 64}
"""The rank algorithms, and the rank that factor 1 stands for unless another is asked for: SimpleTuner's defaults."""


@dataclass(frozen=True)
class PlannedRank:
    """One module of a plan by ranks: its name and weight shape in the denoiser, the algorithm, rank and alpha."""

    name: str
    shape: tuple[int, ...]
    algo: str
    rank: int

    @property
    def alpha(self) -> int:
        return self.rank

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of every trainable tensor, as the algorithm makes them for a weight of this shape."""
        out_dimension, in_dimension, *kernel = self.shape
        rank = self.rank
        if self.algo == "loha":
            a, b = (out_dimension, rank), (rank, in_dimension * prod(kernel))
            return (("hada_w1_a", a), ("hada_w1_b", b), ("hada_w2_a", a), ("hada_w2_b", b))
        down, up = (rank, in_dimension, *kernel), (out_dimension, rank, *(1 for _ in kernel))
        names = ("lora_A.weight", "lora_B.weight") if self.algo == "lora" else ("lora_down.weight", "lora_up.weight")
        return (names[0], down), (names[1], up)

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(prod(shape) for _, shape in self.tensors)


def rank_limit(algo: str, shape: tuple[int, ...]) -> int:
    """The rank from which on a weight of this shape can change in every way; more would be wasted.

    LoHa multiplies two matrices of rank r, which gives up to r * r.
    """
    full = min(shape[0], prod(shape[1:]))
    return isqrt(full - 1) + 1 if algo == "loha" else full


def ranks_from_factors(factor_L: ArrayLike, largest: int) -> NDArray[np.int64]:
    """(L, 2) ranks of each block's two levels: largest / (factor * level), halves to even, at least 1.

    factor_L: (L,) numbers, 1 or more. Raises ProbeError for a largest rank or a factor below 1.
    """
    if largest < 1:
        raise ProbeError(f"the largest rank is {largest}; it must be a whole number, 1 or more")
    return np.maximum(1, np.round(largest / _divisors(factor_L))).astype(np.int64)


@dataclass(frozen=True)
class Budgeted:
    """Ranks for a number of parameters. rank_L2: (L, 2). reached: their parameters. lower, upper: those of the
    nearest assignments of the kind with fewer and with more; None if there is none."""

    rank_L2: NDArray[np.int64]
    reached: int
    lower: int | None
    upper: int | None


def ranks_for_budget(
    algo: str,
    factor_L: ArrayLike,
    value_L: ArrayLike,
    blocks: Sequence[str],
    targets: Sequence[Target],
    modules: Sequence[Module],
    parameters: int,
) -> Budgeted:
    """The ranks whose total lies nearest to `parameters`, of those that keep the proportions of the factors.

    The assignments considered form one chain: from rank 1 everywhere, one level of one block rises by one rank at a
    time, always the one that is furthest behind its share 1 / (factor * level); among equals the block of the larger
    contribution, then the earlier level and block. So a block that contributes more never has the smaller rank within a
    level, and the chain's totals are known exactly: the nearest one is found by search, and its two neighbours bound
    what any other assignment of the chain could do. A module stops at its `rank_limit`. value_L: (L,) contributions.
    Raises ProbeError for fewer parameters than rank 1 everywhere has.
    """
    divisor_L2, value = _divisors(factor_L), np.asarray(value_L, dtype=np.float64)
    rising: list[tuple[float, float, int, int, int]] = []
    total = 0
    for block, level, members in _groups(algo, blocks, targets, modules):
        costs = sorted((rank_limit(algo, one.shape), _parameters_per_rank(algo, one)) for one in members)
        step = sum(cost for _, cost in costs)
        total += step
        rank = 1
        for limit, cost in costs:
            # Up to the smallest limit all of the group's modules grow, then one fewer, and so on.
            rising += [
                ((raised - 0.5) * float(divisor_L2[block, level]), -float(value[block]), level, block, step)
                for raised in range(rank + 1, limit + 1)
            ]
            rank = max(rank, limit)
            step -= cost
    if parameters < total:
        raise ProbeError(
            f"{parameters:,} parameters are fewer than rank 1 everywhere has, {total:,}; give a larger budget"
        )
    rising.sort(key=lambda event: event[:4])
    totals = total + np.concatenate([[0], np.cumsum([event[4] for event in rising], dtype=np.int64)])
    count = int(np.searchsorted(totals, parameters))
    if count == totals.size or (count and parameters - totals[count - 1] <= totals[count] - parameters):
        count -= 1
    rank_L2 = np.ones(divisor_L2.shape, dtype=np.int64)
    for _, _, level, block, _ in rising[:count]:
        rank_L2[block, level] += 1
    return Budgeted(
        rank_L2,
        int(totals[count]),
        int(totals[count - 1]) if count else None,
        int(totals[count + 1]) if count + 1 < totals.size else None,
    )


def rank_plan(
    algo: str, blocks: Sequence[str], rank_L2: ArrayLike, targets: Sequence[Target], modules: Sequence[Module]
) -> tuple[PlannedRank, ...]:
    """The rank that each module is meant to get, in the table's order: its level's, at most its `rank_limit`.

    The written config takes no part. PEFT's LoRA covers linear layers only (SimpleTuner's `init_lora` fills no others).
    Raises ProbeError as `article_plan` does.
    """
    ranks = np.asarray(rank_L2)
    at = {
        one.name: int(ranks[block, level])
        for block, level, members in _groups(algo, blocks, targets, modules)
        for one in members
    }
    return tuple(
        PlannedRank(module.name, module.shape, algo, min(at[module.name], rank_limit(algo, module.shape)))
        for module in modules
        if module.name in at
    )


def rank_config(
    algo: str,
    blocks: Sequence[str],
    rank_L2: ArrayLike,
    targets: Sequence[Target],
    modules: Sequence[Module] = (),
) -> dict[str, Any]:
    """The LyCORIS config of a plan by ranks: `dim` and `alpha` by name, as `article_config` does it for factors.

    A module that its level's rank is too large for is named before the patterns. Without a module table there are none.
    The same input gives the same file, byte for byte. Raises ProbeError for an algorithm that is not LyCORIS's.
    """
    if algo not in ("locon", "loha"):
        raise ProbeError(f"the algorithm is {algo!r}; expected locon or loha")
    ranks = np.asarray(rank_L2)
    name_algo_map: dict[str, dict[str, int]] = {}
    if modules:
        for place, level, members in _groups(algo, blocks, targets, modules):
            for one in members:
                limit = rank_limit(algo, one.shape)
                if limit < ranks[place, level]:
                    name_algo_map[escape(one.name)] = {"dim": limit, "alpha": limit}
    for number, block in enumerate(blocks):
        target = next(one for one in targets if lies_at(block, one.blocks))
        for level, patterns in enumerate((target.at_factor, target.at_double)):
            rank = int(ranks[number, level])
            name_algo_map |= {f"{escape(block)}.{pattern}": {"dim": rank, "alpha": rank} for pattern in patterns}
    largest = int(ranks.max())
    return {
        "algo": algo,
        "multiplier": 1.0,
        "linear_dim": largest,
        "linear_alpha": largest,
        "apply_preset": {"use_fnmatch": True, "target_module": [], "name_algo_map": name_algo_map},
    }


def _parameters_per_rank(algo: str, one: Planned) -> int:
    return PlannedRank(one.name, one.shape, algo, 1).parameters


def _divisors(factor_L: ArrayLike) -> NDArray[np.float64]:
    """(L, 2) what the largest rank is divided by at each level of each block."""
    factors = np.asarray(factor_L, dtype=np.float64)
    if factors.ndim != 1 or not (factors >= 1).all():
        raise ProbeError("factors must be one number per block, 1 or more")
    return factors[:, None] * np.array(LEVELS)


def _groups(
    algo: str, blocks: Sequence[str], targets: Sequence[Target], modules: Sequence[Module]
) -> Iterator[tuple[int, int, list[Planned]]]:
    """(block number, level, its modules in the table's order), levels without a module left out."""
    number_of = {block: number for number, block in enumerate(blocks)}
    found: dict[tuple[int, int], list[Planned]] = {}
    # With factor 1 for every block, the factor of a module is the multiple that its level gives it.
    for one in article_plan(blocks, [1] * len(blocks), targets, modules):
        if algo == "lora" and len(one.shape) != 2:
            continue
        parts = one.name.split(".")
        block = next(path for count in range(len(parts) - 1, 0, -1) if (path := ".".join(parts[:count])) in number_of)
        found.setdefault((number_of[block], LEVELS.index(one.factor)), []).append(one)
    for block_number, level in sorted(found):
        yield block_number, level, found[block_number, level]
