"""What the pages have in common: one template, their parts, tables, and data for their script.

Everything that comes from a run is escaped on its way into a page: text with `html.escape`, the numbers and names for
the script as JSON without `<`, `>` and `&`. The page's own policy forbids it to load anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.targets import MAKER

_SCALE = (
    "<div class='controls'><fieldset><legend>Scale</legend><div class='seg'>"
    "<label><input type='radio' name='scale' value='linear'>Linear</label>"
    "<label><input type='radio' name='scale' value='clipped' checked>Clipped</label></div></fieldset></div>"
)
_NO_SCRIPT = (
    "<noscript><p class='note'>A script in this page draws the maps; the tables below need none.</p></noscript>"
)
TALL = 100
"""Tables of more rows scroll by themselves."""
POINTING = "Point at a cell, or move to a map with Tab and then with the arrow keys."
_PLACE = re.compile(r"\{\{(\w+)\}\}")


class Html(str):
    """Text that is HTML already: escaped where it came from a run."""


@dataclass(frozen=True)
class Part:
    """A part of a page. id: its anchor. name: in the navigation. say: what it shows, in words. body: HTML."""

    id: str
    name: str
    title: str
    say: str
    body: str


def map_places(places: Mapping[str, str]) -> Html:
    """Where the script draws the maps of `data["maps"]` that are `at` these places: id -> class."""
    return Html(
        _SCALE + "".join(f"<div id='{name}' class='{kind}'></div>" for name, kind in places.items()) + _NO_SCRIPT
    )


def html_page(
    kicker: str,
    model: str,
    lead: str,
    parts: Sequence[Part],
    foot: str,
    data: Mapping[str, Any],
    switch: Html | None = None,
) -> str:
    """A whole page with the style and the script of `templates/`. switch: a control beside the navigation."""
    nav = "".join(f"<li><a href='#{part.id}'>{escape(part.name)}</a></li>" for part in parts)
    body = "\n".join(
        f"<section class='part' id='{part.id}' aria-labelledby='h-{part.id}'><h2 id='h-{part.id}'>{escape(part.title)}"
        f"</h2>{f'<p class=say>{escape(part.say)}</p>' if part.say else ''}{part.body}</section>"
        for part in parts
    )
    places = {
        "title": escape(f"{kicker}: {model}"),
        "kicker": escape(kicker),
        "model": escape(model),
        "lead": escape(lead),
        "nav": nav,
        "switch": switch or "",
        "parts": body,
        "foot": escape(foot),
        "version": escape(__version__),
        "maker": MAKER,
        "data": script_json(data),
        "style": _template("page.css"),
        "script": _template("page.js"),
    }
    # In one go: what is filled in is not looked at again.
    return _PLACE.sub(lambda place: places[place.group(1)], _template("page.html"))


def _template(name: str) -> str:
    return files("simpletuner_layerprobe.show").joinpath("templates", name).read_text(encoding="utf-8")


def script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def rounded(values: NDArray[np.floating]) -> list[Any]:
    """To five digits, null where not finite."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def table(label: str, heads: Mapping[str, bool], rows: Sequence[Sequence[str]], header: int = 0) -> str:
    """A table that scrolls by itself. heads: head -> whether its column holds numbers. rows: text, not yet escaped.

    header: the column that names the row. A cell that is Html is HTML already.
    """
    sides, names = list(heads.values()), [escape(name) for name in heads]
    head = "".join(f"<th scope='col'{' class=n' * side}>{escape(name)}</th>" for name, side in heads.items())
    body = []
    for row in rows:
        cells = []
        for column, (cell, side) in enumerate(zip(row, sides, strict=True)):
            tag, scope = ("th", " scope='row'") if column == header else ("td", f" data-head='{names[column]}'")
            cells.append(f"<{tag}{scope}{' class=n' * side}>{cell if isinstance(cell, Html) else escape(cell)}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = "scroll tall" if len(rows) > TALL else "scroll"
    return (
        f"<div class='{kind}' tabindex='0' role='region' aria-label='{escape(label)}'><table class='rows'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def bar(share: float, kind: str = "") -> Html:
    """A bar over this share of its cell's width. kind: a class of the style, "hot" or "pale"."""
    return Html(f"<span class='bar {kind}' style='width:{100 * share:.2f}%'></span>")


def cells_link(
    text: str, stream: str, first: int, last: int, *, low: float = 0.0, high: float = 1.0, title: str = ""
) -> Html:
    """A link to the blocks first .. last at sigma low .. high in a stream's map."""
    return Html(
        f"<a href='#map-{escape(stream)}' data-map='{escape(stream)}' data-first='{first}' data-last='{last}' "
        f"data-low='{low:.6g}' data-high='{high:.6g}' title='{escape(title)}'>{escape(text)}</a>"
    )
