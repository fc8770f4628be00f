"""Flux in SimpleTuner's own loop: double blocks, then single blocks over the joint sequence."""

from __future__ import annotations

import numpy as np
from test_real_sd3 import assert_equal_to_further_reference, assert_equal_to_reference

from simpletuner_layerprobe.run.records import open_run


def test_every_distance_equals_the_articles_formula(simpletuner, tiny, tiny_flux):
    folder = tiny(tiny_flux, train_batch_size=2, max_train_steps=5, layerprobe_residual=True, layerprobe_block_pairs=3)
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_flux")
    assert result.code == 0, result.log[-4000:]

    run = open_run(folder / "output" / "tiny-probe" / "layerprobe")
    assert run.manifest.stream("text").blocks[2:5] == (
        "transformer_blocks.2",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    )
    assert_equal_to_reference(folder, run, {"image": 7, "text": 7})
    assert_equal_to_further_reference(folder, run)  # pairs over the change from double to single blocks too
    tokens = np.concatenate([rows.text_tokens_N for rows in run.rows()])
    assert 0 < tokens.min() < tokens.max() < 512  # the mask decides, not the padded length
