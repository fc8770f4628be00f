"""The page of a trial: one HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from simpletuner_layerprobe.analyse.sections import chance
from simpletuner_layerprobe.analyse.trial import BETTER, DIVERGED, LARGER_SIZE, WORSE, Judged, Judgement, TrialFacts
from simpletuner_layerprobe.analyse.trial_words import (
    answer_text,
    best_rate,
    change_text,
    decimals,
    rate_text,
    sentences,
    size_text,
)
from simpletuner_layerprobe.show.forest import forest
from simpletuner_layerprobe.show.html import Html, Part, html_page, table
from simpletuner_layerprobe.show.words import capital, counted, listed


def trial_page(facts: TrialFacts, made: Judgement) -> str:
    """The HTML of a trial's report."""
    more = f"{LARGER_SIZE - 1:.0%}"
    band = f" The band is what {more} more parameters gain, to either side." if made.margin else ""
    parts = [
        Part(
            "answer",
            "Answer",
            f"Differences to {made.reference}",
            f"Held-out loss of each arm minus that of {made.reference}, paired by seed and image, with 95% intervals "
            f"of other seeds and other images. Left of the line is better.{band}",
            f"<div class='beside'>{forest(made)}<ul>{''.join(f'<li>{escape(line)}</li>' for line in _told(made))}</ul>"
            "</div>",
        ),
        Part(
            "arms",
            "Arms",
            "Arms",
            "The least loss first. p is the chance of a difference as large if there is none, corrected for all arms "
            "that have a verdict: at most 0.05 is better or worse. No different: the interval lies within what "
            f"{more} more parameters gain. The last column goes by the loss alone, without its interval.",
            _arms(facts, made),
        ),
        Part(
            "sigma",
            "Sigma",
            "Differences by sigma",
            "The same differences in parts of the noise range, 0 clean to 1 noise. Bold: the 95% interval leaves out "
            "0, not corrected for the number of cells, of which a few do by chance.",
            _by_sigma(made),
        ),
        *_rates(facts),
        Part("limits", "Limits", "What it does not say", "", _limits(facts, made)),
    ]
    seeds = f"seed{'s' * (len(facts.seeds) != 1)} {listed([str(seed) for seed in facts.seeds])}"
    lead = f"{capital(answer_text(made))}. {_trained(facts, made)}."
    foot = f"{capital(seeds)}."
    return html_page("Layer probe, trial", facts.model, lead, parts, foot, {"blocks": [], "edges": [0, 1], "maps": []})


def _trained(facts: TrialFacts, made: Judgement) -> str:
    return (
        f"{counted(len(made.arms), 'arm')} of {counted(facts.steps, 'step')} with {counted(made.seeds, 'seed')} each, "
        f"judged on {counted(made.images, 'image')} of {facts.held_out}"
    )


def _told(made: Judgement) -> list[str]:
    return [f"{line}." for line in sentences(made)]


def _arms(facts: TrialFacts, made: Judgement) -> str:
    heads = {"arm": False, "parameters": True, "learning rate": True, "held-out loss": True}
    heads |= {f"against {made.reference} [95% interval]": False, "p": True, "verdict": False, "as good as": False}
    rows = []
    for name, arm in _ordered(made):
        rate = facts.rate.get(name)
        rows.append(
            (
                name,
                f"{facts.parameters[name]:,}",
                "its config's" if rate is None else f"{rate:g}",
                f"{arm.loss:.5f}" if math.isfinite(arm.loss) else "",
                change_text(arm.difference, decimals(made)) if arm.difference else "",
                chance(arm.p).removeprefix("p ").removeprefix("= ") if not math.isnan(arm.p) else "",
                Html(f"<strong>{arm.verdict}</strong>") if arm.verdict in (BETTER, WORSE, DIVERGED) else arm.verdict,
                size_text(arm.size).removeprefix("as good as ") if name != made.reference else "",
            )
        )
    return table("Arms", heads, rows)


def _ordered(made: Judgement) -> list[tuple[str, Judged]]:
    return sorted(made.arms.items(), key=lambda item: item[1].loss)


def _by_sigma(made: Judgement) -> str:
    """A row per bin and a column per arm that is tested, and the larger plan."""
    names = [name for name in (*made.tested, made.larger) if name in made.arms and made.arms[name].by_sigma]
    if not names:
        return "<p>No arm can be set beside the reference.</p>"
    rows, shown = [], decimals(made)
    for t in range(made.bins):
        cells = [f"{t / made.bins:.3g} to {(t + 1) / made.bins:.3g}", f"{made.counts_T[t]:,}"]
        for name in names:
            by = made.arms[name].by_sigma
            assert by is not None
            mean, low, high = (float(part_T[t]) for part_T in (by.mean_T, by.low_T, by.high_T))
            if math.isnan(mean):
                cells.append("too few images")
                continue
            text = f"{mean:+.{shown}f}" + ("" if math.isnan(low) else f" [{low:+.{shown}f}, {high:+.{shown}f}]")
            cells.append(Html(f"<strong>{text}</strong>") if low > 0 or high < 0 else text)
        rows.append(cells)
    heads = {"sigma": False, "samples": True} | dict.fromkeys(names, False)
    return table("Differences by sigma", heads, rows)


def _rates(facts: TrialFacts) -> Iterator[Part]:
    """The sweeps of learning rates, where there are any."""
    swept = {name: tried for name, tried in facts.tuning.items() if tried}
    if not swept:
        return
    rates = sorted({rate for tried in swept.values() for rate in tried})
    rows = []
    for name, tried in swept.items():
        best = best_rate(tried)
        cells = [name]
        for rate in rates:
            loss = tried.get(rate)
            text = "" if loss is None else f"{loss:.5f}" if math.isfinite(loss) else DIVERGED
            cells.append(Html(f"<strong>{text}</strong>") if rate == best else text)
        rows.append(cells)
    notes = [note for name, tried in swept.items() if (note := rate_text(name, tried))]
    yield Part(
        "rates",
        "Learning rates",
        "Learning rates",
        "Loss on the images that learning rates are chosen by, of a seed of its own. Bold: the best, which goes on.",
        table("Learning rates", {"arm": False} | {f"{rate:g}": True for rate in rates}, rows)
        + "".join(f"<p class='note'>{escape(capital(note))}.</p>" for note in notes),
    )


def _limits(facts: TrialFacts, made: Judgement) -> str:
    lines = [
        f"{facts.model} alone, and {facts.held_out}: another model or other images may differ.",
        f"{counted(facts.steps, 'step')}: what is behind by then may catch up later.",
        "The loss on held-out images, and not how pictures look.",
        "Whether an arm would do better with settings that were not tried.",
    ]
    if made.place:
        lines.append("Where the plan lies among its shuffles: each is another draw, and few of them tell little.")
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
