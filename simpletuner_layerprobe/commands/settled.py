"""How sure the factors of a run are, in the words of the commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.output import counted
from simpletuner_layerprobe.errors import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Confidence, Decide
    from simpletuner_layerprobe.run.records import Run


def confidence_of(
    run: Run, arguments: argparse.Namespace, decide_of: Callable[[Bootstrap], Decide], *, replicates: int | None = None
) -> tuple[Confidence, Bootstrap]:
    """How sure what `decide_of` decides is, with the reading and the bins of the options."""
    from simpletuner_layerprobe.analyse.bootstrap import confidence, tally

    bootstrap = tally(run, tokens=arguments.tokens, bins=arguments.bins).bootstrap(replicates=replicates)
    return confidence(bootstrap, decide_of(bootstrap)), bootstrap


def settled_text(sure: Confidence, what: str = "factor") -> str:
    """The line under the table: how many factors (or ranks) other samples could change."""
    from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, SHARE

    if not sure.enough:
        return f"NOT settled: a sigma bin has fewer than {MIN_SAMPLES} samples, too few to judge any {what} by"
    count = len(sure.unsettled())
    if not count:
        return f"settled: every {what} is agreed by {SHARE:.0%} of the {sure.replicates:,} bootstrap replicates"
    return (
        f"NOT settled: {count} of {counted(len(sure.agreement_K), what)}, agreed by fewer than {SHARE:.0%} of the "
        f"{sure.replicates:,} bootstrap replicates (a share's standard error is at most {sure.share_error:.1%}); "
        "layerprobe status says how many more samples would settle them"
    )


def share_text(share: float) -> str:
    """A share in five characters, rounded down: " 100%" means every single replicate."""
    return f"{math.floor(share * 100 + 1e-9):>4}%"


def settling_text(run: Run, bins: int, preset: str) -> str:
    """What `status` says of the samples that the factors of a preset still need."""
    from simpletuner_layerprobe.analyse.bootstrap import MOST_TIMES, SHARE, confidence, more_samples, tally
    from simpletuner_layerprobe.lokr.amounts import preset_parameters
    from simpletuner_layerprobe.lokr.decision import REPLICATES, of_preset

    tokens = "last" if "last" in run.manifest.tokens else run.manifest.tokens[0]
    parameters = preset_parameters(preset)
    try:
        decide_of = of_preset(run.manifest, parameters)
        bootstrap = tally(run, tokens=tokens, bins=bins).bootstrap(
            replicates=None if parameters is None else REPLICATES
        )
        decide = decide_of(bootstrap)
        sure = confidence(bootstrap, decide)
        more = more_samples(bootstrap, decide, sure=sure)
    except ProbeError as error:
        return f"unknown: {error}"
    count = len(sure.agreement_K) - len(sure.unsettled())
    what = f"{count} of {counted(len(sure.agreement_K), 'factor')} (preset {preset}, {SHARE:.0%})"
    if more is None:
        return f"{what}; {MOST_TIMES:,.0f} times the samples would not settle all"
    return f"{what}; about {_rounded(more):,} more samples would settle all" if more else what


def _rounded(count: int) -> int:
    """An estimate to two digits, rounded up."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
