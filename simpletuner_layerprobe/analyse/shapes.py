"""Shapes: what is said of blocks by their levels and by how these change over sigma.

Every kind is a number of each block and a margin by which it is beyond what the kind asks for, for the run itself and
for the bootstrap's replicates, so that whatever moves with the images (a fence, a median) counts as chance.

Shape letters: T bins, L blocks, R replicates, the first of which is the run itself where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, MIN_UNITS, Bootstrap
from simpletuner_layerprobe.analyse.chances import above, holm, scores
from simpletuner_layerprobe.analyse.contribution import TUKEY_FAR_OUT
from simpletuner_layerprobe.analyse.heatmap import bin_edges
from simpletuner_layerprobe.analyse.sections import KIND_ALPHA, Finding, Section
from simpletuner_layerprobe.analyse.units import IMAGE
from simpletuner_layerprobe.readings import ABLATION, ABLATION_CHANGE, ANGLE, parse_reading

BIN_SAMPLES = 20  # below, a bin plays no part
MIN_BINS = 5  # filled, for a line or two ends and a middle to mean something
MIN_BLOCKS = 8  # below, quartiles of blocks say little
SHAPE_FLOOR = 0.10  # of the block's level: smaller changes over sigma are no finding, however certain
LINE_SHARE = 0.5  # of the variation between bins that a straight line must explain to be a gradient
END = 0.2  # of sigma, at each end
LEAST = 0.5  # of the median block
NEEDED, HARDLY = 2.0, 0.1  # of the median block's loss increase: at least, and at most
MIN_ABLATED = 4  # blocks, for their median to mean something
ISLAND_BLOCKS = 3  # the shortest island
ISLAND_FLOOR = 0.15  # above the median block
ISLAND_SHARE = 0.8  # of the replicates that must show an island


def shape_sections(bootstrap: Bootstrap, names: Iterable[str]) -> Iterator[Section]:
    """The sections of all kinds, stream by stream. names: the streams, those without a finite sample among them."""
    streams = {name: _Stream.of(bootstrap, name) for name in bootstrap.blocks}
    for kind, of in _KINDS.get(parse_reading(bootstrap.reading).kind, _KINDS[ANGLE]).items():
        made = {
            section.stream: section
            for section in (_shapes(kind, streams, of) if of else map(_islands, streams.values()))
        }
        for name in names:
            yield made.get(name) or Section(kind, name, (), 0, "no sample with finite distances")


@dataclass(frozen=True)
class _Stream:
    """What the findings need of one stream. mean_RTL: the run itself and its replicates, of the bins that have
    BIN_SAMPLES. low_T, high_T: their edges. missing: why nothing can be said."""

    name: str
    blocks: tuple[str, ...]
    mean_RTL: NDArray[np.float64]
    counts_T: NDArray[np.int64]
    low_T: NDArray[np.float64]
    high_T: NDArray[np.float64]
    freedom: float
    samples: int
    unit: str
    missing: str

    @classmethod
    def of(cls, bootstrap: Bootstrap, name: str) -> _Stream:
        counts_T, mean_TL = bootstrap.counts_T[name], bootstrap.mean_TL[name]
        kind = parse_reading(bootstrap.reading)
        least = MIN_SAMPLES if kind.ablation else BIN_SAMPLES
        good_T = counts_T >= least
        edges = bin_edges(len(counts_T))
        missing = "" if good_T.any() else f"not enough samples: no sigma bin has {least}"
        if bootstrap.units < MIN_UNITS:
            what = "images" if bootstrap.unit == IMAGE else "samples"
            missing = f"not enough {what}: {bootstrap.units}, at least {MIN_UNITS} are needed"
        return cls(
            name=name,
            blocks=bootstrap.blocks[name],
            mean_RTL=np.concatenate([mean_TL[None], bootstrap.replicates()[name]])[:, good_T],
            counts_T=counts_T[good_T],
            low_T=edges[:-1][good_T],
            high_T=edges[1:][good_T],
            freedom=max(bootstrap.freedom[name], 1.0),
            samples=int(counts_T.sum()),
            unit=_UNITS.get(kind.kind, _UNITS[ANGLE]),
            missing=missing,
        )

    def few_bins(self) -> str:
        good = len(self.counts_T)
        short = f"not enough samples: {good} sigma bins have {BIN_SAMPLES} or more, {MIN_BINS} must"
        return self.missing or ("" if good >= MIN_BINS else short)

    def few_blocks(self, least: int = MIN_BLOCKS) -> str:
        L = len(self.blocks)
        return self.missing or ("" if least <= L else f"not enough blocks: {L}, at least {least} are needed")

    @property
    def level_RL(self) -> NDArray[np.float64]:
        """The mean of the bins, each weighing the same."""
        level_RL: NDArray[np.float64] = self.mean_RTL.mean(axis=1)
        return level_RL


@dataclass(frozen=True)
class _Shape:
    """A number of every block, in `unit`, for the run itself and its replicates, and by how much (margin_RL) it is
    beyond what the kind asks for; keep_L: what the run itself must show besides. sides: 2 if either sign counts.
    bins_L2: the first and last bin that each block's finding speaks of; all if None."""

    effect_RL: NDArray[np.float64]
    margin_RL: NDArray[np.float64]
    unit: str
    keep_L: NDArray[np.bool_] | bool = True
    sides: int = 1
    note: str = ""
    bins_L2: NDArray[np.int_] | None = None


def _shapes(kind: str, streams: Mapping[str, _Stream], of: Callable[[_Stream], _Shape | str]) -> Iterator[Section]:
    """The sections of a kind: Student's test of the margin in its bootstrap error, by Holm over blocks and streams."""
    shapes = {name: of(stream) for name, stream in streams.items()}
    tested = {name: shape for name, shape in shapes.items() if isinstance(shape, _Shape)}
    p_L = {
        name: shape.sides * above(scores(shape.margin_RL[0], shape.margin_RL[1:].std(axis=0)), streams[name].freedom)
        for name, shape in tested.items()
    }
    corrected = holm(np.concatenate([*p_L.values(), []]))
    stops = np.cumsum([len(part) for part in p_L.values()])
    for name, part in zip(tested, np.split(corrected, stops), strict=False):
        p_L[name] = part
    for name, stream in streams.items():
        shape = shapes[name]
        if isinstance(shape, str):
            yield Section(kind, name, (), stream.samples, shape)
            continue
        low_L, high_L = np.quantile(shape.effect_RL[1:], [0.025, 0.975], axis=0, method="weibull")
        whole_L2 = np.tile([0, -1], (len(stream.blocks), 1))
        bins_L2 = whole_L2 if shape.bins_L2 is None else shape.bins_L2
        shown = [
            Finding(
                kind=kind,
                stream=name,
                blocks=(stream.blocks[i],),
                low_sigma=float(stream.low_T[bins_L2[i, 0]]),
                high_sigma=float(stream.high_T[bins_L2[i, 1]]),
                effect=float(shape.effect_RL[0, i]),
                low=float(low_L[i]),
                high=float(high_L[i]),
                unit=shape.unit,
                p=float(p_L[name][i]),
                share=float((shape.margin_RL[1:, i] > 0).mean()),
                level=float(stream.level_RL[0, i]),
                samples=stream.samples,
            )
            for i in np.flatnonzero((p_L[name] <= KIND_ALPHA[kind]) & (shape.margin_RL[0] > 0) & shape.keep_L)
        ]
        shown.sort(key=lambda finding: (finding.p, -abs(finding.effect)))
        yield Section(kind, name, tuple(shown), stream.samples, notes=(shape.note,) if shape.note else ())


def _critical(stream: _Stream) -> _Shape | str:
    if missing := stream.few_blocks():
        return missing
    level_RL = stream.level_RL
    first_R1, third_R1 = np.percentile(level_RL, [25, 75], axis=1)[:, :, None]
    fence_R1 = third_R1 + TUKEY_FAR_OUT * (third_R1 - first_R1)
    note = f"the fence is at {fence_R1[0, 0]:.4g}"
    return _Shape(level_RL, level_RL - fence_R1, stream.unit, note=note)


def _least(stream: _Stream) -> _Shape | str:
    if missing := stream.few_blocks():
        return missing
    level_RL = stream.level_RL
    median_R1 = np.median(level_RL, axis=1, keepdims=True)
    lowest = int(np.argmin(level_RL[0]))
    note = f"the lowest block is {stream.blocks[lowest]}, mean {level_RL[0, lowest]:.4g}; the median block has "
    note += f"{median_R1[0, 0]:.4g}"
    share_RL = level_RL / np.where(median_R1 > 0, median_R1, np.inf)
    return _Shape(share_RL, LEAST * median_R1 - level_RL, "of the median block", note=note)


def _needed(stream: _Stream) -> _Shape | str:
    """Clear of NEEDED times the median block; where in sigma: around the largest bin, as long as half of it is left."""
    if missing := _few_hurt(stream):
        return missing
    level_RL = stream.level_RL
    median_R1 = np.median(level_RL, axis=1, keepdims=True)
    bins: list[tuple[int, int]] = []
    for value_T in stream.mean_RTL[0].T:
        peak = int(np.argmax(value_T))
        least = value_T[peak] / 2 if value_T[peak] > 0 else value_T[peak]
        bins += [part for part in ranges(value_T >= least) if part[0] <= peak <= part[1]]
    note = f"without the median block the loss rises by {median_R1[0, 0]:.3g}"
    share_RL = level_RL / np.where(median_R1 > 0, median_R1, np.inf)
    return _Shape(share_RL, level_RL - NEEDED * median_R1, "of the median block", note=note, bins_L2=np.array(bins))


def _hardly(stream: _Stream) -> _Shape | str:
    """Clearly below HARDLY of the median block: an interval that is wide is no proof."""
    if missing := _few_hurt(stream):
        return missing
    level_RL = stream.level_RL
    median_R1 = np.median(level_RL, axis=1, keepdims=True)
    lowest = int(np.argmin(level_RL[0]))
    note = f"the least needed block is {stream.blocks[lowest]}, {level_RL[0, lowest]:.3g}"
    share_RL = level_RL / np.where(median_R1 > 0, median_R1, np.inf)
    return _Shape(share_RL, HARDLY * median_R1 - level_RL, "of the median block", note=note)


def _few_hurt(stream: _Stream) -> str:
    """Why nothing can be said against the median block: it must be clear of 0 itself."""
    if missing := stream.few_blocks(MIN_ABLATED):
        return missing
    low = float(np.quantile(np.median(stream.level_RL[1:], axis=1), 0.025))
    return "" if low > 0 else "leaving out the median block does not clearly raise the loss"


def _gradients(stream: _Stream) -> _Shape | str:
    if missing := stream.few_bins():
        return missing
    centre_T = (stream.low_T + stream.high_T) / 2
    offset_T = centre_T - centre_T.mean()
    squares = float((offset_T**2).sum())
    slope_RL = np.einsum("t,rtl->rl", offset_T, stream.mean_RTL) / squares
    level_RL = stream.level_RL
    around_L = ((stream.mean_RTL[0] - level_RL[0]) ** 2).sum(axis=0)
    straight_L = slope_RL[0] ** 2 * squares >= LINE_SHARE * around_L
    margin_RL = slope_RL * np.sign(slope_RL[0]) - SHAPE_FLOOR * np.abs(level_RL)
    return _Shape(slope_RL, margin_RL, f"{stream.unit} per sigma", keep_L=straight_L, sides=2)


def _two_ended(stream: _Stream) -> _Shape | str:
    if missing := stream.few_bins():
        return missing
    centre_T = (stream.low_T + stream.high_T) / 2
    parts = [centre_T < END, centre_T > 1 - END, (centre_T >= END) & (centre_T <= 1 - END)]
    if not all(part.any() for part in parts):
        return f"not enough samples: below sigma {END}, above {1 - END} and between, a bin needs {BIN_SAMPLES}"
    # Within a part a bin counts by its samples: a run on a training schedule has few at the ends.
    clean_RL, noise_RL, middle_RL = (
        np.einsum("t,rtl->rl", part * stream.counts_T / (part * stream.counts_T).sum(), stream.mean_RTL)
        for part in parts
    )
    # Both ends must be high, so the weaker of the two decides, and needs no correction for there being two.
    excess_RL = np.minimum(clean_RL, noise_RL) - middle_RL
    return _Shape(excess_RL, excess_RL - SHAPE_FLOOR * np.abs(stream.level_RL), stream.unit)


def _islands(stream: _Stream) -> Section:
    """At least ISLAND_BLOCKS neighbours, each ISLAND_FLOOR above the stream's median block.

    A replicate shows the island if it has one whose ends are at most one block away.
    """
    if missing := stream.few_blocks():
        return Section("islands", stream.name, (), stream.samples, missing)
    level_RL = stream.level_RL
    median_R1 = np.median(level_RL, axis=1, keepdims=True)
    above_RL = np.pad(level_RL > (1 + ISLAND_FLOOR) * median_R1, ((0, 0), (2, 2)))
    shown = []
    for first, last in ranges(above_RL[0, 2:-2]):
        if last - first + 1 < ISLAND_BLOCKS:
            continue
        ends = [
            (first + a, last + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if last + b - first - a + 1 >= ISLAND_BLOCKS
        ]
        alike_R = np.zeros(len(above_RL), dtype=bool)
        for a, b in ends:  # places in above_RL are two further on
            alike_R |= above_RL[:, a + 2 : b + 3].all(axis=1) & ~above_RL[:, a + 1] & ~above_RL[:, b + 3]
        share = float(alike_R[1:].mean())
        excess_R = np.median(level_RL[:, first : last + 1], axis=1) - median_R1[:, 0]
        low, high = np.quantile(excess_R[1:], [0.025, 0.975], method="weibull")
        if share >= ISLAND_SHARE:
            shown.append(
                Finding(
                    kind="islands",
                    stream=stream.name,
                    blocks=stream.blocks[first : last + 1],
                    low_sigma=float(stream.low_T[0]),
                    high_sigma=float(stream.high_T[-1]),
                    effect=float(excess_R[0]),
                    low=float(low),
                    high=float(high),
                    unit=stream.unit,
                    p=None,
                    share=share,
                    level=float(np.median(level_RL[0, first : last + 1])),
                    samples=stream.samples,
                )
            )
    shown.sort(key=lambda finding: -finding.effect * len(finding.blocks))
    return Section("islands", stream.name, tuple(shown), stream.samples)


_KINDS: dict[str, dict[str, Callable[[_Stream], _Shape | str] | None]] = {
    ANGLE: {
        "critical": _critical,
        "islands": None,
        "gradients": _gradients,
        "two-ended": _two_ended,
        "least": _least,
    },
    ABLATION: {"needed": _needed, "hardly": _hardly, "gradients": _gradients, "two-ended": _two_ended},
    ABLATION_CHANGE: {"gradients": _gradients, "two-ended": _two_ended},
}
"""What is looked for in a reading of this kind; in other readings what is in an angle."""
_UNITS = {ANGLE: "angular distance / π", ABLATION: "loss increase", ABLATION_CHANGE: "relative change"}


def ranges(mask_L: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(first, last) of every range of True, both inside: [F, T, T, F, T] -> ((1, 2), (4, 4))."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], mask_L, [False]]).astype(np.int8)))
    return tuple((first, end - 1) for first, end in steps.reshape(-1, 2).tolist())
