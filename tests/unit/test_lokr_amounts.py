from __future__ import annotations

import pytest
from failing import fails

from simpletuner_layerprobe.lokr.amounts import MAX_AMOUNT, amount, preset_parameters


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("400M", 400_000_000),
        (" 1.2B ", 1_200_000_000),
        ("1_000", 1000),
        ("12.7", 12),
        ("800MB", 400_000_000),
        ("1.5 GB", 750_000_000),
        ("1KiB", 512),
        (str(MAX_AMOUNT), MAX_AMOUNT),
        (str(MAX_AMOUNT + 1), 0),
        ("9" * 40, 0),
        ("", 0),
        ("-4M", 0),
        ("4e8", 0),
        ("400 MX", 0),
        ("٤M", 0),
    ],
)
def test_amounts(text, count):
    assert amount(text) == count


def test_presets():
    assert preset_parameters("article") is None and preset_parameters(" Article ") is None
    assert preset_parameters("800MB") == preset_parameters(400_000_000) == 400_000_000


@pytest.mark.parametrize("preset", ["articles", "0", 0, True, MAX_AMOUNT + 1])
def test_what_is_no_preset(preset):
    with fails(f"the preset is {preset!r}; expected article, a number of parameters"):
        preset_parameters(preset)
