"""The report: one HTML file that opens from disk and asks nothing of any network.

Everything that comes from a run is escaped on its way into the page: text with `html.escape`, the numbers and names for
the script as JSON without `<`, `>` and `&`. The page's own policy forbids it to load anything.

Shape letters: T bins, L blocks.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.analyse.bootstrap import Tally, article_decision, confidence
from simpletuner_layerprobe.analyse.conditions import Observation, observe
from simpletuner_layerprobe.analyse.contribution import Contribution, article_contributions
from simpletuner_layerprobe.analyse.findings import (
    ISLAND_ALPHA,
    KIND_ALPHA,
    TITLES,
    Finding,
    Section,
    chance,
    findings,
    words,
)
from simpletuner_layerprobe.analyse.heatmap import all_blocks, bin_edges, combined
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.config import OPTIONS_NAME, article_plan
from simpletuner_layerprobe.lokr.factors import article_factors, lokr_parameters
from simpletuner_layerprobe.probe import families

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.records import Run

SHOWN = 6  # findings of one kind and stream that are listed before the rest is folded away
REPLICATES = 400  # of the bootstrap behind the intervals
_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class _Weights:
    """What the run would make of the model: contributions, intervals and factors; parameters per block or None."""

    contribution: Contribution
    low_L: NDArray[np.float64]
    high_L: NDArray[np.float64]
    agreement_L: NDArray[np.float64]
    factors: tuple[int, ...]
    critical: tuple[int, ...]
    parameters: tuple[int, ...] | None
    note: str


def page(run: Run, *, tokens: str = "last", bins: int = 10, **weighting: float) -> str:
    """The HTML of a run's report. weighting: what differs from the article's, as `article_contributions` takes it.

    Raises ProbeError if the run has no samples or not this reading.
    """
    tally = Tally(run.manifest, tokens=tokens, bins=bins)
    observation = observe(run, tokens=tokens, bins=bins, also=[tally.add])
    problem = ""
    weights = None
    try:
        weights = _weights(run.manifest, observation, tally, weighting)
    except ProbeError as error:
        problem = str(error)
    model = model_name(run.manifest)
    return filled(
        template_text("templates/report.html"),
        {
            "title": escape(f"Layer probe of {model}"),
            "model": escape(model),
            "lead": _lead(run.manifest, observation),
            "facts": _facts(run, observation, tokens),
            "findings": _findings(findings(observation), observation),
            "chance": f"1 of {1 / KIND_ALPHA:.0f} runs (islands: 1 of {1 / ISLAND_ALPHA:.0f})",
            "recipe": escape(_recipe(tuple(observation.streams), **weighting)),
            "coverage": _coverage(observation),
            "lokr": _lokr(weights) if weights else f"<p>{escape(_capital(problem))}.</p>",
            "command": _command_part(_command(run, tokens, bins, weighting)) if weights else "",
            "version": escape(__version__),
            "data": script_json(_data(observation, weights)),
        },
    )


def template_text(name: str) -> str:
    return files("simpletuner_layerprobe.show").joinpath(name).read_text(encoding="utf-8")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with its places filled, in one go: what is filled in is not looked at again."""
    return _PLACE.sub(lambda place: parts[place.group(1)], template)


def script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _weights(manifest: Manifest, observation: Observation, tally: Tally, weighting: Mapping[str, float]) -> _Weights:
    streams = observation.heatmaps()
    contribution = article_contributions(streams, **weighting)
    critical = contribution.critical_union()
    factors = article_factors(contribution.value_L, critical=critical)

    def each(value_N: NDArray[np.float64]) -> NDArray[np.int64]:
        return article_factors(value_N)

    bootstrap = tally.bootstrap(replicates=REPLICATES)
    decide = article_decision(bootstrap.blocks, bootstrap.count_T, each, critical=None, alike=None, **weighting)
    sure = confidence(bootstrap, decide)
    parameters, note = None, "The run has no module table, so the parameters are not known."
    if manifest.modules:
        try:
            targets = families.family(manifest.family).targets
            plan = article_plan(contribution.blocks, factors.tolist(), targets, manifest.modules)
        except ProbeError as error:
            note = f"The parameters are not known: {error}"
        else:
            owner = dict.fromkeys(contribution.blocks, 0)
            for one in plan:
                parts = one.name.split(".")
                block = next(p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in owner)
                owner[block] += lokr_parameters(one.shape, one.factor)
            parameters, note = tuple(owner.values()), ""
    return _Weights(
        contribution,
        sure.low_L,
        sure.high_L,
        sure.agreement_K,
        tuple(factors.tolist()),
        critical,
        parameters,
        note,
    )


# For the script


def _data(observation: Observation, weights: _Weights | None) -> dict[str, Any]:
    heatmaps = observation.heatmaps()
    blocks = all_blocks([heatmap.blocks for heatmap in heatmaps.values()])
    number = {block: i for i, block in enumerate(blocks)}
    maps = []
    for name, stream in observation.streams.items():
        heatmap = stream.heatmap
        maps.append(
            {
                "id": name,
                "title": f"{name} stream",
                "own": [number[block] for block in heatmap.blocks],
                "count": heatmap.count_T.tolist(),
                "mean": rounded(heatmap.mean_TL),
                "error": rounded(stream.error_TL()),
            }
        )
    if len(heatmaps) > 1:
        try:
            both = combined(heatmaps)
        except ProbeError:
            pass  # streams without a block in common: each has its own map
        else:
            # The streams of a sample move together; the mean of their errors is the most that can come of it.
            errors = [
                stream.error_TL()[:, [stream.heatmap.blocks.index(block) for block in both.blocks]]
                for stream in observation.streams.values()
            ]
            maps.append(
                {
                    "id": "combined",
                    "title": "mean of the streams",
                    "own": [number[block] for block in both.blocks],
                    "count": both.count_T.tolist(),
                    "mean": rounded(both.mean_TL),
                    "error": rounded(np.mean(errors, axis=0)),
                }
            )
    data: dict[str, Any] = {"blocks": blocks, "edges": bin_edges(len(observation.count_T)).tolist(), "maps": maps}
    if weights:
        data["contribution"] = {
            "value": rounded(weights.contribution.value_L),
            "low": rounded(weights.low_L),
            "high": rounded(weights.high_L),
            "factor": weights.factors,
            "agreement": rounded(weights.agreement_L),
            "critical": weights.critical,
            "repeated": np.flatnonzero(~weights.contribution.covered_L).tolist(),
        }
    return data


def rounded(values: NDArray[np.float64]) -> list[Any]:
    """To five digits, null where not finite."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(inner) for inner in value]
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return [one(value) for value in values.tolist()]


# In HTML


def model_name(manifest: Manifest) -> str:
    name = " ".join(part for part in (manifest.family, manifest.flavour) if part)
    return name or manifest.model_class or "unknown model"


def _lead(manifest: Manifest, observation: Observation) -> str:
    blocks = len(all_blocks([stream.blocks for stream in manifest.streams]))
    names = _list([escape(stream.name) for stream in manifest.streams])
    return (
        f"How far each of {blocks:,} blocks turns the hidden states of the {names} "
        f"stream{'s' * (len(manifest.streams) > 1)}, seen in {observation.samples:,} "
        f"sample{'s' * (observation.samples != 1)}."
    )


def _list(names: Sequence[str]) -> str:
    """ "image", "image and text", "image, audio and text"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _recipe(
    streams: Sequence[str], *, clip_percentile: float = 90, text_weight: float = 1 / 3, image_weight: float = 2 / 3
) -> str:
    """What became of the heatmaps on their way to the contributions, with the numbers that were used."""
    clip = f"clipped at percentile {clip_percentile:g} of its cells"
    others = [name for name in streams if name != "text"]
    image = f"{_list(others)} weighted {_fraction(image_weight)}" if others else ""
    text = f"text {'' if image else 'weighted '}{_fraction(text_weight)}" if "text" in streams else ""
    if len(streams) == 1:
        return f"After the article: the {streams[0]} stream {clip}, averaged over sigma"
    return f"After the article: each stream {clip}, {' and '.join(filter(None, (image, text)))}, averaged over sigma"


def _fraction(value: float) -> str:
    """1/3 as such, other numbers to three digits."""
    fraction = Fraction(value).limit_denominator(12)
    return str(fraction) if math.isclose(fraction, value, rel_tol=1e-9) else f"{value:.3g}"


def _facts(run: Run, observation: Observation, tokens: str) -> str:
    manifest = run.manifest
    readings = {"last": "last token, as in the article", "mean": "mean over the tokens"}
    nonfinite = ", ".join(
        f"{name}: {stream.heatmap.nonfinite:,}"
        for name, stream in observation.streams.items()
        if stream.heatmap.nonfinite
    )
    facts = {
        "Model": f"{model_name(manifest)}{f' ({manifest.model_class})' if manifest.model_class else ''}",
        "Streams": ", ".join(f"{stream.name} {len(stream.blocks):,} blocks" for stream in manifest.streams),
        "Samples": f"{observation.samples:,}",
        "Left out": f"not finite, {nonfinite}" if nonfinite else "none",
        "Reading": readings.get(tokens, tokens),
        "Data backends": ", ".join(f"{name or 'unknown'} {count:,}" for name, count in observation.backends.items()),
        "Recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "Versions": ", ".join(f"{name} {value}" for name, value in sorted(manifest.versions.items())) or "unknown",
        "Base model": manifest.fingerprint[:16] or "no fingerprint",
    }
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    settings = "".join(
        f"<tr><th scope='row'>{escape(str(name))}</th><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for name, value in sorted(manifest.settings.items())
    )
    more = f"<details><summary>Settings</summary><div class='scroll'><table>{settings}</table></div></details>"
    return f"<dl class='facts'>{rows}</dl>{more if settings else ''}"


def _findings(sections: Sequence[Section], observation: Observation) -> str:
    heatmaps = observation.heatmaps()
    blocks = all_blocks([heatmap.blocks for heatmap in heatmaps.values()])
    number = {block: i for i, block in enumerate(blocks)}
    parts = []
    for kind, group in groupby(sections, key=lambda section: section.kind):
        those = list(group)
        if len(those) > 1 and those[0].missing and len({section.missing for section in those}) == 1:
            those = [replace(those[0], stream="every")]
        inner = "".join(_section(section, number) for section in those)
        parts.append(f"<section class='kind'><h3>{escape(TITLES[kind])}</h3>{inner}</section>")
    return "".join(parts)


def _section(section: Section, number: Mapping[str, int]) -> str:
    head = f"<h4>{escape(section.stream)} stream</h4>"
    if section.missing:
        return f"<div class='stream quiet'>{head}<p>{escape(_capital(section.missing))}.</p></div>"
    items = [f"<li>{_finding(finding, number)}</li>" for finding in section.findings]
    body = f"<ul>{''.join(items[:SHOWN])}</ul>" if items else "<p>None found.</p>"
    if len(items) > SHOWN:
        rest = "".join(items[SHOWN:])
        body += f"<details><summary>{len(items) - SHOWN:,} more</summary><ul>{rest}</ul></details>"
    notes = "".join(f"<p class='note'>{escape(_capital(note))}.</p>" for note in section.notes)
    return f"<div class='stream{' quiet' * (not items)}'>{head}{body}{notes}</div>"


def _finding(finding: Finding, number: Mapping[str, int]) -> str:
    numbers = [number[block] for block in finding.blocks]
    name = f"Block {numbers[0]}" if len(numbers) == 1 else f"Blocks {numbers[0]} to {numbers[-1]}"
    path = finding.blocks[0] + (f" to {finding.blocks[-1]}" if len(numbers) > 1 else "")
    target = (
        f"href='#map-{escape(finding.stream)}' data-map='{escape(finding.stream)}' data-first='{numbers[0]}' "
        f"data-last='{numbers[-1]}' data-low='{finding.low_sigma:.6g}' data-high='{finding.high_sigma:.6g}'"
    )
    detail = f"{chance(finding.p)}, {finding.samples:,} samples"
    return f"<a {target} title='{escape(path)}'>{name}</a> {escape(words(finding))}<span class='detail'>{detail}</span>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith(("not ", "no ", "all ")) else text


def _coverage(observation: Observation) -> str:
    largest = max(1, int(observation.count_T.max()))
    edges = bin_edges(len(observation.count_T)).tolist()
    rows = []
    for t, count in enumerate(observation.count_T.tolist()):
        label = f"{edges[t]:.3g} to {edges[t + 1]:.3g}"
        bar = f"<span class='bar' style='width:{100 * count / largest:.2f}%'></span>"
        rows.append(
            f"<tr{' class=empty' if not count else ''}><th scope='row'>{label}</th><td class='barcell'>{bar}</td>"
            f"<td class='n'>{count:,}</td></tr>"
        )
    head = (
        "<thead><tr><th scope='col'>sigma</th><th scope='col'></th><th scope='col' class='n'>samples</th></tr></thead>"
    )
    region = "<div class='scroll tall' tabindex='0' role='region' aria-label='Samples by sigma'>"
    return f"{region}<table class='coverage'>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _lokr(weights: _Weights) -> str:
    contribution = weights.contribution
    rows = []
    for i, block in enumerate(contribution.blocks):
        notes = []
        if i in weights.critical:
            where = [name for name, numbers in contribution.critical.items() if i in numbers]
            notes.append(f"critical ({', '.join(where)})")
        if not contribution.covered_L[i]:
            notes.append("contribution of the nearest block")
        parameters = f"{weights.parameters[i]:,}" if weights.parameters else "unknown"
        rows.append(
            f"<tr><td class='n'>{i}</td><th scope='row'>{escape(block)}</th>"
            f"<td class='n'>{contribution.value_L[i]:.3f}</td>"
            f"<td class='n'>{weights.low_L[i]:.3f} to {weights.high_L[i]:.3f}</td>"
            f"<td class='n'>{weights.factors[i]}</td><td class='n'>{100 * weights.agreement_L[i]:.0f}%</td>"
            f"<td class='n'>{parameters}</td><td>{escape(', '.join(notes))}</td></tr>"
        )
    total = (
        f"<p><strong>{sum(weights.parameters):,}</strong> trainable parameters in all.</p>"
        if weights.parameters
        else ""
    )
    note = f"<p class='note'>{escape(weights.note)}</p>" if weights.note else ""
    heads = (
        ("#", "n"),
        ("block", ""),
        ("contribution", "n"),
        ("95% interval", "n"),
        ("factor", "n"),
        ("agreement", "n"),
        ("parameters", "n"),
        ("", ""),
    )
    head = "".join(f"<th scope='col'{f' class={kind}' if kind else ''}>{name}</th>" for name, kind in heads)
    return (
        f"{total}{note}<div class='scroll tall' tabindex='0' role='region' aria-label='LoKr table'>"
        f"<table class='lokr'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _command(run: Run, tokens: str, bins: int, weighting: Mapping[str, float]) -> str:
    """The commands that make and use the config: without the probe run's own options there is no environment to make,
    without a module table no proof."""
    options = [f"--tokens {tokens}"] if tokens != "last" else []
    options += [f"--bins {bins}"] if bins != 10 else []
    options += [f"--{name.replace('_', '-')} {value!r}" for name, value in weighting.items()]
    options += [] if run.manifest.modules else ["--unverified"]
    follow_up = (run.path / OPTIONS_NAME).exists()
    options.append("--env weighted" if follow_up else "--out lycoris_config.json")
    line = f"layerprobe lokr {shlex.quote(str(run.path))} {' '.join(options)}"
    return f"{line}\nsimpletuner train env=weighted" if follow_up else line


def _command_part(command: str) -> str:
    return (
        f"<h3>Make the config</h3><pre id='command'>{escape(command)}</pre>"
        "<button type='button' id='copy' hidden>Copy</button>"
    )
