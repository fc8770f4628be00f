"""Configs and sizes that were published: what --model says of them."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.models import Architecture, architecture

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

LOKR = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "factor": 8}


@pytest.fixture(scope="module")
def models() -> dict[str, Architecture]:
    return {name: architecture(name, alone=True) for name in ("wan21-1.3b", "hidream", "pixart-sigma", "sdxl")}


def by_class(*classes: str, **settings: dict[str, Any]) -> dict[str, Any]:
    return LOKR | {"apply_preset": {"target_module": list(classes), "module_algo_map": settings}}


HIDREAM = by_class("Attention", "FeedForward", Attention={"factor": 64}, FeedForward={"factor": 32})
HIDREAM |= {"full_matrix": True}


@pytest.mark.parametrize(
    ("name", "config", "modules", "parameters"),
    [
        ("wan21-1.3b", by_class("Attention"), 240, 8_862_720),
        ("hidream", by_class("Attention"), 256, 26_230_784),
        (
            "wan21-1.3b",
            by_class("Attention", "FeedForward", Attention={"factor": 16}, FeedForward={"factor": 8}),
            300,
            15_179_520,
        ),
        # A user's public log says 14.32M.
        ("hidream", HIDREAM, 1024, 14_317_568),
        ("hidream", HIDREAM | {"use_scalar": True}, 1024, 14_318_592),
        # Names that diffusers' classes have, and SimpleTuner's do not.
        ("wan21-1.3b", by_class("WanAttention"), 0, 0),
        ("pixart-sigma", by_class("BasicTransformerBlock"), 0, 0),
        ("sdxl", by_class("UNet2DConditionModel"), 0, 0),
    ],
)
def test_a_config_reaches_what_it_reaches_in_the_training(models, name, config, modules, parameters):
    check = check_config(config, models[name])
    assert (len(check.rows), check.parameters, check.wrong) == (modules, parameters, ())
    assert bool(check.unmatched) == (not modules)
