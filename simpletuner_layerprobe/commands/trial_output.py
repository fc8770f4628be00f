"""The table and the JSON of `layerprobe trial report`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.output import LEFT, RIGHT, print_table, say
from simpletuner_layerprobe.show.words import counted, listed

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.judgement import Judgement, TrialFacts

SPARED = ("parameters", "rate", "loss")
"""Columns that are left out, in this order, while the table is too wide."""


def print_trial(facts: TrialFacts, made: Judgement, *, wide: bool = False) -> None:
    """What was trained, the table of the arms, the best first, and what it shows in words."""
    from simpletuner_layerprobe.api.judgement import rate_text, sentences

    seeds = f"seed{'s' * (len(facts.seeds) != 1)} {listed([str(seed) for seed in facts.seeds])}"
    say(f"{facts.model}: {counted(facts.steps, 'step')} with {seeds}")
    say(f"judged on {counted(made.images, 'image')} of {facts.held_out}, less loss is better")
    say()
    columns = _columns(facts, made)
    if not any(columns["rate"][1]):
        del columns["rate"]
    rows = list(zip(*(cells for _, cells in columns.values()), strict=True))
    print_table(list(columns), rows, "".join(side for side, _ in columns.values()), spare=SPARED, wide=wide)
    say()
    for sentence in (*sentences(made), *(rate_text(name, tried) for name, tried in facts.tuning.items())):
        if sentence:
            say(sentence)


def _columns(facts: TrialFacts, made: Judgement) -> dict[str, tuple[str, list[str]]]:
    """Head -> side and cells."""
    from simpletuner_layerprobe.api.judgement import change_text, decimals

    names = sorted(made.arms, key=lambda name: made.arms[name].loss)
    arms = [made.arms[name] for name in names]
    rates = [facts.rate.get(name) for name in names]
    changes = [change_text(arm.difference, decimals(made)) if arm.difference else "" for arm in arms]
    return {
        "arm": (LEFT, names),
        "parameters": (RIGHT, [f"{facts.parameters[name]:,}" for name in names]),
        "rate": (RIGHT, ["" if rate is None else f"{rate:g}" for rate in rates]),
        "loss": (RIGHT, [f"{arm.loss:.5f}" if math.isfinite(arm.loss) else "" for arm in arms]),
        f"against {made.reference} [95%]": (LEFT, changes),
        "verdict": (LEFT, [arm.verdict for arm in arms]),
    }


def as_json(facts: TrialFacts, made: Judgement) -> dict[str, Any]:
    """What `trial report --json` prints. Numbers that are not known or not finite are null."""
    from simpletuner_layerprobe.api.judgement import best_rate, plain, sentences

    arms = {}
    for name, arm in made.arms.items():
        own, by_sigma = arm.difference, arm.by_sigma
        tried = facts.tuning.get(name, {})
        arms[name] = {
            "parameters": facts.parameters[name],
            "learning_rate": facts.rate.get(name),
            "tuning": {f"{rate:g}": loss for rate, loss in tried.items()},
            "tuning_best": best_rate(tried),
            "loss": arm.loss,
            "loss_by_seed": arm.loss_S,
            "difference": own and own.mean,
            "interval": own and own.interval(),
            "p": own and own.p,
            "p_corrected": arm.p,
            "verdict": arm.verdict,
            "size": arm.size,
            "by_sigma": by_sigma and {"difference": by_sigma.mean_T, "low": by_sigma.low_T, "high": by_sigma.high_T},
        }
    place = made.place
    made_plain: dict[str, Any] = plain(
        {
            "model": facts.model,
            "steps": facts.steps,
            "seeds": list(facts.seeds),
            "held_out": facts.held_out,
            "images": made.images,
            "reference": made.reference,
            "larger": made.larger,
            "plan": made.plan,
            "margin": made.margin,
            "no_margin": made.no_margin,
            "smallest": made.smallest,
            "place": place and {"better_than": place.better_than, "of": place.of, "p": place.p},
            "bins": made.bins,
            "samples_by_sigma": made.counts_T,
            "arms": arms,
            "sentences": sentences(made),
        }
    )
    return made_plain
