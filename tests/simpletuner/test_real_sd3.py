"""SD3 in SimpleTuner's own loop: the recorded distances, and what a probe-only run leaves alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from simpletuner_layerprobe.run.load import RunData, load_run


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def distances(run: RunData) -> dict[str, np.ndarray]:
    """All that was recorded: "image.last" -> (N, L)."""
    return {f"{stream}.{reading}": run.distances(stream, reading) for stream, reading in run.manifest.columns()}


def assert_equal_to_reference(folder: Path, run: RunData, streams: dict[str, int]) -> None:
    reference = np.load(folder / "reference.npz")
    recorded = {name: values for name, values in distances(run).items() if name.endswith((".last", ".mean"))}
    expected = {f"{stream}.{reading}" for stream in streams for reading in ("last", "mean")}
    assert set(recorded) == set(reference.files) == expected
    for name, values in recorded.items():
        assert values.shape == (run.samples, streams[name.split(".")[0]])
        assert values.shape == reference[name].shape
        np.testing.assert_allclose(values, reference[name], rtol=0, atol=2e-6)
        assert values.min() > 0


def assert_equal_to_further_reference(folder: Path, run: RunData) -> None:
    further = np.load(folder / "further.npz")
    recorded = distances(run)
    assert {name for name in recorded if not name.endswith((".last", ".mean"))} == set(further.files)
    for name in further.files:
        assert recorded[name].shape == further[name].shape
        scale = np.maximum(1, np.abs(further[name]))  # a norm above 1 is as exact as its digits
        np.testing.assert_allclose(recorded[name] / scale, further[name] / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("batch_size", "further"), [(1, {}), (2, {"layerprobe_residual": True, "layerprobe_block_pairs": 3})]
)
def test_every_distance_equals_the_articles_formula(simpletuner, tiny, batch_size, further):
    folder = tiny(train_batch_size=batch_size, max_train_steps=6, gradient_checkpointing=True, **further)
    before = hashes(folder / "pipeline")
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_sd3")
    assert result.code == 0, result.log[-4000:]

    run = load_run(folder / "output" / "tiny-probe" / "layerprobe")
    assert run.samples == 6 * batch_size
    assert_equal_to_reference(folder, run, {"image": 6, "text": 5})
    assert ("layerprobe: further readings: update_norm_last," in result.log) == bool(further)
    if further:
        assert_equal_to_further_reference(folder, run)

    assert hashes(folder / "pipeline") == before
    left = {path.suffix for path in (folder / "output").rglob("*") if path.is_file()}
    assert left == {".json", ".arrows"}
    assert not list((folder / "output").rglob("checkpoint*"))
    assert f"layerprobe: {6 * batch_size} samples in" in result.line("layerprobe: ")
