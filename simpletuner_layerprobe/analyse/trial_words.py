"""What a trial shows, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from simpletuner_layerprobe.analyse.crossed import Crossed
from simpletuner_layerprobe.analyse.trial import BETTER, DIVERGED, LARGER_SIZE, SAME, WORSE, Judgement

FARTHEST = 0.25
"""Beyond so much more or less than the reference's size nothing exact is said: two sizes tell only what lies near."""


def answer_text(made: Judgement) -> str:
    """What the trial answers about its plan, in a sentence; about all arms where there is no plan."""
    plan, reference = made.arms.get(made.plan), made.reference
    if math.isinf(made.arms[reference].loss):
        return f"{reference} diverged: there is nothing to judge the other arms against"
    if plan is None or made.plan not in made.tested:
        better = [name for name in made.tested if made.arms[name].verdict == BETTER]
        return f"{', '.join(better) or 'no arm'} trained better than {reference}"
    if plan.difference is None:
        return f"{made.plan} diverged, where {reference} did not"
    apart = f"its loss is {apart_text(plan.difference, decimals(made))} {reference}'s"
    if plan.verdict in (BETTER, WORSE):
        size = size_text(plan.size)
        return f"{made.plan} trained {plan.verdict} than {reference}: {apart}" + (f", {size}" if size else "")
    if plan.verdict == SAME:
        gain = f"{LARGER_SIZE - 1:.0%} more parameters gain"
        return f"{made.plan} trained no differently from {reference}: {apart}, less than {gain}"
    return f"whether {made.plan} trains better or worse than {reference} stays open: {apart}"


def sentences(made: Judgement) -> list[str]:
    """The judgement in words, the plan first."""
    names = sorted(made.tested, key=lambda name: name != made.plan)
    said = [arm_text(made, name) for name in names]
    if math.isinf(made.arms[made.reference].loss):
        return [f"{made.reference} diverged: there is nothing to judge the other arms against"]
    if made.larger in made.arms:
        said.append(arm_text(made, made.larger))
    if made.no_margin:
        said.append(f"no difference can be given in parameters: {made.no_margin}")
    if made.place:
        said.append(place_text(made))
    said.append(limit_text(made))
    return [sentence for sentence in said if sentence]


def arm_text(made: Judgement, name: str) -> str:
    """ "plan: loss 0.0012 [0.0004, 0.0020] above uniform: worse, as good as 6% fewer parameters"."""
    arm = made.arms[name]
    if arm.verdict == DIVERGED:
        seeds = int(np.isinf(arm.loss_S).sum())
        return f"{name}: diverged with {seeds} of {made.seeds} seeds, and is left out of the tests"
    if arm.difference is None:
        return ""
    size = size_text(arm.size) if arm.verdict in (BETTER, WORSE) else ""
    if name == made.larger and made.margin is not None:
        size = f"this is what {LARGER_SIZE - 1:.0%} more parameters gain"
    words = ", ".join(word for word in (arm.verdict, size) if word)
    return f"{name}: loss {apart_text(arm.difference, decimals(made))} {made.reference}" + (
        f": {words}" if words else ""
    )


def apart_text(difference: Crossed, decimals: int) -> str:
    """ "0.0012 [0.0004, 0.0020] above", the interval in the same direction."""
    side = "below" if difference.mean < 0 else "above"
    low, high = difference.interval()
    size, low, high = (-difference.mean, -high, -low) if side == "below" else (difference.mean, low, high)
    interval = f" [{low:.{decimals}f}, {high:.{decimals}f}]" if difference.known else ""
    return f"{size:.{decimals}f}{interval} {side}"


def change_text(difference: Crossed, decimals: int) -> str:
    """ "+0.0012 [+0.0004, +0.0020]", without the interval where it is not known."""
    low, high = difference.interval()
    interval = f" [{low:+.{decimals}f}, {high:+.{decimals}f}]" if difference.known else ""
    return f"{difference.mean:+.{decimals}f}{interval}"


def decimals(made: Judgement) -> int:
    """Decimals that show two digits of half an interval, or of the differences where there is none; 4 to 9."""
    means = [abs(arm.difference.mean) for arm in made.arms.values() if arm.difference]
    size = made.smallest if made.smallest > 0 else max(means, default=0.0)
    return min(max(4, 1 - math.floor(math.log10(size))), 9) if size > 0 else 4


def size_text(size: float | None) -> str:
    """ "as good as 6% fewer parameters"; "" where it is not known."""
    if size is None:
        return ""
    if size > 1 + FARTHEST or size < 1 - FARTHEST:
        return f"as good as more than {FARTHEST:.0%} {'more' if size > 1 else 'fewer'} parameters"
    change = abs(size - 1)
    if change < 0.005:
        return "as good as the same number of parameters"
    return f"as good as {change:.0%} {'more' if size > 1 else 'fewer'} parameters"


def place_text(made: Judgement) -> str:
    """ "plan is better than 3 of its 5 shuffles, which chance alone gives 50% of the time"."""
    place = made.place
    if place is None:
        return ""
    shuffles = f"its {place.of} shuffles" if place.of > 1 else "its one shuffle"
    if not place.better_than:
        return f"{made.plan} is not better than {'any of ' * (place.of > 1)}{shuffles}"
    of = f"{place.better_than} of " * (place.of > 1)
    return f"{made.plan} is better than {of}{shuffles}, which chance alone gives {place.p:.0%} of the time"


def limit_text(made: Judgement) -> str:
    """How small a difference may be and still be seen."""
    if made.seeds < 2:
        return "one seed cannot tell a difference from chance: another seed would have trained another adapter"
    if not made.smallest > 0:
        return ""
    return f"with {made.seeds} seeds and {made.images:,} images differences below {made.smallest:.2g} cannot be seen"


def best_rate(loss_by_rate: Mapping[float, float]) -> float | None:
    """The learning rate of the lowest tuning loss; None without a sweep and where every training diverged."""
    finite = {rate: loss for rate, loss in loss_by_rate.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def rate_text(name: str, loss_by_rate: Mapping[float, float]) -> str:
    """What is to be known of an arm's sweep: its best learning rate at an end of those tried; else ""."""
    best = best_rate(loss_by_rate)
    if best is None:
        return f"{name}: diverged with every learning rate that was tried" if loss_by_rate else ""
    if len(loss_by_rate) < 2 or min(loss_by_rate) < best < max(loss_by_rate):
        return ""
    beyond = "larger" if best == max(loss_by_rate) else "smaller"
    return f"{name}: its best learning rate, {best:g}, is the {beyond[:-1]}st tried: a {beyond} one may do better"
