from __future__ import annotations

import pytest
from failing import fails

from simpletuner_layerprobe.readings import Reading, ablation_readings, extra_readings, parse_reading


def test_names_and_what_they_mean():
    assert extra_readings(False, 0) == extra_readings(False, 1) == ()
    assert extra_readings(True, 3) == (
        "update_norm_last",
        "update_norm_mean",
        "update_cosine_last",
        "update_cosine_mean",
        "pair2_last",
        "pair2_mean",
        "pair3_last",
        "pair3_mean",
    )
    assert parse_reading("mean") == Reading("mean", "angle", "mean")
    assert parse_reading("update_norm_last") == Reading("update_norm_last", "update_norm", "last")
    assert parse_reading("pair12_mean") == Reading("pair12_mean", "angle", "mean", 12)
    assert {
        name: parse_reading(name).complete for name in ("last", "update_norm_mean", "update_cosine_mean", "pair2_last")
    } == {
        "last": True,
        "update_norm_mean": True,
        "update_cosine_mean": False,
        "pair2_last": False,
    }


@pytest.mark.parametrize(
    "name", ["", "Last", "pair1_last", "pair0_mean", "pair2", "update_norm", "pair2_last ", "pair99999_last"]
)
def test_other_names_are_refused(name):
    with fails("there is no reading"):
        parse_reading(name)


def test_columns_are_named_by_their_first_and_last_block():
    blocks = ("a", "b", "c")
    assert parse_reading("last").columns(blocks) == (("a", "a"), ("b", "b"), ("c", "c"))
    assert parse_reading("pair2_last").columns(blocks) == (("a", "b"), ("b", "c"))
    assert parse_reading("pair3_last").columns(blocks) == (("a", "c"),)
    assert parse_reading("pair4_last").columns(blocks) == ()


def test_what_leaving_blocks_out_is_called():
    assert ablation_readings(blocks=False, text=False) == ()
    assert ablation_readings(blocks=True, text=True) == (
        "ablation",
        "ablation_change",
        "ablation_text",
        "ablation_text_change",
    )
    assert parse_reading("ablation") == Reading("ablation", "ablation", "", stream="block")
    assert parse_reading("ablation_text_change") == Reading("ablation_text_change", "ablation_change", "", 1, "text")
    assert parse_reading("ablation").ablation and not parse_reading("mean").ablation
