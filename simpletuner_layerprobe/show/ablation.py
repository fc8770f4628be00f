"""The report's part on ablation: the story in two sentences, the scatter of angle against loss increase, the numbers.

Shape letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.ablation import Ablation, Level
from simpletuner_layerprobe.analyse.told import order_text
from simpletuner_layerprobe.show.html import table
from simpletuner_layerprobe.show.words import capital, listed

NAMED = 5  # blocks that the story names at most
WIDTH, HEIGHT = 480, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 42
MARK = 8.5  # radius
FEWEST_PIXELS = 34  # between two numbers at an axis


def story(made: Ablation) -> str:
    """Which blocks the loss needs, and how far the angle tells it, in two sentences."""
    most = int(np.argmax(made.loss.value_L))
    first = f"The loss needs {_blocks(made.needed)} most"
    if not made.needed:
        first = f"The loss needs no block clearly more than most others, block {most} most"
    hardly = f"leaving out {_blocks(made.hardly)} hardly hurts" if made.hardly else "no block is shown to be needless"
    stream = next(iter(made.told))
    return f"{first}; {hardly}. {capital(order_text(made.told[stream], stream))}."


def _blocks(numbers: Sequence[int]) -> str:
    names = [str(number) for number in numbers[:NAMED]]
    if len(numbers) > NAMED:
        names = [*names[:-1], f"{len(numbers) - NAMED + 1} more"]
    return f"block{'s' * (len(numbers) > 1)} {listed(names)}"


def part(made: Ablation) -> str:
    """The HTML: the story, the place of the maps, the scatter and the table."""
    stream = next(iter(made.told))
    rows = []
    for i in range(len(made.blocks)):
        kind = "needed" if i in made.needed else "hardly needed" if i in made.hardly else ""
        rows.append((str(i), *_cells(made.loss, i), _cells(made.angle[stream], i)[0], kind))
    heads = {"block": True, "loss increase": True, "95% interval": False, "angle": True, "": False}
    numbers = table("Ablation table", heads, rows)
    return (
        f"<p id='story'>{escape(story(made))}</p><div id='beside' class='beside'></div>"
        f"<h3>Angle against loss increase</h3><div class='beside'>{scatter(made, stream)}{numbers}</div>"
    )


def _cells(level: Level, i: int) -> tuple[str, str]:
    if np.isnan(level.value_L[i]):
        return "", "not in the stream"
    return f"{level.value_L[i]:.3g}", f"{level.low_L[i]:.3g} to {level.high_L[i]:.3g}"


class _Axis:
    """A scale on which small and large numbers of either sign have their place: asinh, in pixels from start to end."""

    def __init__(self, level: Level, start: float, end: float) -> None:
        known_L = np.isfinite(level.value_L)
        low, high = float(level.low_L[known_L].min()), float(level.high_L[known_L].max())
        self.unit = float(np.median(np.abs(level.value_L[known_L]))) or 1.0
        self.start, self.end = start, end
        below, above = self._bent(low), self._bent(high)
        room = 0.06 * (above - below) or 0.5
        self.low, self.high = below - room, above + room

    def _bent(self, value: float) -> float:
        return float(np.arcsinh(value / self.unit))

    def at(self, value: float) -> float:
        share = (self._bent(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers in the range, 0 and powers of ten first, as many as have room."""
        top = np.sinh(max(abs(self.low), abs(self.high))) * self.unit
        decades = range(int(np.floor(np.log10(self.unit))) - 2, int(np.floor(np.log10(top))) + 1)
        sizes = [step * 10.0**decade for step in (1, 2, 5) for decade in reversed(decades)]
        kept: list[float] = []
        for value in (0.0, *(sign * size for size in sizes for sign in (1, -1))):
            inside = self.low <= self._bent(value) <= self.high
            if inside and all(abs(self.at(value) - self.at(other)) >= FEWEST_PIXELS for other in kept):
                kept.append(value)
        return sorted(kept)


def scatter(made: Ablation, stream: str) -> str:
    """A drawing (SVG) with a mark per block of the stream: its angle, its loss increase, and both intervals."""
    angle, loss = made.angle[stream], made.loss
    shown = np.flatnonzero(np.isfinite(angle.value_L)).tolist()
    across = _Axis(angle, LEFT, WIDTH - RIGHT)
    upwards = _Axis(_at(loss, shown), HEIGHT - BOTTOM, TOP)
    parts = [
        *(
            f"<line x1='{across.at(v):.1f}' x2='{across.at(v):.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' class='grid'/>"
            f"<text x='{across.at(v):.1f}' y='{HEIGHT - BOTTOM + 14}' text-anchor='middle'>{v:.3g}</text>"
            for v in across.ticks()
        ),
        *(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{upwards.at(v):.1f}' y2='{upwards.at(v):.1f}' class='grid"
            f"{' zero' * (v == 0)}'/><text x='{LEFT - 5}' y='{upwards.at(v) + 4:.1f}' text-anchor='end'>{v:.3g}</text>"
            for v in upwards.ticks()
        ),
        f"<text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 8}' text-anchor='middle'>mean angle, {escape(stream)} "
        "stream (fraction of π)</text>",
        f"<text transform='translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)' text-anchor='middle'>loss increase"
        "</text>",
    ]
    for i in shown:
        ends = [
            across.at(angle.low_L[i]),
            across.at(angle.high_L[i]),
            upwards.at(loss.low_L[i]),
            upwards.at(loss.high_L[i]),
        ]
        x, y = across.at(angle.value_L[i]), upwards.at(loss.value_L[i])
        parts.append(
            f"<path class='interval' d='M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}M{x:.1f} {ends[2]:.1f}V{ends[3]:.1f}'/>"
        )
    points = np.array([(across.at(angle.value_L[i]), upwards.at(loss.value_L[i])) for i in shown])
    for i, (x0, y0), (x, y) in zip(shown, points, apart(points), strict=True):
        kind = "hot" if i in made.needed else "pale" if i in made.hardly else ""
        said = (
            f"{i}: {made.blocks[i]}, angle {' ('.join(_cells(angle, i))}), loss increase {' ('.join(_cells(loss, i))})"
        )
        parts.append(
            f"<g class='mark {kind}'><title>{escape(said)}</title><path d='M{x0:.1f} {y0:.1f}L{x:.1f} {y:.1f}'/>"
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{MARK}'/>"
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='middle'>{i}</text></g>"
        )
    label = f"Scatter of the {stream} stream's mean angle against the loss increase, a mark per block"
    drawing = f"<svg class='scatter' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(label)}'>"
    return drawing + "".join(parts) + "</svg>"


def apart(points_L2: NDArray[np.float64], rounds: int = 80) -> NDArray[np.float64]:
    """Places for marks near their points, pushed apart where they would hide each other."""
    places_L2 = points_L2 + 1e-3 * np.arange(len(points_L2))[:, None] * (1, -1)  # so that equal points part
    for _ in range(rounds):
        gap_LL2 = places_L2[:, None] - places_L2[None]
        distance_LL = np.hypot(*np.moveaxis(gap_LL2, -1, 0)) + np.eye(len(places_L2)) * 4 * MARK
        overlap_LL = np.clip(2.2 * MARK - distance_LL, 0, None) / distance_LL
        places_L2 = places_L2 + (overlap_LL[..., None] * gap_LL2).sum(axis=1) / 3
        places_L2 = np.clip(places_L2, (LEFT, TOP), (WIDTH - RIGHT, HEIGHT - BOTTOM))
    return places_L2


def _at(level: Level, numbers: Sequence[int]) -> Level:
    parts: list[NDArray[np.float64]] = [part_L[list(numbers)] for part_L in (level.value_L, level.low_L, level.high_L)]
    return Level(*parts)
