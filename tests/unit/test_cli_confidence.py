"""What `lokr` and `status` say of how sure the factors are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import manifest, rows, write_run
from test_cli import TINY, Result, layerprobe  # noqa: F401

from simpletuner_layerprobe.analyse.bootstrap import article_decision, confidence, tally
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", TINY, 300, seed=1)
    return tmp_path / "run"


def test_lokr_prints_the_share_beside_each_factor(layerprobe: Callable[..., Result], run: Path) -> None:  # noqa: F811
    shown = layerprobe("lokr", run, "--critical", "none", "--max-factor", "40", "--unverified")
    assert (shown.code, shown.err) == (0, "")
    found = tally(open_run(run)).bootstrap()
    decide = article_decision(
        found.blocks, found.count_T, lambda value_N: article_factors(value_N, max_factor=40), critical=()
    )
    sure = confidence(found, decide)
    assert 0 < len(sure.unsettled()) < 6
    for number, line in enumerate(shown.out.splitlines()[1:7]):
        interval = f"{sure.low_L[number]:.4f} - {sure.high_L[number]:.4f}"
        assert f"  {interval}  {int(100 * sure.agreement_K[number] + 1e-9):>4}%" in line
        assert ("NOT settled" in line) == (number in sure.unsettled())
    assert f"NOT settled: {len(sure.unsettled())} of 6 factors, agreed by fewer than 95% of the" in shown.out
    again = layerprobe("lokr", run, "--critical", "none", "--max-factor", "40", "--unverified")
    assert again == shown
    blocks = json.loads(
        layerprobe("lokr", run, "--critical", "none", "--max-factor", "40", "--unverified", "--json").out
    )["blocks"]
    assert [block["settled"] for block in blocks] == [number not in sure.unsettled() for number in range(6)]
    assert [block["agreement"] for block in blocks] == sure.agreement_K.tolist()
    assert blocks[3]["interval"] == [sure.low_L[3], sure.high_L[3]]


def status(layerprobe: Callable[..., Result], path: Path) -> str:  # noqa: F811
    shown = layerprobe("status", path)
    assert (shown.code, shown.err) == (0, "")
    (line,) = (line for line in shown.out.splitlines() if line.startswith("settled "))
    return line.split(None, 1)[1]


def test_status_says_how_many_more_samples_settle_the_factors(
    layerprobe: Callable[..., Result],  # noqa: F811
    run: Path,
    tmp_path: Path,
) -> None:
    said = re.fullmatch(
        r"(\d) of 6 factors \(preset article, 95%\); about ([\d,]+) more samples would settle all",
        status(layerprobe, run),
    )
    assert said and int(said[1]) < 6
    assert len(said[2].replace(",", "").rstrip("0")) <= 2
    write_run(tmp_path / "long", TINY, 60_000, seed=1)
    assert status(layerprobe, tmp_path / "long") == "6 of 6 factors (preset article, 95%)"
    write_run(tmp_path / "short", TINY, 20)
    assert status(layerprobe, tmp_path / "short").startswith("0 of 6 factors")


def test_status_of_a_run_whose_blocks_are_all_alike_is_told(
    layerprobe: Callable[..., Result],  # noqa: F811
    tmp_path: Path,
) -> None:
    what = manifest({"image": ("a", "b")}, tokens=("mean",))
    create_run(tmp_path / "run", what)
    samples = rows([i / 400 for i in range(400)], {("image", "mean"): [[0.1, 0.1]] * 400})
    ShardWriter(tmp_path / "run", what, rank=0).write(samples)
    assert status(layerprobe, tmp_path / "run").startswith("2 of 2 factors")
