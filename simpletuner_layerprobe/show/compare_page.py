"""The page of a comparison: one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from simpletuner_layerprobe.analyse.change import sigma_text
from simpletuner_layerprobe.analyse.compare import (
    CHANGED,
    Comparison,
    FactorComparison,
    StreamComparison,
    change_text,
)
from simpletuner_layerprobe.analyse.heatmap import bin_edges
from simpletuner_layerprobe.analyse.paired import clear, paired_text
from simpletuner_layerprobe.analyse.sections import chance
from simpletuner_layerprobe.show.html import (
    POINTING,
    Html,
    Part,
    cells_link,
    html_page,
    map_places,
    rounded,
    table,
)
from simpletuner_layerprobe.show.words import capital, counted, model_name, samples_text, share_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.load import RunData


def compare_page(run_a: RunData, run_b: RunData, comparison: Comparison, decided: Sequence[tuple[int, str]]) -> str:
    """The HTML of a comparison of these two runs. decided: (block number, kind of modules) of each factor compared."""
    names = [model_name(run.manifest) or "unknown model" for run in (run_a, run_b)]
    factors = comparison.factors
    parts = (
        *_paired(comparison),
        Part(
            "heatmaps",
            "Changes",
            "Changes, B minus A",
            "How much further (red) or less far (blue) a block turns the hidden states in B than in A, as a fraction "
            "of π. Columns are blocks, rows are parts of the noise range: clean images at the bottom, pure noise at "
            "the top. A square marks a change beyond chance, after correction for all cells. Crossed rows have too few "
            f"samples in A or B. {POINTING}",
            map_places({"maps": ""}),
        ),
        Part(
            "blocks",
            "Blocks",
            "Changed blocks",
            "The mean over the parts of sigma, each weighing the same, with the 95% interval of the change. p is the "
            "chance of a change as large if there is none, corrected for all blocks and streams. A link marks the "
            "cells.",
            "".join(_blocks(comparison)),
        ),
        Part(
            "lokr",
            "Factors",
            "Contributions and factors",
            "The same plan on each run by itself. A factor counts as changed if it is settled in both runs (agreement "
            "of 95% or more) and not the same.",
            _factors(factors, decided) if factors else f"<p>{escape(comparison.factors_missing)}</p>",
        ),
        Part("run", "Runs", "The runs", "", _runs(run_a, run_b, comparison)),
    )
    foot = "The runs are taken for independent draws of images" + (", but for the pairs." if comparison.paired else ".")
    lead = _lead(run_a, run_b, comparison)
    model = " and ".join(dict.fromkeys(names))
    return html_page("Layer probe, comparison", model, lead, parts, foot, _data(comparison))


def _paired(comparison: Comparison) -> Iterator[Part]:
    """The comparison sample by sample, where there is one."""
    made = comparison.paired
    if made is None:
        return
    number = {block: i for i, block in enumerate(comparison.blocks)}
    by_sigma = [
        (
            f"{t / made.bins:.3g} to {(t + 1) / made.bins:.3g}",
            f"{made.counts_T[t]:,}",
            f"{made.loss_T.a[t]:.4g}",
            f"{made.loss_T.b[t]:.4g}",
            change_text(made.loss_T, t),
        )
        for t in range(made.bins)
        if not np.isnan(made.loss_T.difference[t])
    ]
    blocks = [
        (
            str(number[block]),
            f"{block} ({stream})",
            f"{change.a[i]:.4g}",
            f"{change.b[i]:.4g}",
            change_text(change, i),
        )
        for stream, change in made.angles.items()
        for i, block in enumerate(made.blocks[stream])
        if clear(change)[i]
    ]
    interval = {"A": True, "B": True, "change [95% interval]": True}
    yield Part(
        "pairs",
        "Pairs",
        "Sample by sample, B minus A",
        f"Both runs have one noise seed: {counted(made.pairs, 'pair')} of {counted(made.images, 'image')} with the "
        "same sigma, noise and caption. Intervals draw images. Blocks are shown where their change is beyond chance, "
        "after correction for all blocks. The parts below take each run by itself.",
        f"<p>{escape(capital(paired_text(made, number)))}.</p>"
        + (table("Loss by sigma", {"sigma": False, "pairs": True} | interval, by_sigma, header=1) if by_sigma else "")
        + (table("Changed blocks", {"#": True, "block": False} | interval, blocks, header=1) if blocks else ""),
    )


def _lead(run_a: RunData, run_b: RunData, comparison: Comparison) -> str:
    parts = [
        f"{stream.levels.significant.sum():,} of {counted(len(stream.blocks), 'block')} of the {name} stream changed"
        if not stream.missing
        else f"not enough samples of the {name} stream"
        for name, stream in comparison.streams.items()
    ]
    if comparison.factors:
        parts.append(f"{counted(comparison.factors.verdict_K.count(CHANGED), 'factor')} changed")
    a, b = (samples_text(run.samples, run.images) for run in (run_a, run_b))
    return f"{', '.join(parts)}: from A with {a} to B with {b}."


def _data(comparison: Comparison) -> dict[str, Any]:
    number = {block: i for i, block in enumerate(comparison.blocks)}
    maps = []
    for name, stream in comparison.streams.items():
        cells = stream.cells
        maps.append(
            {
                "id": name,
                "title": f"{name} stream, B minus A",
                "change": True,
                "own": [number[block] for block in stream.blocks],
                "count": np.where(stream.used_T, np.minimum(stream.counts_a_T, stream.counts_b_T), 0).tolist(),
                "counts": [stream.counts_a_T.tolist(), stream.counts_b_T.tolist()],
                "mean": rounded(cells.difference),
                **{part: rounded(getattr(cells, part)) for part in ("low", "high", "p", "a", "b")},
                "sure": cells.significant.astype(int).tolist(),
            }
        )
    return {"blocks": comparison.blocks, "edges": bin_edges(comparison.bins).tolist(), "maps": maps}


def _blocks(comparison: Comparison) -> Iterator[str]:
    number = {block: i for i, block in enumerate(comparison.blocks)}
    for stream in comparison.streams.values():
        yield f"<h3>{escape(capital(stream.stream))} stream</h3>"
        if stream.missing:
            yield f"<p>{escape(capital(stream.missing))}.</p>"
            continue
        rows = [
            _block(stream, i, number[block])
            for i, block in enumerate(stream.blocks)
            if stream.levels.significant[i] or stream.cells.significant[:, i].any()
        ]
        heads = {"#": True, "block": False, "A": True, "B": True, "change [95% interval]": True, "p": True}
        label = f"Changed blocks of the {stream.stream} stream"
        yield table(label, heads | {"cells changed at sigma": False}, rows, header=1) if rows else "<p>None.</p>"


def _block(stream: StreamComparison, i: int, number: int) -> tuple[str, ...]:
    levels = stream.levels
    changed = bool(levels.significant[i])
    return (
        str(number),
        cells_link(stream.blocks[i], stream.stream, number, number),
        f"{levels.a[i]:.4g}",
        f"{levels.b[i]:.4g}",
        change_text(levels, i) if changed else "no change over all sigmas",
        chance(float(levels.p[i])) if changed else "",
        sigma_text(stream.cells.significant[:, i]),
    )


def _factors(factors: FactorComparison, decided: Sequence[tuple[int, str]]) -> str:
    heads = {"#": True, "block": False}
    for side in ("A", "B"):
        heads |= {f"contribution {side}": True, f"factor {side}": True, f"agreed {side}": True}
    rows = []
    for place, (number, kind) in enumerate(decided):
        cells = [str(number), f"{factors.blocks[number]} {kind}".strip()]
        for value_L, sure in ((factors.values.a, factors.a), (factors.values.b, factors.b)):
            cells.append(f"{value_L[number]:.3f} [{sure.low_L[number]:.3f}, {sure.high_L[number]:.3f}]")
            cells += [str(sure.factor_K[place]), share_text(sure.agreement_K[place])]
        verdict = factors.verdict_K[place]
        rows.append((*cells, Html(f"<strong>{verdict}</strong>") if verdict == CHANGED else verdict))
    return table("Contributions and factors of both runs", heads | {"": False}, rows, header=1)


def _runs(run_a: RunData, run_b: RunData, comparison: Comparison) -> str:
    runs = (run_a, run_b)
    rows = [
        ("run", *(str(run.path) for run in runs)),
        ("model", *(model_name(run.manifest) or "unknown" for run in runs)),
        ("samples", *(samples_text(run.samples, run.images) for run in runs)),
        ("recorded", *(run.manifest.created or "unknown" for run in runs)),
    ]
    lines = (*comparison.notes, *([f"not paired: {comparison.not_paired}"] if comparison.not_paired else ()))
    notes = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return table("The runs", {"": False, "A": False, "B": False}, rows) + (f"<ul>{notes}</ul>" if notes else "")
