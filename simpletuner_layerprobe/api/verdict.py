"""The verdict of a run: five lines and three commands, put together from what the other parts of the API say."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.api.options import EQUAL, WEIGHED, PlanOptions
from simpletuner_layerprobe.api.plans import plan
from simpletuner_layerprobe.errors import ConfigError, ProbeError
from simpletuner_layerprobe.lokr.amounts import ARTICLE, BF16_BYTES, preset_parameters

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.show.verdict import Verdict

LESS = "more-change-less-capacity"
PLANS = {"equal": EQUAL, "weighted": WEIGHED, "reversed": LESS}


def judged_for(run: Run, preset: str | None = None) -> tuple[PlanOptions, str]:
    """What the plans of a run are judged for, as options and in words.

    The preset that was asked for, or an amount that the run itself names; else the size of what its own config trains,
    and where that is not known the article's recipe.
    """
    named = preset or (run.preset if run.preset != ARTICLE else None)
    own = run.own.known_parameters if run.manifest.modules and named is None else None
    if own is not None:
        return {"params": own}, "a weighted plan of your config's size"
    if named in (None, ARTICLE):
        return {"preset": ARTICLE}, "the article's plan"
    return {"preset": named}, f"a weighted plan of {named}"


def verdict(run: Run, reading: str | None = None, preset: str | None = None) -> Verdict:
    """What a run comes to. preset: what its factors are judged for, see `judged_for`.

    Where something cannot be said, its line says why.
    """
    from simpletuner_layerprobe.show import verdict as words

    goal, name = judged_for(run, preset)
    reading = run.plan_reading(reading, **goal)
    options: Any = {"reading": reading, "direction": WEIGHED, **goal}
    try:
        sure = run.confidence(**options)
        times = None if sure.settled else run.times_to_settle(**options)
    except ProbeError as error:
        return words.Verdict({"enough": f"{run.counted}; no plan can be made: {error}", "now": words.NOW}, {})
    lines, commands = {"enough": words.enough_line(run.counted, sure, name, times)}, {}
    try:
        contribution = run.plan_contribution(reading, **goal)
        lines["blocks"] = words.blocks_line(sure, contribution.value_L, contribution.covered_L)
        size = preset_parameters(goal.get("params") or goal.get("preset") or ARTICLE) or plan(run, **options).parameters
        lines["capacity"] = words.capacity_line(size, run.own.known_parameters, _article_size(run), BF16_BYTES)
        differing = run.differing(reading=reading, params=size)
        lines["weighting"] = words.weighting_line(differing, len(contribution.blocks), sure.enough)
        commands = {name: _command(run, reading, size, name) for name in PLANS}
    except ProbeError as error:
        lines["weighting"] = f"no plan can be made: {error}"
    return words.Verdict({**lines, "now": words.NOW}, commands)


def _article_size(run: Run) -> int:
    return plan(run, preset=ARTICLE).parameters


def _command(run: Run, reading: str, size: int, name: str) -> str:
    """What to type to make the config, without what goes without saying.

    Without the probe run's own options there is no environment.
    """
    from simpletuner_layerprobe.run.manifest import run_folder
    from simpletuner_layerprobe.training.environment import OPTIONS_NAME

    outer = run.path.parent
    words = ["layerprobe lokr", shlex.quote(str(outer if run_folder(outer) == run.path else run.path))]
    if size != _usual_size(run):
        words.append(f"--params {size}")
    if PLANS[name] != EQUAL:
        words.append(f"--direction {PLANS[name]}")
        if reading != run.plan_reading(None, params=size):
            words.append(f"--tokens {reading}")
    words.append(f"--env {name}" if (run.path / OPTIONS_NAME).exists() else f"--out {name}.json")
    return " ".join(words)


def _usual_size(run: Run) -> int | None:
    """That of a plan without --params; None where it has to be given."""
    try:
        return run.plan_size
    except ConfigError:
        return None
