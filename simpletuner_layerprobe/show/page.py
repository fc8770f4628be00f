"""The report: one HTML file that opens from disk and asks nothing of any network.

Shape letters: T bins, L blocks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from simpletuner_layerprobe.analyse.findings import ALPHA, TITLES, Finding, Section, numbered, words
from simpletuner_layerprobe.analyse.heatmap import Heatmap, bin_edges, bin_index, combined
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import all_blocks
from simpletuner_layerprobe.show import ablation
from simpletuner_layerprobe.show.bars import parameter_bars
from simpletuner_layerprobe.show.blocks import BlockRow
from simpletuner_layerprobe.show.findings import by_kind, detail, empty, where
from simpletuner_layerprobe.show.html import (
    POINTING,
    Html,
    Part,
    bar,
    cells_link,
    html_page,
    map_places,
    rounded,
    table,
)
from simpletuner_layerprobe.show.words import (
    block_range,
    capital,
    counted,
    listed,
    model_name,
    samples_text,
    share_text,
)

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.ablation import Ablation
    from simpletuner_layerprobe.run.load import RunData
    from simpletuner_layerprobe.show.verdict import Verdict

SHOWN = 6  # findings of one kind and stream that are listed before the rest is folded away
READINGS = {"last": "last token, as in the article", "mean": "mean over the tokens"}
SHORT = {"last": "Last token", "mean": "Mean"}
TITLES_OF = {"combined": "mean of the streams"}


@dataclass(frozen=True)
class Weights:
    """What a run would make of the model.

    rows: one per block. goal: what they are made for. settled: how sure they are, in a line. equal: the parameters
    that each block gets from the equal plan of the same size; () where the modules of the model are not known.
    """

    rows: tuple[BlockRow, ...]
    goal: str
    settled: str
    equal: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What is shown of one reading. weights: None where `problem` says why there are none."""

    heatmaps: Mapping[str, Heatmap]
    weights: Weights | None
    problem: str = ""


@dataclass(frozen=True)
class Ablated:
    """What leaving blocks out shows. made: None where `problem` says why nothing. counted: of how many samples."""

    made: Ablation | None
    heatmap: Heatmap | None
    counted: str
    problem: str = ""


def page(
    run: RunData,
    verdict: Verdict,
    views: Mapping[str, View],
    sections: Sequence[Section],
    ablated: Ablated | None = None,
) -> str:
    """The HTML of a run's report. views: by reading, the first of which is shown until another is chosen; sections and
    verdict are of that. ablated: None for a run that was recorded without."""
    first, *_ = views
    heatmaps = views[first].heatmaps
    parts = (
        Part("verdict", "Verdict", "Verdict", "", _verdict(verdict)),
        Part(
            "heatmaps",
            "Heatmaps",
            "Heatmaps",
            "Mean angular distance between the hidden states before and after a block, as a fraction of π. Columns are "
            "blocks, rows are parts of the noise range: clean images at the bottom, pure noise at the top. Clipped "
            f"colours end at the 90th percentile of the cells, as in the article's recipe. {POINTING}",
            map_places({_place(name, first): f"of-{name}" for name in views}),
        ),
        *([_ablation(ablated)] if ablated else []),
        Part(
            "findings",
            "Findings",
            "Findings",
            "Numbers in brackets are 95% intervals. A run in which there is nothing to find shows any of these with a "
            f"chance of at most {ALPHA:.0%}; islands are a description and carry no such promise. A link marks the "
            "cells a finding speaks of.",
            _findings(sections, run),
        ),
        Part(
            "lokr",
            "Contributions",
            "Contributions and weighted LoKr",
            f"{_recipe(tuple(heatmaps))}, then stretched to 0 (least) .. 1 (most). A smaller factor gives a block more "
            "parameters. Agreement is the share of bootstrap replicates that decide the same.",
            "".join(f"<div class='of-{name}'>{_weights(name, view)}</div>" for name, view in views.items()),
        ),
        Part(
            "coverage",
            "Coverage",
            "Sigma coverage",
            "Samples in each part of the noise range, 0 clean to 1 noise.",
            _coverage(run, next(iter(heatmaps.values())).bins),
        ),
        Part("run", "Run", "The run", "", _facts(run, heatmaps)),
    )
    foot = "Angular distance says how far a block turns the hidden states, not how much a picture would miss it."
    data = _data(views, ablated.heatmap if ablated else None)
    name = model_name(run.manifest) or "unknown model"
    return html_page("Layer probe", name, _lead(run), parts, foot, data, _switch(tuple(views)))


def _switch(readings: Sequence[str]) -> Html:
    """Chooses the reading that is shown; nothing where there is one."""
    labels = [
        f"<label><input type='radio' name='reading' value='{name}'{' checked' * (not place)}>"
        f"{escape(SHORT.get(name, name))}</label>"
        for place, name in enumerate(readings)
    ]
    shown = f"<fieldset><legend>Reading</legend><div class='seg'>{''.join(labels)}</div></fieldset>"
    return Html(shown if len(labels) > 1 else "")


def _verdict(verdict: Verdict) -> str:
    lines = "".join(
        f"<div><dt>{escape(capital(name))}</dt><dd>{escape(capital(said))}.</dd></div>"
        for name, said in verdict.lines.items()
    )
    commands = "".join(
        f"<h3>{escape(capital(name))}</h3><div class='command'><pre>{escape(command)}</pre>"
        "<button type='button' class='copy' hidden>Copy</button></div>"
        for name, command in verdict.commands.items()
    )
    return f"<dl class='verdict'>{lines}</dl>{commands}"


def _place(reading: str, first: str) -> str:
    """Where the maps of a reading are drawn."""
    return "maps" if reading == first else f"maps-{reading}"


def _ablation(ablated: Ablated) -> Part:
    say = (
        f"How much a sample's own loss rises when one block hands on what it got: {ablated.counted}. The map of the "
        "angle beside it is of all samples, the scatter of those with ablation. Lines at a mark are 95% intervals."
    )
    body = ablation.part(ablated.made) if ablated.made else f"<p>{escape(capital(ablated.problem))}.</p>"
    return Part("ablation", "Ablation", "Blocks left out", say if ablated.made else "", body)


def _data(views: Mapping[str, View], loss: Heatmap | None) -> dict[str, Any]:
    """What the script draws. loss: of the ablation, beside the first stream of the first reading once more."""
    first, *_ = views
    heatmaps = views[first].heatmaps
    blocks = all_blocks([heatmap.blocks for heatmap in heatmaps.values()])
    maps = []
    for reading, view in views.items():
        shown = dict(view.heatmaps)
        if len(shown) > 1:
            with suppress(ProbeError):  # streams without a block in common: each has its own map
                shown["combined"] = combined(shown)
        behind, place = "" if reading == first else f"-{reading}", {"at": _place(reading, first)}
        what = f", {READINGS[reading]}" if len(views) > 1 else ""
        maps += [
            _map(name + behind, TITLES_OF.get(name, f"{name} stream") + what, heatmap, blocks) | place
            for name, heatmap in shown.items()
        ]
    if loss is not None:
        name = next(iter(heatmaps))
        beside = {"at": "beside"}
        maps.append(_map(f"{name}-beside", f"angle, {name} stream", heatmaps[name], blocks) | beside)
        maps.append(_map(loss.stream, "loss increase", loss, blocks) | beside | {"loss": True})
    edges = bin_edges(next(iter(heatmaps.values())).bins).tolist()
    return {"blocks": blocks, "edges": edges, "reading": first, "maps": maps}


def _map(name: str, title: str, heatmap: Heatmap, blocks: Sequence[str]) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "own": [blocks.index(block) for block in heatmap.blocks],
        "count": heatmap.counts_T.tolist(),
        "mean": rounded(heatmap.values_TL),
        "error": rounded(heatmap.standard_errors_TL),
    }


def _lead(run: RunData) -> str:
    streams = run.streams
    blocks = all_blocks(list(streams.values()))
    return (
        f"How far each of {counted(len(blocks), 'block')} turns the hidden states of the {listed(list(streams))} "
        f"stream{'s' * (len(streams) > 1)}, seen in {samples_text(run.samples, run.images)}."
    )


def _recipe(streams: Sequence[str]) -> str:
    """What became of the heatmaps on their way to the contributions."""
    clip = "clipped at percentile 90 of its cells"
    if len(streams) == 1:
        return f"After the article: the {streams[0]} stream {clip}, averaged over sigma"
    parts = [f"{listed([name for name in streams if name != 'text'])} weighted 2/3"]
    parts += ["text 1/3"] if "text" in streams else []
    return f"After the article: each stream {clip}, {' and '.join(parts)}, averaged over sigma"


def _facts(run: RunData, heatmaps: Mapping[str, Heatmap]) -> str:
    manifest = run.manifest
    left_out = ", ".join(f"{name}: {heatmap.nonfinite:,}" for name, heatmap in heatmaps.items() if heatmap.nonfinite)
    backends = Counter(run.facts["backend"].tolist())
    reading = next(iter(heatmaps.values())).reading
    facts = {
        "Model": f"{model_name(manifest) or 'unknown'} ({manifest.model_class or 'class unknown'})",
        "Streams": ", ".join(f"{name} {counted(len(blocks), 'block')}" for name, blocks in run.streams.items()),
        "Samples": samples_text(run.samples, run.images),
        "Left out": f"not finite, {left_out}" if left_out else "none",
        "Reading": READINGS.get(reading, reading),
        "Data backends": ", ".join(f"{name or 'unknown'} {count:,}" for name, count in sorted(backends.items())),
        "Recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "Versions": ", ".join(f"{name} {value}" for name, value in sorted(manifest.versions.items())) or "unknown",
        "Base model": manifest.fingerprint[:16] or "no fingerprint",
    }
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    settings = [(name, json.dumps(value, ensure_ascii=False)) for name, value in sorted(manifest.settings.items())]
    more = table("Settings", {"setting": False, "value": False}, settings) if settings else ""
    return f"<dl class='facts'>{rows}</dl>" + (f"<details><summary>Settings</summary>{more}</details>" if more else "")


def _findings(sections: Sequence[Section], run: RunData) -> str:
    """What shows something, a box per kind, and all else folded into one line."""
    parts, folded = [], []
    for kind, those in by_kind(sections):
        shown = "".join(_section(section, run) for section in those if not section.empty)
        parts += [f"<section class='kind'><h3>{escape(TITLES[kind])}</h3>{shown}</section>"] if shown else []
        folded += [
            f"<li>{escape(TITLES[kind] + where(section.stream))}: {escape('; '.join(_reasons(section)))}.</li>"
            for section in those
            if section.empty
        ]
    said = f"<div class='kinds'>{''.join(parts)}</div>" if parts else ""
    if folded:
        heads = "; ".join(empty(sections))
        said += (
            f"<details class='note'><summary>Nothing of: {escape(heads)}</summary><ul>{''.join(folded)}</ul></details>"
        )
    return said


def _reasons(section: Section) -> tuple[str, ...]:
    return (section.missing or "none", *section.notes)


def _section(section: Section, run: RunData) -> str:
    head = f"<h4>{escape(where(section.stream).lstrip(', '))}</h4>" if where(section.stream) else ""
    items = [f"<li>{_finding(finding, run)}</li>" for finding in section.findings]
    body = f"<ul>{''.join(items[:SHOWN])}</ul>" if items else f"<p>{escape(capital(section.text))}.</p>"
    if len(items) > SHOWN:
        rest = "".join(items[SHOWN:])
        body += f"<details><summary>{len(items) - SHOWN:,} more</summary><ul>{rest}</ul></details>"
    notes = "".join(f"<p class='note'>{escape(capital(note))}.</p>" for note in section.notes)
    return f"<div class='stream'>{head}{body}{notes}</div>"


def _finding(finding: Finding, run: RunData) -> str:
    numbers = numbered(finding, run.streams)
    link = cells_link(
        capital(block_range(numbers)),
        finding.stream,
        numbers[0],
        numbers[-1],
        low=finding.low_sigma,
        high=finding.high_sigma,
        title=" to ".join(dict.fromkeys((finding.blocks[0], finding.blocks[-1]))),
    )
    said = f"{link} {escape(words(finding))}"
    return f"{said}<span class='detail'>{escape(detail(finding, run.samples))}</span>"


def _coverage(run: RunData, bins: int) -> str:
    edges = bin_edges(bins).tolist()
    counts = np.bincount(bin_index(run.sigma, bins), minlength=bins).tolist()
    rows = [
        (f"{edges[t]:.3g} to {edges[t + 1]:.3g}", bar(count / max(1, *counts)), f"{count:,}")
        for t, count in enumerate(counts)
    ]
    return table("Samples by sigma", {"sigma": False, "": False, "samples": True}, rows)


def _weights(reading: str, view: View) -> str:
    """What the plan of a reading comes to: the bars and the table of the blocks."""
    weights = view.weights
    if weights is None:
        return f"<p>{escape(capital(view.problem))}.</p>"
    names = tuple(dict.fromkeys(kind for row in weights.rows for kind in row.numbers))
    heads = {"#": True, "block": False, "contribution": True, " ": False, "95% interval": True}
    for name in names:
        heads |= {name: True, "agree": True} if len(names) == 1 else {f"{name} (agree)": True}
    said = f"{capital(READINGS.get(reading, reading))}. {capital(weights.goal)}: {weights.settled}."
    if names == ("factor",):
        said += " Feed-forward and modulation get the factor, attention twice the factor."
    if weights.equal:
        said += f" {sum(row.parameters or 0 for row in weights.rows):,} trainable parameters."
        bars = parameter_bars("Parameters of each block", weights.rows, weights.equal)
    else:
        bars = Html("<p>The run has no module table, so parameters are not known and no config can be made.</p>")
    rows = [_lokr_row(row, names) for row in weights.rows]
    return f"<p>{escape(said)}</p>{bars}" + table("LoKr table", heads | {"parameters": True, "": False}, rows, header=1)


def _lokr_row(row: BlockRow, names: Sequence[str]) -> list[str]:
    value = row.contribution or 0.0
    cells = [str(row.number), row.block, f"{value:.3f}"]
    cells.append(bar(value, "hot" if row.critical else "" if row.measured else "pale"))
    cells.append("{:.3f} to {:.3f}".format(*row.interval) if row.interval else "")
    for name in names:
        number, agreed = (
            str(row.numbers.get(name, "-")),
            share_text(row.agreement[name]) if name in row.agreement else "",
        )
        cells += [number, agreed] if len(names) == 1 else [f"{number} ({agreed})" if agreed else number]
    return [*cells, "unknown" if row.parameters is None else f"{row.parameters:,}", ", ".join(row.notes)]
