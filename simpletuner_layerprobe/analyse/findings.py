"""Findings: what a run shows by itself, and how sure that is. Every definition in one sentence: docs/findings.md.

What is said of blocks is judged by the bootstrap's replicates, which draw images (shapes.py); what is said of captions,
sizes and the like by comparing images, or samples within images (conditions.py). A run in which there is nothing to
find shows anything at all with a chance of at most ALPHA; islands are a description and carry no such promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.conditions import BACKEND, CONDITIONS, Effect, conditions, effect
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.sections import (
    ALPHA,
    KIND_ALPHA,
    KINDS,
    TITLES,
    Finding,
    Section,
    as_json,
    numbered,
    sureness,
    words,
)
from simpletuner_layerprobe.analyse.shapes import shape_sections

__all__ = ["ALPHA", "KINDS", "KIND_ALPHA", "TITLES", "Finding", "Section", "as_json", "findings", "numbered"]
__all__ += ["sureness", "words"]

CONDITION_FLOOR = 0.05
"""Of the block's level: smaller differences are no finding, however certain."""


def findings(samples: Samples, bins: int = 10) -> tuple[Section, ...]:
    """All sections, kind by kind and stream by stream, in the order of KINDS.

    Of an ablation, whose numbers may be below 0, no conditions. Raises ProbeError without samples or finite distances,
    and for a reading that may lack numbers.
    """
    shapes = tuple(shape_sections(Bootstrap.of(samples, bins), samples.blocks))
    return shapes if samples.kind.ablation else (*shapes, *_condition_sections(samples, bins))


def _condition_sections(samples: Samples, bins: int) -> Iterator[Section]:
    known = list(conditions(samples))
    for kind in CONDITIONS:
        asked = [condition for condition in known if condition.name == kind]
        answers: list[tuple[str, Effect | str]]
        if kind == BACKEND and len(asked) < 2:
            only = f"all samples come from one data backend ({asked[0].value})" if asked else "not recorded in this run"
            answers = [("", only)]
        else:
            if kind == BACKEND and len(asked) == 2:
                asked = asked[:1]  # the second compared with the first is the same test again
            answers = [(condition.value, effect(samples, condition, bins)) for condition in asked]
        for stream in samples.blocks:
            yield _condition_section(samples, kind, stream, answers)


def _condition_section(
    samples: Samples, kind: str, stream: str, answers: Sequence[tuple[str, Effect | str]]
) -> Section:
    effects = [(value, answer) for value, answer in answers if isinstance(answer, Effect)]
    notes = [f"{value}: {answer}" if value else answer for value, answer in answers if isinstance(answer, str)]
    if not effects:
        return Section(kind, stream, (), 0, "; ".join(notes))
    shown: list[Finding] = []
    for value, answer in effects:
        columns = answer.columns[stream]
        level_L, p_L = answer.level_D[columns], np.minimum(answer.p_D[columns] * len(effects), 1.0)
        effect_L, low_L, high_L = (part[columns] for part in (answer.effect_D, answer.low_D, answer.high_D))
        for i in np.flatnonzero((p_L <= KIND_ALPHA[kind]) & (np.abs(effect_L) >= CONDITION_FLOOR)):
            shown.append(
                Finding(
                    kind=kind,
                    stream=stream,
                    blocks=(samples.blocks[stream][i],),
                    low_sigma=0.0,
                    high_sigma=1.0,
                    effect=float(effect_L[i]),
                    low=float(low_L[i]),
                    high=float(high_L[i]),
                    unit="of the block's level",
                    p=float(p_L[i]),
                    share=None,
                    level=float(level_L[i]),
                    samples=answer.samples,
                    value=value,
                )
            )
    shown.sort(key=lambda finding: -abs(finding.effect))
    if samples.images is None:
        notes.append("images are not known: this holds for these images, others may differ")
    else:
        images = max(answer.units for _, answer in effects)
        within = "within each of" if all(answer.within for _, answer in effects) else "between"
        notes.append(f"compared {within} {images:,} images")
    return Section(kind, stream, tuple(shown), effects[0][1].samples, notes=tuple(notes))
