"""Changes: two runs side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from simpletuner_layerprobe.analyse import compare as analysis
from simpletuner_layerprobe.analyse.compare import Comparison, StreamComparison, as_json, change_text, sigma_text
from simpletuner_layerprobe.analyse.sections import chance
from simpletuner_layerprobe.api.run import Run

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest

__all__ = ["Comparison", "StreamComparison", "as_json", "chance", "change_text", "sigma_text"]
__all__ += ["common_preset", "compare"]


def compare(
    a: Run, b: Run, *, reading: str | None = None, bins: int = 10, preset: str | int | None = None
) -> Comparison:
    """What changed from run A to run B of the same architecture: cells, blocks and factors, each with its chance.

    preset: what the factors are made for; by default that of both runs, else the article's. Of the result, .streams has
    the cells (T, L) and the levels (L,) of each stream, .factors what became of the factors, .notes how the runs differ
    otherwise. Raises ProbeError for other streams or blocks, and without samples.
    """
    from simpletuner_layerprobe.lokr.plan import decide_of

    reading = reading or a.reading
    made = analysis.compare(
        a.samples_in(reading),
        b.samples_in(reading),
        decide_of(a.manifest, preset=preset or common_preset(a, b)),
        bins=bins,
    )
    return replace(made, notes=(*_differences(a.manifest, b.manifest), *made.notes))


def common_preset(a: Run, b: Run) -> str:
    """The preset of both runs, the article's if they have different ones."""
    return a.preset if a.preset == b.preset else "article"


def _differences(a: Manifest, b: Manifest) -> Iterator[str]:
    """What was recorded otherwise in B than in A, a line each."""
    for line in a.difference(b):
        pair = re.fullmatch(r"(.*) here, (.*) in the run", line)
        yield f"{pair[1]} in A, {pair[2]} in B" if pair else line
