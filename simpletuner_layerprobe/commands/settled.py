"""How sure the factors of a run are, in the words of the commands."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from simpletuner_layerprobe import ProbeError
from simpletuner_layerprobe.commands.lokr_options import ARTICLE_MAX_FACTOR
from simpletuner_layerprobe.commands.output import counted

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.confidence import Bootstrap, Confidence, Decide
    from simpletuner_layerprobe.run.shards import Run


def bootstrap_of(run: Run, arguments: argparse.Namespace, tokens: str) -> tuple[Bootstrap, Decide]:
    """Replicates of the run's heatmaps, and the article's recipe with the options of `lokr` where there are any."""
    from simpletuner_layerprobe.analyse.confidence import article_decision, tally
    from simpletuner_layerprobe.lokr.factors import article_factors

    options = vars(arguments)
    critical = options.get("critical", "auto")
    bootstrap = tally(run, tokens=tokens, bins=arguments.bins).bootstrap()
    decide = article_decision(
        bootstrap.blocks,
        bootstrap.count_T,
        lambda value_N: article_factors(value_N, max_factor=options.get("max_factor") or ARTICLE_MAX_FACTOR),
        critical=None if critical == "auto" else critical,
        **{name: options[name] for name in ("clip_percentile", "text_weight", "image_weight") if name in options},
    )
    return bootstrap, decide


def confidence_of(run: Run, arguments: argparse.Namespace) -> Confidence:
    """How sure the article's factors are, with the options of `lokr`."""
    from simpletuner_layerprobe.analyse.confidence import confidence

    return confidence(*bootstrap_of(run, arguments, arguments.tokens))


def settled_text(sure: Confidence) -> str:
    """The line under the table: how many factors other samples could change."""
    from simpletuner_layerprobe.analyse.confidence import MIN_SAMPLES, SHARE

    if not sure.enough:
        return f"NOT settled: a sigma bin has fewer than {MIN_SAMPLES} samples, too few to judge any factor by"
    count = len(sure.unsettled())
    if not count:
        return f"settled: every factor is agreed by {SHARE:.0%} of the bootstrap replicates"
    return (
        f"NOT settled: {count} of {counted(len(sure.blocks), 'factor')}, agreed by fewer than {SHARE:.0%} of the "
        "bootstrap replicates; layerprobe status says how many more samples would settle them"
    )


def share_text(share: float) -> str:
    """A share in five characters, rounded down: " 100%" means every single replicate."""
    return f"{math.floor(share * 100 + 1e-9):>4}%"


def settling_text(run: Run, arguments: argparse.Namespace) -> str:
    """What `status` says of the samples that the article's factors still need."""
    from simpletuner_layerprobe.analyse.confidence import MOST_TIMES, SHARE, confidence, more_samples

    tokens = "last" if "last" in run.manifest.tokens else run.manifest.tokens[0]
    try:
        bootstrap, decide = bootstrap_of(run, arguments, tokens)
        sure = confidence(bootstrap, decide)
        more = more_samples(bootstrap, decide)
    except ProbeError as error:
        return f"unknown: {error}"
    count = len(sure.blocks) - len(sure.unsettled())
    what = f"{count} of {counted(len(sure.blocks), 'factor')} (preset article, {SHARE:.0%})"
    if more is None:
        return f"{what}; {MOST_TIMES:,.0f} times the samples would not settle all"
    return f"{what}; about {_rounded(more):,} more samples would settle all" if more else what


def _rounded(count: int) -> int:
    """An estimate to two digits, rounded up."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
