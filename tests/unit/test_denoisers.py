"""SimpleTuner's classes where they cannot be had: one line that says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from failing import fails

from simpletuner_layerprobe.probe.families import FAMILIES
from simpletuner_layerprobe.published import NAMED
from simpletuner_layerprobe.training.denoisers import denoiser_class

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.mark.parametrize("missing", ["simpletuner", "simpletuner.helpers"])
def test_without_simpletuner(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with fails("SimpleTuner's class SD3Transformer2DModel cannot be imported ("):
        denoiser_class("sd3.transformer:SD3Transformer2DModel")


def test_every_family_has_a_class_and_every_name_a_family():
    assert all(family.source.count(":") == 1 for family in FAMILIES)
    classes = {(family.name, family.source.partition(":")[2]) for family in FAMILIES}
    for name, published in NAMED.items():
        assert any(published.family == family for family, _ in classes), name
        assert not published.class_name or (published.family, published.class_name) in classes


def test_the_page_of_models_has_every_name():
    import models_page

    page = models_page.PAGE.read_text(encoding="utf-8")
    assert models_page.table() in page, "the table is stale: run python tools/models_page.py"
    also = page.split(models_page.END)[1]
    assert set(also.split("`")[1::2]) <= set(NAMED)
