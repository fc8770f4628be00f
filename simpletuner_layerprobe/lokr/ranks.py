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

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.config import Planned, article_plan
from simpletuner_layerprobe.probe.families import Target, lies_at
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

    See `Ladder`. value_L: (L,) contributions. Raises ProbeError for fewer parameters than rank 1 everywhere has.
    """
    return Ladder(algo, blocks, targets, modules, parameters).nearest(
        np.asarray(factor_L, dtype=np.float64), np.asarray(value_L, dtype=np.float64)
    )


class Ladder:
    """Ranks for a number of parameters; what does not depend on the contributions is worked out once.

    The assignments considered form one chain: from rank 1 everywhere, one level of one block rises by one rank at a
    time, always the one that is furthest behind its share 1 / (factor * level); among equals the block of the larger
    contribution, then the earlier level and block. So a block that contributes more never has the smaller rank within a
    level, and the chain's totals are known exactly: the nearest one is found by search, and its two neighbours bound
    what any other assignment of the chain could do. A module stops at its `rank_limit`. limit_L2: the rank at which all
    modules of a level have stopped. Raises ProbeError for fewer parameters than rank 1 everywhere has.
    """

    def __init__(
        self, algo: str, blocks: Sequence[str], targets: Sequence[Target], modules: Sequence[Module], parameters: int
    ) -> None:
        self.parameters = parameters
        self.limit_L2 = rank_limits(algo, blocks, targets, modules)
        groups = list(_groups(algo, blocks, targets, modules))
        self._block_G = np.array([block for block, _, _ in groups])
        self._level_G = np.array([level for _, level, _ in groups])
        self._limit_G = self.limit_L2[self._block_G, self._level_G]
        # The parameters of a group at every rank from 0 on; from its limit on they stay.
        self._total_GN = np.zeros((len(groups), int(self._limit_G.max()) + 1), dtype=np.int64)
        for total_N, (_, _, members) in zip(self._total_GN, groups, strict=True):
            for one in members:
                rank_N = np.minimum(np.arange(len(total_N)), rank_limit(algo, one.shape))
                total_N += rank_N * _parameters_per_rank(algo, one)
        self._place_G = np.arange(len(groups))
        least = int(self._total_GN[:, 1].sum())
        if parameters < least:
            raise ProbeError(
                f"{parameters:,} parameters are fewer than rank 1 everywhere has, {least:,}; give a larger budget"
            )

    def ranks(self, factor_RL: NDArray[np.float64], value_RL: NDArray[np.float64]) -> NDArray[np.int64]:
        """(R, L, 2) the ranks for R sets of factors and contributions."""
        return np.array([self.nearest(*pair).rank_L2 for pair in zip(factor_RL, value_RL, strict=True)])

    def nearest(self, factor_L: NDArray[np.float64], value_L: NDArray[np.float64]) -> Budgeted:
        """The assignment of the chain whose total is nearest, the one with fewer parameters among equals."""
        divisor_G = _divisors(factor_L)[self._block_G, self._level_G]
        # A group takes its next rank when the water reaches (rank + 0.5) * divisor.
        low, high = 0.0, float((self._limit_G * divisor_G).max())
        while (middle := (low + high) / 2) not in (low, high):
            if self._total(self._rank_G(divisor_G, middle)) < self.parameters:
                low = middle
            else:
                high = middle
        rank_G = self._rank_G(divisor_G, low)
        tied = self._next(divisor_G, value_L, rank_G, up_to=high)
        totals = [self._total(rank_G)]
        for group in tied:
            totals.append(totals[-1] + self._cost(group, int(rank_G[group]) + 1))
        count = int(np.searchsorted(totals, self.parameters))
        if count == len(totals) or (count and self.parameters - totals[count - 1] <= totals[count] - self.parameters):
            count -= 1
        lower, upper = (totals[count - 1] if count else None), None
        if not count and (rank_G > 1).any():
            key_G = np.where(rank_G > 1, (rank_G - 0.5) * divisor_G, -np.inf)
            last = max(self._place_G.tolist(), key=lambda group: (key_G[group], *self._order(value_L, group)))
            lower = totals[0] - self._cost(last, int(rank_G[last]))
        if count + 1 < len(totals):
            upper = totals[count + 1]
        else:
            ahead = rank_G.copy()
            ahead[tied] += 1
            following = self._next(divisor_G, value_L, ahead)
            upper = totals[-1] + self._cost(following[0], int(ahead[following[0]]) + 1) if following else None
        rank_G[tied[:count]] += 1
        rank_L2 = np.ones_like(self.limit_L2)
        rank_L2[self._block_G, self._level_G] = rank_G
        return Budgeted(rank_L2, totals[count], lower, upper)

    def _rank_G(self, divisor_G: NDArray[np.float64], water: float) -> NDArray[np.int64]:
        """The ranks of the groups when all rises up to this water have been made."""
        rank_G = np.clip(np.floor(water / divisor_G + 0.5).astype(np.int64), 1, self._limit_G)
        # The quotient is rounded; what counts is the product.
        rank_G = np.where((rank_G > 1) & ((rank_G - 0.5) * divisor_G > water), rank_G - 1, rank_G)
        return np.where((rank_G < self._limit_G) & ((rank_G + 0.5) * divisor_G <= water), rank_G + 1, rank_G)

    def _next(
        self,
        divisor_G: NDArray[np.float64],
        value_L: NDArray[np.float64],
        rank_G: NDArray[np.int64],
        up_to: float = np.inf,
    ) -> list[int]:
        """The groups whose next rise comes by this water, in the order of their rises."""
        key_G = np.where(rank_G < self._limit_G, (rank_G + 0.5) * divisor_G, np.inf)
        return sorted(
            np.flatnonzero((key_G <= up_to) & np.isfinite(key_G)).tolist(),
            key=lambda group: (key_G[group], *self._order(value_L, group)),
        )

    def _order(self, value_L: NDArray[np.float64], group: int) -> tuple[float, int, int]:
        return -float(value_L[self._block_G[group]]), int(self._level_G[group]), int(self._block_G[group])

    def _total(self, rank_G: NDArray[np.int64]) -> int:
        return int(self._total_GN[self._place_G, rank_G].sum())

    def _cost(self, group: int, rank: int) -> int:
        """The parameters that a group's rise to this rank takes."""
        return int(self._total_GN[group, rank] - self._total_GN[group, rank - 1])


def rank_limits(
    algo: str, blocks: Sequence[str], targets: Sequence[Target], modules: Sequence[Module]
) -> NDArray[np.int64]:
    """(L, 2) the rank from which on no module of a block's level changes any more; 1 for a level without modules."""
    limit_L2 = np.ones((len(blocks), len(LEVELS)), dtype=np.int64)
    for block, level, members in _groups(algo, blocks, targets, modules):
        limit_L2[block, level] = max(rank_limit(algo, one.shape) for one in members)
    return limit_L2


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
