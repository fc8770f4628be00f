"""Findings in words, as the command prints them and the report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from simpletuner_layerprobe.analyse.findings import TITLES
from simpletuner_layerprobe.analyse.sections import Finding, Section, sureness
from simpletuner_layerprobe.readings import WHOLE
from simpletuner_layerprobe.show.words import counted, listed


def by_kind(sections: Sequence[Section]) -> Iterator[tuple[str, list[Section]]]:
    """The sections of each kind; one for "every" stream where nothing can be said of any for the same reason."""
    for kind, group in groupby(sections, key=lambda section: section.kind):
        those = list(group)
        if len(those) > 1 and those[0].missing and len({section.missing for section in those}) == 1:
            those = [replace(those[0], stream="every")]
        yield kind, those


def empty(sections: Sequence[Section]) -> list[str]:
    """Sections that show nothing, by the reason: "critical blocks, aspect (text) (not enough samples: ...)"."""
    names: dict[str, list[str]] = {}
    for kind, group in groupby(sections, key=lambda section: section.kind):
        those = list(group)
        for missing in dict.fromkeys(section.missing for section in those if section.empty):
            streams = [section.stream for section in those if section.empty and section.missing == missing]
            of = f" in {listed(streams)}" if len(streams) < len(those) else ""
            names.setdefault(missing, []).append(TITLES[kind].lower() + of)
    return [f"{', '.join(kinds)}" + (f" ({missing})" if missing else "") for missing, kinds in names.items()]


def where(stream: str) -> str:
    """What a section is of, behind its title: ", image stream", "" of whole blocks."""
    if stream == WHOLE:
        return ""
    return f", {stream}" if stream.startswith("text ") else f", {stream} stream"


def detail(finding: Finding, samples: int) -> str:
    """How sure a finding is, and of how many samples if not of all of the run."""
    behind = "" if finding.samples == samples else f", {counted(finding.samples, 'sample')}"
    return sureness(finding) + behind
