"""docs/api.md: its code runs as it stands, in order, and gives what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY
from synthetic_run import sd3_modules, write_ablated_run, write_run

import simpletuner_layerprobe as layerprobe

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
TEXT = DOCS.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's code leaves behind."""
    folder = tmp_path_factory.mktemp("api")
    for name, seed in (("sd35", 1), ("sd35-trained", 2)):
        path = folder / "output" / name / "layerprobe"
        write_run(path, TINY, 400, modules=sd3_modules(6), images=40, seed=seed)
    write_ablated_run(
        folder / "output" / "sd35-ablated" / "layerprobe", TINY, 600, [0.1, 0.02, 0.02, 0.03, 0.02, 0.001]
    )
    left: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"{DOCS.name}, block {number}", "exec"), left)
    finally:
        os.chdir(before)
    left["folder"] = folder
    return left


# torchao, which diffusers imports, has a string with a stray backslash.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")
def test_the_page_runs_and_its_shapes_are_right(names: dict[str, Any]) -> None:
    run = names["run"]
    assert (run.samples, run.images) == (400, 40)
    assert run.sigma.shape == (400,) and run.sigma.dtype == np.float64
    assert run.distances("image").shape == (400, 6) and run.distances("image").dtype == np.float32
    assert all(fact_N.shape == (400,) for fact_N in run.facts.values())
    assert len(run.to_pandas()) == 400
    assert names["heatmap"].values_TL.shape == names["heatmap"].standard_errors_TL.shape == (10, 6)
    assert names["heatmap"].counts_T.sum() == 400
    contributions = names["contributions"]
    for part in ("values", "low", "high", "settled"):
        assert getattr(contributions, part).shape == (6,)
    assert (contributions.low <= contributions.values).all() and (contributions.values <= contributions.high).all()
    assert names["sure"].settled_K.shape == (18,)
    assert names["plan"].check is not None and 59_940 <= names["plan"].parameters <= 60_000
    assert not names["check"].wrong and names["check"].parameters == names["plan"].parameters
    assert (names["folder"] / "lycoris_config.json").is_file()
    comparison = names["comparison"]
    assert comparison.streams["image"].levels.difference.shape == (6,)
    assert comparison.streams["image"].cells.significant.shape == (10, 6)
    assert len(comparison.factors.verdict_K) == 6
    ablation = names["ablation"]
    assert (ablation.needed, ablation.hardly) == ((0,), (5,)) and ablation.loss_TL.shape == (10, 6)
    assert all(part_L.shape == (6,) for part_L in vars(ablation.loss).values())
    assert set(ablation.told) == {"image", "text"} and ablation.text.loss.value_L.shape == (5,)
    assert names["alike"].correlation <= 1
    seen = names["seen"]
    assert {stream: len(blocks) for stream, blocks in seen.streams.items()} == {"image": 3, "text": 2}
    assert tuple(seen.distances("image", "mean").shape) == (2, 3)
    assert isinstance(names["layerprobe"].ProbeError(), Exception)


def test_the_page_names_every_fact_and_everything_public(names: dict[str, Any]) -> None:
    facts = re.search(r"run\.facts +# (.*?): a dict of", TEXT, re.S)
    assert facts
    assert set(re.findall(r"\w+", facts[1].replace("#", ""))) == set(names["run"].facts)
    assert [name for name in layerprobe.__all__ if not re.search(rf"\b{name}\b", TEXT)] == []


def test_what_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        layerprobe.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        layerprobe.api.nothing  # noqa: B018
