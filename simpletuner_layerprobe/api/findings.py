"""Findings: how what a run shows (`Run.findings`) is put into words and JSON."""

from __future__ import annotations

from simpletuner_layerprobe.analyse.sections import TITLES, as_json, numbered, words

__all__ = ["TITLES", "as_json", "numbered", "words"]
