"""Wan in SimpleTuner's own loop: clips of several frames, feed-forward in chunks, and what comes after the probe."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from command_line import in_a_process
from real import TESTS, SimpleTuner
from test_real_run import run_of, set_options
from test_real_sd3 import assert_equal_to_further_reference, assert_equal_to_reference

from simpletuner_layerprobe.api import load, plan


@pytest.fixture(scope="module")
def tiny_wan(simpletuner: SimpleTuner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    return simpletuner.pipeline(folder, TESTS / "tiny_wan.py", folder)


def test_clips_from_the_probe_to_the_trained_adapter(simpletuner, tiny, tiny_wan):
    folder = tiny(
        tiny_wan,
        max_train_steps=3,
        enable_chunked_feed_forward=True,
        feed_forward_chunk_size=1,
        layerprobe_residual=True,
        layerprobe_block_pairs=3,
    )
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_wan")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert_equal_to_reference(folder, run, {"image": 4})
    assert_equal_to_further_reference(folder, run)
    assert set(run.facts["backend"]) == {"clips"} and run.manifest.settings["text"] == "cross"

    written = folder / "config" / "tiny-probe" / "lycoris_config.json"
    written.unlink()
    made = plan(load(run.path), params=9_000)
    made.write(written)
    set_options(folder, layerprobe=False, max_train_steps=1, output_dir="output/trained")
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]

    # In a process of its own, which imports the class as it is first needed.
    file = "output/trained/pytorch_lora_weights.safetensors"
    shown = in_a_process("adapter", file, "--model", "pipeline-wan", "--json", cwd=folder, stdout=subprocess.PIPE)
    assert shown.returncode == 0, shown.stderr
    adapter = json.loads(shown.stdout)
    assert adapter["notes"] == []
    assert [part["name"] for part in adapter["blocks"]] == [f"blocks.{number}" for number in range(4)]
    assert sum(module["parameters"] for module in adapter["modules"]) == made.parameters
