"""The table of blocks: what each is worth and what a plan gives it. `lokr`, its JSON and the report show the same rows.

Shape letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simpletuner_layerprobe.readings import WHOLE


@dataclass(frozen=True)
class BlockRow:
    """One block of a plan.

    number, block: its place among all blocks and its path. contribution: in [0, 1]; interval: its 95% interval; None
    for a plan without a run. measured: False if it took the contribution of the nearest block that all streams have.
    critical: the streams in which it sticks out, or "" if it was named so. numbers: kind of modules -> LoKr factor or
    rank, as the table has them; groups: of each group of modules; both empty for a block that is left out. agreement:
    kind -> share of the replicates that decide the same. unsettled: the kinds that are not settled. parameters:
    trainable ones, None if they are not known.
    """

    number: int
    block: str
    contribution: float | None
    interval: tuple[float, float] | None
    measured: bool
    critical: tuple[str, ...]
    numbers: Mapping[str, int]
    groups: Mapping[str, int]
    agreement: Mapping[str, float]
    unsettled: tuple[str, ...]
    parameters: int | None

    @property
    def settled(self) -> bool | None:
        """Whether all numbers of the block are; None where there is nothing to judge."""
        return not self.unsettled if self.agreement else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What else is to be said of the block, in words."""
        notes = []
        if self.unsettled:
            which = f": {', '.join(self.unsettled)}" if len(self.unsettled) < len(self.numbers) else ""
            notes.append(f"NOT settled{which}")
        if self.critical:
            where = [name for name in self.critical if name not in ("", WHOLE)]
            notes.append(f"critical ({', '.join(where)})" if where else "critical")
        if not self.measured:
            notes.append("contribution of the nearest block")
        if not self.numbers:
            notes.append("frozen")
        return tuple(notes)
