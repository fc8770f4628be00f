"""What `layerprobe lokr` says of a plan's size, of its training's memory, and of the other reading of the angle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES
from simpletuner_layerprobe.show.words import blocks_text, size_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.options import PlanOptions
    from simpletuner_layerprobe.api.pages import Plan, Run

MANY_TIMES = 3.0
"""A plan of more than so many times what the run's own config trains is warned of."""


@dataclass(frozen=True)
class Size:
    """A plan's size beside that of what the run's own config trains: None, and `problem`, where that is not known."""

    plan: Plan
    own: int | None
    problem: str

    @classmethod
    def of(cls, plan: Plan) -> Size:
        """Counts what the run's own config trains, for which LyCORIS is imported."""
        try:
            return cls(plan, None if plan.own is None else plan.own.parameters, "")
        except ProbeError as error:
            return cls(plan, None, str(error))

    @property
    def times(self) -> float | None:
        return None if self.own is None else self.plan.parameters / self.own

    @property
    def _share(self) -> float:
        return sum(map(self.plan.block_parameters, self.plan.heaviest())) / self.plan.parameters

    def lines(self) -> Iterator[str]:
        """ "yours now 116,508 (233 kB), this 1,693,672 (3.39 MB), 14.5 times; blocks 0 and 1 hold 73%", and memory."""
        heaviest, memory = self.plan.heaviest(), self.plan.memory
        text = f"this {_amount(self.plan.parameters)}"
        if self.own is not None:
            text = f"yours now {_amount(self.own)}, {text}, {_times(self.plan.parameters / self.own)}"
        if heaviest:
            text += f"; {blocks_text(heaviest)} hold{'s' * (len(heaviest) == 1)} {self._share:.0%}"
        yield f"size     {text}"
        if self.problem:
            yield f"         {self.problem}"
        if memory is not None:
            parts = [("weights", memory.weights), ("gradients", memory.gradients)]
            parts += [] if memory.states is None else [(memory.optimizer, memory.states)]
            said = ", ".join(f"{name} {size_text(size)}" for name, size in parts)
            unknown = f"; what {memory.optimizer} keeps is not known" if memory.states is None else ""
            yield f"memory   {size_text(memory.total)} for its training: {said}{unknown}"

    def as_json(self) -> dict[str, Any]:
        """The same for `lokr --json`."""
        heaviest, memory = self.plan.heaviest(), self.plan.memory
        return {
            "own": None if self.plan.own is None else {"parameters": self.own, "problem": self.problem or None},
            "times_own": self.times,
            "heaviest": {"blocks": list(heaviest), "share": self._share} if heaviest else None,
            "training_bytes": None
            if memory is None
            else {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "states": memory.states,
            },
        }


@dataclass(frozen=True)
class Other:
    """The reading of the angle that a plan does not go by, and what it would decide otherwise.

    blocks: `Run.decided_otherwise`; of a plan with equal factors, which goes by no reading, that of the weighted one of
    its size. of: how many blocks there are.
    """

    reading: str
    blocks: dict[int, tuple[int, int]]
    of: int
    weighted: bool


def other_reading(run: Run, reading: str | None, **options: Unpack[PlanOptions]) -> Other | None:
    """None by ablation, and where only one reading of the angle was recorded."""
    from simpletuner_layerprobe.api.options import EQUAL, WEIGHED, asked_of

    going_by = run.plan_reading(reading, **options)
    other = run.other_reading(going_by)
    if not other:
        return None
    weighted = asked_of(options, "article", weighed=reading is not None).get("direction") != EQUAL
    asked: PlanOptions = options if weighted else {**options, "direction": WEIGHED}
    return Other(other, run.decided_otherwise(other, reading=going_by, **asked), len(run.blocks), weighted)


def other_lines(other: Other | None) -> Iterator[str]:
    """For which blocks the other reading would decide otherwise, and for which most."""
    if other is None:
        return
    text = "" if other.weighted else "equal factors go by none; weighted, "
    text += f"by the {'last token' if other.reading == 'last' else 'mean over the tokens'} "
    if not other.blocks:
        yield f"reading  {text}no block would get anything else"
        return
    many = 2 * len(other.blocks) > other.of
    whom = f"{len(other.blocks)} of {other.of} blocks" if many else blocks_text(tuple(other.blocks))
    ratio = {number: max(pair) / max(1, min(pair)) for number, pair in other.blocks.items()}
    most = max(ratio, key=lambda number: ratio[number])
    here, there = other.blocks[most]
    what = "" if len(other.blocks) == 1 else f"others, most block {most}: "
    yield f"reading  {text}{whom} would get {what}{there:,} parameters for {here:,}"


def other_json(other: Other | None) -> dict[str, Any]:
    """The same for `lokr --json`."""
    if other is None:
        return {"other_reading": None}
    blocks = [{"number": number, "parameters": list(pair)} for number, pair in other.blocks.items()]
    return {"other_reading": {"reading": other.reading, "weighted": other.weighted, "blocks": blocks}}


def _amount(parameters: int) -> str:
    return f"{parameters:,} ({size_text(BF16_BYTES * parameters)})"


def _times(times: float) -> str:
    return "as many" if 0.995 < times < 1.005 else f"{times:.3g} times"
