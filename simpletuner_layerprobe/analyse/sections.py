"""Sections: the findings of one kind in one stream, as data, as JSON and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simpletuner_layerprobe.analyse.conditions import ASPECT, BACKEND, CAPTION, CONDITIONS, DROPPED, SIZE
from simpletuner_layerprobe.readings import all_blocks

ALPHA = 0.05
"""The chance that a run in which there is nothing to find shows anything, islands aside."""
SHAPES = ("critical", "gradients", "two-ended", "least", "needed", "hardly")
KINDS = ("critical", "islands", "gradients", "two-ended", "least", *CONDITIONS)
ABLATION_KINDS = ("needed", "hardly", "told")
"""Of runs with ablation."""
KIND_ALPHA = {**dict.fromkeys(SHAPES, 0.0025), **dict.fromkeys(CONDITIONS, 0.005)}
"""What each kind may take, over all blocks and streams. They add up to 0.04: chances are estimates."""

TITLES = {
    "critical": "Critical blocks",
    "islands": "Task islands",
    "gradients": "Task gradients",
    "two-ended": "Two-ended blocks",
    "least": "Least contributing blocks",
    "needed": "Blocks the loss needs",
    "hardly": "Blocks whose leaving out hardly hurts",
    "told": "How far the angle tells what the loss needs",
    CAPTION: "Caption length",
    SIZE: "Image size",
    ASPECT: "Aspect",
    DROPPED: "Dropped captions",
    BACKEND: "Data backend",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows.

    kind: one of KINDS or ABLATION_KINDS. stream: or WHOLE, of whole blocks. blocks: paths in the model, more than one
    for an island. low_sigma, high_sigma: the part of sigma it speaks of. effect, low, high: the number of the kind
    (docs/findings.md) and its 95% interval, in `unit`. p: the chance of it without an effect, corrected for all blocks
    and streams of the kind; None for an island. share: of the replicates that show it; None for a condition. level:
    mean angular distance (of an ablation, loss increase) of the blocks. samples: behind it. value: the data backend.
    """

    kind: str
    stream: str
    blocks: tuple[str, ...]
    low_sigma: float
    high_sigma: float
    effect: float
    low: float
    high: float
    unit: str
    p: float | None
    share: float | None
    level: float
    samples: int
    value: str = ""


@dataclass(frozen=True)
class Section:
    """All findings of one kind in one stream, the surest first.

    samples: that were looked at. missing: why nothing can be said ("not enough samples: ..."), else "". notes: what
    else the reader should know. text: what is said of all blocks together, where that is the finding.
    """

    kind: str
    stream: str
    findings: tuple[Finding, ...]
    samples: int
    missing: str = ""
    notes: tuple[str, ...] = ()
    text: str = ""

    @property
    def empty(self) -> bool:
        """Whether it shows nothing."""
        return not (self.findings or self.text)


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The sections as JSON values; numbers that are not finite are null."""
    return {"alpha": ALPHA, "kind_alpha": KIND_ALPHA, "sections": [plain(asdict(section)) for section in sections]}


def plain(value: Any) -> Any:
    """Values of JSON: arrays and tuples become lists, numbers that are not finite None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def words(finding: Finding) -> str:
    """The finding without the names of its blocks: "rises from clean to noise by 0.12 [0.11, 0.13] ..."."""
    f = finding
    if f.kind == "critical":
        return f"changes the hidden states far more than the other blocks: {_between(f.effect, f.low, f.high)}"
    if f.kind == "islands":
        return f"lie {_between(f.effect, f.low, f.high)} above the median block, themselves at {f.level:.3g}"
    if f.kind == "gradients":
        verb = "rises" if f.effect > 0 else "falls"
        size = _between(*((f.effect, f.low, f.high) if f.effect > 0 else (-f.effect, -f.high, -f.low)))
        return f"{verb} from clean to noise by {size}, around a mean of {f.level:.3g}"
    if f.kind == "two-ended":
        return f"is {_between(f.effect, f.low, f.high)} higher or more at both ends of sigma than between"
    if f.kind == "least":
        share = f"{100 * f.effect:.3g}% [{100 * max(f.low, 0):.3g}, {100 * f.high:.3g}]"
        return f"does {share} of what the median block does ({f.level:.3g})"
    if f.kind == "needed":
        times = f"{_between(f.effect, f.low, f.high)} times as much as the median block"
        where = f"most at sigma {f.low_sigma:.3g} to {f.high_sigma:.3g}"
        return f"is missed {times} (the loss rises by {f.level:.3g} without it), {where}"
    if f.kind == "hardly":
        share = f"{100 * f.effect:.3g}% [{100 * f.low:.3g}, {100 * f.high:.3g}]"
        return f"is missed {share} as much as the median block (the loss rises by {f.level:.3g} without it)"
    size = f"{100 * f.effect:+.3g}% [{100 * f.low:+.3g}, {100 * f.high:+.3g}]"
    return {
        CAPTION: f"{size} from shorter to longer captions",
        SIZE: f"{size} from smaller to larger images",
        ASPECT: f"{size} from squarer to longer images",
        DROPPED: f"{size} where the caption was dropped",
        BACKEND: f"{size} on {f.value} compared with the other data",
    }[f.kind]


def _between(effect: float, low: float, high: float) -> str:
    return f"{effect:.3g} [{low:.3g}, {high:.3g}]"


def chance(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-6 else "p < 1e-6"


def sureness(finding: Finding) -> str:
    """How sure it is: "p = 0.0005", of an island "in 97% of the replicates"."""
    return f"in {finding.share:.0%} of the replicates" if finding.p is None else chance(finding.p)


def numbered(finding: Finding, streams: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """The numbers of a finding's blocks in the list of all blocks. streams: stream -> its blocks, as Samples has."""
    blocks = all_blocks(list(streams.values()))
    return tuple(blocks.index(block) for block in finding.blocks)
