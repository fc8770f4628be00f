"""The verdict of a run: five lines and three commands, put together from what the other parts of the API say."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.api.options import EQUAL, WEIGHED
from simpletuner_layerprobe.api.plans import plan
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.settled import Confidence
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.show.verdict import Verdict

LESS = "more-change-less-capacity"
PLANS = {"equal": EQUAL, "weighted": WEIGHED, "reversed": LESS}


def verdict(run: Run, reading: str | None = None, preset: str | None = None, sure: Confidence | None = None) -> Verdict:
    """What a run comes to. preset: what the factors are judged for, by default the run's own. sure: how sure they are,
    if the caller knows already. Where something cannot be said, its line says why."""
    from simpletuner_layerprobe.show import verdict as words

    judged = preset or run.preset
    options: dict[str, Any] = {"reading": reading, "preset": judged, "direction": WEIGHED}
    try:
        sure = sure or run.confidence(**options)
        times = None if sure.settled else run.times_to_settle(**options)
    except ProbeError as error:
        return words.Verdict({"enough": f"{run.counted}; no plan can be made: {error}", "now": words.NOW}, {})
    lines, commands = {"enough": words.enough_line(run.counted, sure, judged, times)}, {}
    try:
        contribution = run.contribution(reading)
        lines["blocks"] = words.blocks_line(sure, contribution.value_L, contribution.covered_L)
        size, whose = _size(run, options)
        lines["capacity"] = words.capacity_line(size, BF16_BYTES * size, whose)
        differing = run.differing(reading=reading, params=size)
        lines["weighting"] = words.weighting_line(differing, len(contribution.blocks), sure.enough)
        commands = {name: _command(run, reading, size, name) for name in PLANS}
    except ProbeError as error:
        lines["weighting"] = f"no plan can be made: {error}"
    return words.Verdict({**lines, "now": words.NOW}, commands)


def _size(run: Run, options: dict[str, Any]) -> tuple[int, str]:
    """The parameters of the plans that the commands make, and whose they are."""
    made = plan(run, **options)
    if made.budget is not None:
        return made.budget, f"the preset {options['preset']}"
    return made.parameters, "as the article's recipe"


def _command(run: Run, reading: str | None, size: int, name: str) -> str:
    """What to type to make the config; without the probe run's own options there is no environment."""
    from simpletuner_layerprobe.training.environment import OPTIONS_NAME

    line = f"layerprobe lokr {shlex.quote(str(run.path))} --params {size} --direction {PLANS[name]}"
    if reading not in (None, run.reading):
        line += f" --tokens {reading}"
    follow_up = (run.path / OPTIONS_NAME).exists()
    return f"{line} --env {name}" if follow_up else f"{line} --out {name}.json"
