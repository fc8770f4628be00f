"""The page of a comparison: one HTML file, in the style and with the script of the report's.

Escaped like the report: text with `html.escape`, what the script reads as JSON without `<`, `>` and `&`.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.analyse.compare import (
    CHANGED,
    Comparison,
    FactorComparison,
    StreamComparison,
    change_text,
    sigma_text,
)
from simpletuner_layerprobe.analyse.findings import chance
from simpletuner_layerprobe.analyse.heatmap import bin_edges
from simpletuner_layerprobe.run.records import Run
from simpletuner_layerprobe.show.page import filled, model_name, rounded, script_json, template_text

_HEAD = "<h3>{} stream</h3>"


def compare_page(run_a: Run, run_b: Run, found: Comparison) -> str:
    """The HTML of a comparison of these two runs."""
    report = template_text("templates/report.html")
    names = [model_name(run.manifest) for run in (run_a, run_b)]
    model = names[0] if names[0] == names[1] else f"{names[0]} and {names[1]}"
    return filled(
        template_text("templates/compare.html"),
        {
            "title": escape(f"Layer probe: {model}, A and B"),
            "model": escape(model),
            "lead": escape(_lead(found)),
            "style": report.partition("<style>")[2].partition("</style>")[0],
            "script": report.rpartition("<script>")[2].partition("</script>")[0],
            "blocks": "".join(_blocks(found)),
            "factors": _factors(found.factors) if found.factors else f"<p>{escape(found.factors_missing)}</p>",
            "runs": _runs(run_a, run_b, found),
            "version": escape(__version__),
            "data": script_json(_data(found)),
        },
    )


def _lead(found: Comparison) -> str:
    parts = [
        f"{int(one.levels.significant.sum()):,} of {len(one.blocks):,} blocks of the {name} stream changed"
        if not one.missing
        else f"not enough samples of the {name} stream"
        for name, one in found.streams.items()
    ]
    if found.factors:
        changed = found.factors.verdict_L.count(CHANGED)
        parts.append(f"{changed:,} factor{'s' * (changed != 1)} changed")
    return f"{', '.join(parts)}: from A with {found.samples_a:,} to B with {found.samples_b:,} samples."


def _data(found: Comparison) -> dict[str, Any]:
    number = {block: i for i, block in enumerate(found.blocks)}
    maps = []
    for name, stream in found.streams.items():
        cells = stream.cells
        maps.append(
            {
                "id": name,
                "title": f"{name} stream, B minus A",
                "change": True,
                "own": [number[block] for block in stream.blocks],
                "count": np.where(stream.used_T, np.minimum(stream.count_a_T, stream.count_b_T), 0).tolist(),
                "counts": [stream.count_a_T.tolist(), stream.count_b_T.tolist()],
                "mean": rounded(cells.difference),
                "low": rounded(cells.low),
                "high": rounded(cells.high),
                "p": rounded(cells.p),
                "a": rounded(cells.a),
                "b": rounded(cells.b),
                "sure": cells.significant.astype(int).tolist(),
            }
        )
    return {"blocks": found.blocks, "edges": bin_edges(found.bins).tolist(), "maps": maps}


def _blocks(found: Comparison) -> Iterator[str]:
    number = {block: i for i, block in enumerate(found.blocks)}
    for stream in found.streams.values():
        yield _HEAD.format(escape(stream.stream[:1].upper() + stream.stream[1:]))
        if stream.missing:
            yield f"<p>{escape(stream.missing[:1].upper() + stream.missing[1:])}.</p>"
            continue
        rows = [
            _block(stream, i, number[block])
            for i, block in enumerate(stream.blocks)
            if stream.levels.significant[i] or stream.cells.significant[:, i].any()
        ]
        heads = ("#", "block", "A", "B", "change [95% interval]", "p", "cells changed at sigma")
        yield _table(heads, rows, f"Changed blocks of the {stream.stream} stream") if rows else "<p>None.</p>"


def _block(stream: StreamComparison, i: int, number: int) -> str:
    levels = stream.levels
    link = (
        f"<a href='#map-{escape(stream.stream)}' data-map='{escape(stream.stream)}' data-first='{number}' "
        f"data-last='{number}' data-low='0' data-high='1'>{escape(stream.blocks[i])}</a>"
    )
    changed = bool(levels.significant[i])
    what = escape(change_text(levels, i)) if changed else "no change over all sigmas"
    cells = (f"{levels.a[i]:.4g}", f"{levels.b[i]:.4g}", what, chance(float(levels.p[i])) if changed else "")
    where = escape(sigma_text(stream.cells.significant[:, i]))
    inner = "".join(f"<td class='n'>{text}</td>" for text in cells)
    return f"<tr><td class='n'>{number}</td><th scope='row'>{link}</th>{inner}<td>{where}</td></tr>"


def _factors(factors: FactorComparison) -> str:
    rows = []
    for i, block in enumerate(factors.blocks):
        sides = []
        for value_L, sure, critical in (
            (factors.values.a, factors.a, factors.critical_a),
            (factors.values.b, factors.b, factors.critical_b),
        ):
            note = " critical" if i in critical else ""
            sides.append(f"<td class='n'>{value_L[i]:.3f} [{sure.low_L[i]:.3f}, {sure.high_L[i]:.3f}]</td>")
            sides.append(
                f"<td class='n'>{sure.factor_K[i]}{note}</td><td class='n'>{100 * sure.agreement_K[i]:.0f}%</td>"
            )
        verdict = factors.verdict_L[i]
        shown = f"<strong>{verdict}</strong>" if verdict == CHANGED else verdict
        rows.append(
            f"<tr><td class='n'>{i}</td><th scope='row'>{escape(block)}</th>{''.join(sides)}<td>{shown}</td></tr>"
        )
    heads = ("#", "block", "contribution A", "factor A", "agreed", "contribution B", "factor B", "agreed", "")
    return _table(heads, rows, "Contributions and factors of both runs")


def _runs(run_a: Run, run_b: Run, found: Comparison) -> str:
    facts = {
        "run": [str(run.path) for run in (run_a, run_b)],
        "model": [model_name(run.manifest) for run in (run_a, run_b)],
        "samples": [f"{found.samples_a:,}", f"{found.samples_b:,}"],
        "recorded": [run.manifest.created or "unknown" for run in (run_a, run_b)],
    }
    rows = [
        f"<tr><th scope='row'>{name}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in facts.items()
    ]
    told = "".join(f"<li>{escape(line)}</li>" for line in (*found.differences, *found.notes))
    table = _table(("", "A", "B"), rows, "The runs")
    return table + (f"<ul>{told}</ul>" if told else "")


def _table(heads: tuple[str, ...], rows: list[str], label: str) -> str:
    left = ("", "block", "cells changed at sigma") if heads[0] == "#" else heads
    head = "".join(f"<th scope='col'{'' if name in left else ' class=n'}>{name}</th>" for name in heads)
    return (
        f"<div class='scroll tall' tabindex='0' role='region' aria-label='{escape(label)}'><table class='lokr'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
