"""The config of a plan: its form, byte for byte, and what its patterns decide."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st
from lokr_models import SMALL_TARGETS, sd3_blocks, sd3_model, small_blocks, small_model
from synthetic_run import SD3_TARGETS

from simpletuner_layerprobe.files import json_bytes
from simpletuner_layerprobe.lokr.config import lycoris_config
from simpletuner_layerprobe.lokr.groups import RATIOS, Group, module_groups


def article(groups: tuple[Group, ...], factors: list[int]) -> list[int]:
    return [factors[group.number] * RATIOS[group.kind] for group in groups]


def decided(config: dict, name: str) -> dict:
    """The settings that LyCORIS finds for a module: its own name, else the first pattern."""
    names = config["apply_preset"]["name_algo_map"]
    return names.get(name) or next(found for pattern, found in names.items() if fnmatchcase(name, pattern))


def test_the_articles_file_of_one_block():
    groups = module_groups(sd3_model(2, 64), sd3_blocks(1))
    assert json_bytes(lycoris_config("lokr", groups, article(groups, [3]), SD3_TARGETS)).decode() == (
        """{
  "algo": "lokr",
  "multiplier": 1.0,
  "linear_dim": 1000000,
  "linear_alpha": 1,
  "full_matrix": true,
  "factor": 1,
  "apply_preset": {
    "use_fnmatch": true,
    "target_module": [],
    "name_algo_map": {
      "transformer_blocks.0.norm1*": {
        "factor": 3
      },
      "transformer_blocks.0.norm1_context*": {
        "factor": 3
      },
      "transformer_blocks.0.ff*": {
        "factor": 3
      },
      "transformer_blocks.0.*": {
        "factor": 6
      }
    }
  }
}
"""
    )


def test_modules_that_share_a_pattern_and_not_a_number_are_named():
    blocks = sd3_blocks(1)
    groups = module_groups(sd3_model(2, 64), blocks, streams={"image": blocks, "text": blocks})
    factors = [{"image": 1, "text": 4}[group.stream] if group.kind == "feed-forward" else 2 for group in groups]
    names = lycoris_config("lokr", groups, factors, SD3_TARGETS)["apply_preset"]["name_algo_map"]
    assert {name.removeprefix("transformer_blocks.0."): settings["factor"] for name, settings in names.items()} == {
        "norm1*": 2,
        "norm1_context*": 2,
        "ff.net.0.proj": 1,
        "ff.net.2": 1,
        "ff_context.net.0.proj": 4,
        "ff_context.net.2": 4,
        "*": 2,
    }


@given(st.data(), st.sampled_from(["lokr", "locon", "loha"]))
def test_every_module_is_decided_as_planned(data, algo):
    model = small_model(12)
    groups = module_groups(model, small_blocks(12))
    given_to = [data.draw(st.integers(1, 14)) for _ in groups]
    config = lycoris_config(algo, groups, given_to, SMALL_TARGETS)
    limits = (
        {"ff": 12, "attn": 12, "gate": 3, "mix": 8} if algo == "locon" else {"ff": 4, "attn": 4, "gate": 2, "mix": 3}
    )
    for group, number in zip(groups, given_to, strict=True):
        for module in group.modules:
            rank = min(number, limits[module.name.split(".")[2]])
            expected = {"factor": number} if algo == "lokr" else {"dim": rank, "alpha": rank}
            assert decided(config, module.name) == expected
    assert json_bytes(config) == json_bytes(lycoris_config(algo, groups, given_to, SMALL_TARGETS))
    if algo != "lokr":
        assert (config["linear_dim"], config["linear_alpha"]) == (max(given_to), max(given_to))
