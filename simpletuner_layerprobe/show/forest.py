"""A drawing of a trial: the difference of each arm to the reference, with its interval."""

from __future__ import annotations

import math
from html import escape

from simpletuner_layerprobe.analyse.trial import BETTER, WORSE, Judgement
from simpletuner_layerprobe.analyse.trial_words import change_text, decimals

WIDTH, ROW, TOP, BOTTOM, RIGHT = 480, 27, 8, 50, 14
LETTER = 10  # width of a letter where the window is narrow, at most
MOST_LETTERS = 20
MARK = 5  # half a mark
COLOUR = {BETTER: "var(--accent)", WORSE: "var(--hot)"}
TICKS = 4


def forest(made: Judgement) -> str:
    """A drawing (SVG) with a row per arm that has a difference, the best on top; the band is the margin."""
    arms = [(name, arm, arm.difference) for name, arm in made.arms.items() if arm.difference]
    if not arms:
        return "<p>No arm can be set beside the reference.</p>"
    arms.sort(key=lambda item: item[2].mean if item[2] else 0.0)
    ends = [end for _, _, own in arms if own for end in (own.mean, *(own.interval() if own.known else ()))]
    margin = made.margin or 0.0
    low, high = min(*ends, -margin, 0.0), max(*ends, margin, 0.0)
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    left = LETTER * min(MOST_LETTERS, max(len(name) for name, _, _ in arms)) + 10
    height = TOP + ROW * len(arms) + BOTTOM

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - RIGHT - left)

    foot = height - BOTTOM
    parts = []
    if margin:
        parts.append(
            f"<rect x='{at(-margin):.1f}' y='{TOP}' width='{at(margin) - at(-margin):.1f}' height='{foot - TOP}' "
            "style='fill:var(--wash)'/>"
        )
    for tick in ticks(low, high):
        parts.append(
            f"<path d='M{at(tick):.1f} {TOP}V{foot}' class='grid{' zero' * (tick == 0)}'/>"
            f"<text x='{at(tick):.1f}' y='{foot + 17}' text-anchor='middle'>{tick:g}</text>"
        )
    parts.append(
        f"<text x='{WIDTH - RIGHT}' y='{height - 8}' text-anchor='end'>loss against "
        f"{escape(_short(made.reference))}</text>"
    )
    for place, (name, arm, own) in enumerate(arms):
        if own is None:
            continue
        y = TOP + ROW * (place + 0.5)
        colour = COLOUR.get(arm.verdict, "var(--soft)")
        x = at(own.mean)
        line = ""
        if own.known:
            start, end = own.interval()
            line = f"<path d='M{at(start):.1f} {y:.1f}H{at(end):.1f}' style='stroke:{colour};stroke-width:2'/>"
        said = f"{name}: {change_text(own, decimals(made))}" + (f", {arm.verdict}" if arm.verdict else "")
        parts.append(
            f"<g><title>{escape(said)}</title><text x='{left - 8:.1f}' y='{y + 4:.1f}' text-anchor='end' "
            f"style='fill:{'var(--ink)' if arm.verdict else 'var(--soft)'}'>{escape(_short(name))}</text>{line}"
            f"<rect x='{x - MARK:.1f}' y='{y - MARK:.1f}' width='{2 * MARK}' height='{2 * MARK}' "
            f"style='fill:{colour}'/></g>"
        )
    label = f"Differences to {made.reference} with 95% intervals, an arm per row, the best on top"
    drawing = f"<svg class='scatter' viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(label)}'>"
    return drawing + "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, 0 among them, about TICKS."""
    wanted = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(wanted))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= wanted)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"
