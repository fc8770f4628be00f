"""Trainable parameters per block as upright bars in a page's HTML: a taller bar is more capacity."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from simpletuner_layerprobe.show.blocks import BlockRow
from simpletuner_layerprobe.show.html import Html

MOST_TICKS = 12


def parameter_bars(title: str, rows: Sequence[BlockRow], equal: Sequence[int]) -> Html:
    """A figure with a bar per block. equal: what each gets from the equal plan of the same size, a line; () for none.

    Raises TypeError for rows whose parameters are not known.
    """
    values = [int(row.parameters) for row in rows]  # type: ignore[arg-type]
    most = max(*values, *equal, 1)
    bars = []
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        line = f"<u style='bottom:{100 * equal[place] / most:.2f}%'></u>" if equal else ""
        said = escape(f"{row.number}: {row.block}: {value:,}" + (f", equal {equal[place]:,}" if equal else ""))
        kind = "hot" if row.critical else "pale" if not row.measured else ""
        bars.append(f"<div title='{said}'><i class='{kind}' style='height:{100 * value / most:.2f}%'></i>{line}</div>")
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if len(rows) <= s * MOST_TICKS), 1000)
    ticks = "".join(
        f"<span style='left:{100 * (place + 0.5) / len(rows):.2f}%'>{rows[place].number}</span>"
        for place in range(0, len(rows), step)
    )
    legend = "; the line: equal factors of the same size" if equal else ""
    label = escape(f"{title}, a bar per block; the numbers stand in the table below")
    return Html(
        f"<figure class='upright'><figcaption><strong>{escape(title)}</strong><span>highest {most:,}{legend}</span>"
        f"</figcaption><div class='bars' role='img' aria-label='{label}'>{''.join(bars)}</div>"
        f"<div class='ticks' aria-hidden='true'>{ticks}</div></figure>"
    )
