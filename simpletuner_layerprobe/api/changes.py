"""Changes: two runs side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from simpletuner_layerprobe.analyse import compare as analysis
from simpletuner_layerprobe.analyse.change import sigma_text
from simpletuner_layerprobe.analyse.compare import Comparison, StreamComparison, as_json, change_text
from simpletuner_layerprobe.analyse.paired import Paired, clear, paired, paired_text
from simpletuner_layerprobe.analyse.sections import chance
from simpletuner_layerprobe.api.run import Run
from simpletuner_layerprobe.errors import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest

__all__ = ["Comparison", "Paired", "StreamComparison", "as_json", "chance", "change_text", "sigma_text"]
__all__ += ["clear", "paired_text"]
__all__ += ["common_preset", "compare"]


def compare(
    a: Run, b: Run, *, reading: str | None = None, bins: int = 10, preset: str | int | None = None
) -> Comparison:
    """What changed from run A to run B of the same architecture: cells, blocks and factors, each with its chance.

    preset: what the factors are made for; by default that of both runs, else the article's. Of the result, .streams has
    the cells (T, L) and the levels (L,) of each stream, .factors what became of the factors, .notes how the runs differ
    otherwise, and .paired what changed sample by sample where both have one noise seed, else .not_paired says why not.
    Raises ProbeError for other streams or blocks, and without samples.
    """
    from simpletuner_layerprobe.lokr.plan import decide_of

    reading = reading or a.reading
    made = analysis.compare(
        a.samples_in(reading),
        b.samples_in(reading),
        decide_of(a.manifest, preset=preset or common_preset(a, b)),
        bins=bins,
    )
    pairs, not_paired = _paired(a, b, reading, bins)
    notes = (*_differences(a.manifest, b.manifest), *made.notes)
    return replace(made, notes=notes, paired=pairs, not_paired=not_paired)


def _paired(a: Run, b: Run, reading: str, bins: int) -> tuple[Paired | None, str]:
    """The runs sample by sample, or why they are not compared so."""
    from simpletuner_layerprobe.readings import parse_reading

    seeds = [run.manifest.settings.get("noise_seed") for run in (a, b)]
    sigmas = [run.manifest.settings.get("sigmas") for run in (a, b)]
    if None in seeds:
        having = [label for label, seed in zip("AB", seeds, strict=True) if seed is not None]
        return None, f"only {having[0]} has a noise seed" if having else "the runs have no noise seed"
    if seeds[0] != seeds[1]:
        return None, f"the runs have different noise seeds, {seeds[0]} in A and {seeds[1]} in B"
    if sigmas[0] != sigmas[1]:
        return None, f"the runs draw sigma in different ways, {sigmas[0]} in A and {sigmas[1]} in B"
    if parse_reading(reading).ablation:
        return None, "an ablation is taken of some samples only, which are others in each run"
    try:
        return paired(a.samples_in(reading), b.samples_in(reading), a.data.loss, b.data.loss, bins), ""
    except ProbeError as error:
        return None, str(error)


def common_preset(a: Run, b: Run) -> str:
    """The preset of both runs, the article's if they have different ones."""
    return a.preset if a.preset == b.preset else "article"


def _differences(a: Manifest, b: Manifest) -> Iterator[str]:
    """What was recorded otherwise in B than in A, a line each."""
    for line in a.difference(b):
        pair = re.fullmatch(r"(.*) here, (.*) in the run", line)
        yield f"{pair[1]} in A, {pair[2]} in B" if pair else line
