"""The arms of a trial, built by LyCORIS."""

from __future__ import annotations

import numpy as np
from lokr_models import sd3_blocks
from synthetic_run import sd3_modules, write_ablated_run

from simpletuner_layerprobe.api import load
from simpletuner_layerprobe.trial.arms import arm_names, make_arms


def test_arms_have_one_size(tmp_path):
    """As LyCORIS counts them, on a model whose last block has no text part."""
    blocks = {"image": sd3_blocks(6), "text": sd3_blocks(5)}
    write_ablated_run(tmp_path / "run", blocks, 300, np.linspace(0.1, 0.9, 6), modules=sd3_modules(6, 96))
    run = load(tmp_path / "run")
    names = arm_names("plan,inverse,ablation,article,shuffle:3")
    made = make_arms(run, names, 60_000, contrast=4.0)
    assert [arm.name for arm in made] == list(names)
    for arm in made:
        wanted = 66_000 if arm.name == "uniform-110" else 60_000
        assert abs(arm.plan.parameters / wanted - 1) <= 0.001
        assert arm.plan.check is not None and arm.plan.check.parameters == arm.plan.parameters
    numbers = {arm.name: arm.plan.numbers for arm in made}
    assert len(set(numbers.values())) == len(made)
