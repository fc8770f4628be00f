from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import manifest, rows, write_run

from simpletuner_layerprobe.analyse.summary import summary
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run

BLOCKS = {"image": ("blocks.0", "blocks.1")}


def test_it_counts_ranks_bins_backends_and_samples_that_are_not_finite(tmp_path: Path) -> None:
    what = manifest(BLOCKS)
    create_run(tmp_path, what)
    good = np.ones((3, 2), dtype=np.float32)
    bad = np.array([[0.1, math.nan], [math.inf, math.inf], [0.1, 0.2]], dtype=np.float32)
    ShardWriter(tmp_path, what, rank=1).write(
        rows([0.0, 0.5, 1.0], {("image", "last"): good, ("image", "mean"): bad}, backends=("a", "photos"))
    )
    ShardWriter(tmp_path, what, rank=0).write(
        rows([0.1, 0.2, 0.3], {("image", "last"): good, ("image", "mean"): good}, backends=("b",))
    )
    ShardWriter(tmp_path, what, rank=0).write(rows([0.1, 0.2, 0.3], {("image", "last"): good, ("image", "mean"): good}))
    found = summary(open_run(tmp_path), bins=2)
    assert found.samples == {0: 6, 1: 3}
    assert found.count_T.tolist() == [7, 2]
    assert found.nonfinite == {("image", "mean"): 2}
    assert found.backends == {"": 3, "b": 3, "photos": 3}


def test_a_run_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="has no samples"):
        summary(create_run(tmp_path, manifest(BLOCKS)))


def test_the_counts_add_up(tmp_path: Path) -> None:
    found = summary(write_run(tmp_path / "run", BLOCKS, 100))
    assert sum(found.samples.values()) == found.count_T.sum() == sum(found.backends.values()) == 100
    assert not found.nonfinite
