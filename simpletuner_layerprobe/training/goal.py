"""How many samples this start is to record, on this rank and on all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Goal:
    """samples: the run's total, 0 if the epochs or max_train_steps decide. recorded: those it had before this start,
    counted: these in words.

    kept: those that this rank has kept since. rank, ranks: of this process, and how many there are.
    """

    samples: int
    recorded: int
    counted: str = ""
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    ranks: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    kept: int = 0

    @property
    def quota(self) -> float:
        """How many samples this rank keeps in this start; infinite if the epochs or max_train_steps decide."""
        if not self.samples:
            return float("inf")
        left = max(0, self.samples - self.recorded)
        return left // self.ranks + (self.rank < left % self.ranks)

    @property
    def nothing_to_do(self) -> bool:
        return bool(self.samples) and self.recorded >= self.samples

    @property
    def finished(self) -> bool:
        return self.kept >= self.quota

    def keep(self, count: int) -> int:
        """How many of the next `count` samples are kept; they count from now on."""
        kept = int(min(count, self.quota - self.kept))
        self.kept += kept
        return kept

    def agree(self, epoch_end: bool, asked: bool, device: Callable[[], torch.device]) -> tuple[bool, bool]:
        """What the ranks decide together: (the epoch is over, the run stops). All of them ask at the same step.

        The run stops when one was asked to, or when all have their samples: uneven batches may let one finish first.
        """
        unfinished = not self.finished
        if self.ranks > 1:
            flags = torch.tensor([epoch_end, asked, unfinished], dtype=torch.int32, device=device())
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            epoch_end, asked, unfinished = (bool(flag) for flag in flags.tolist())
        return epoch_end, asked or not unfinished
