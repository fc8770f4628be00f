from __future__ import annotations

import math

import numpy as np
import torch

from simpletuner_layerprobe.probe.rows import RowBuffer

COLUMNS = {("image", "last"): 3, ("text", "last"): 2}
IMAGE, TEXT = ("image", "last"), ("text", "last")
LOSS = torch.tensor([0.5, 0.25, 0.125])


def facts(backend: str) -> dict[str, list]:
    return {"image": [2**64 - 1, 7, 0], "width": (640, 320, 160), "dropped": [0, 1, -1], "backend": [backend] * 3}


def distances() -> dict[tuple[str, str], torch.Tensor]:
    return {TEXT: torch.rand(3, 2), IMAGE: torch.rand(3, 3)}


def test_rows_come_back_as_they_went_in():
    buffer = RowBuffer(COLUMNS)
    sigma = torch.tensor([-0.25, 1.5, math.nextafter(1, 0)], dtype=torch.float64)
    tokens, values = torch.tensor([3, 5, 9]), distances()
    buffer.append(values, sigma, LOSS, tokens, facts("a"), keep=3)
    buffer.append(values, sigma, LOSS + 1, tokens, facts("b"), keep=1)
    buffer.append(values, sigma, LOSS + 2, tokens, facts(""), keep=0)
    assert buffer.count == 4
    rows = buffer.take()
    assert buffer.take() is None and buffer.count == 0
    for key, value in values.items():
        assert np.array_equal(rows["distances"][key], torch.cat([value, value[:1]]).numpy())
        assert rows["distances"][key].dtype == np.float32 and rows["distances"][key].flags.c_contiguous
    assert list(rows["distances"]) == list(COLUMNS)
    assert rows["sigma"].tolist() == [-0.25, 1.5, 1.0, -0.25]  # each a float32
    assert rows["sigma"].dtype == np.float64
    assert rows["loss"].tolist() == [0.5, 0.25, 0.125, 1.5] and rows["loss"].dtype == np.float32
    assert rows["facts"].pop("text_tokens").tolist() == [3, 5, 9, 3]
    assert rows["facts"] == {
        "image": [2**64 - 1, 7, 0, 2**64 - 1],
        "width": [640, 320, 160, 640],
        "dropped": [0, 1, -1, 0],
        "backend": ["a", "a", "a", "b"],
    }
    buffer.append(values, sigma, LOSS, tokens, facts("c"), keep=2)
    assert buffer.take()["facts"]["backend"] == ["c", "c"]
    buffer.append({IMAGE: values[IMAGE]}, sigma, LOSS, tokens, facts("d"), keep=2)  # a reading that was not taken
    rows = buffer.take()
    assert np.isnan(rows["distances"][TEXT]).all() and not np.isnan(rows["distances"][IMAGE]).any()


def test_one_transfer_a_flush(monkeypatch):
    """And none before: on a device every one makes the host wait."""
    moved = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.shape) or to_cpu(tensor))
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    buffer = RowBuffer(COLUMNS)
    for _ in range(3):
        buffer.append(distances(), torch.rand(3), LOSS, torch.ones(3), facts("a"), 3)
    assert not moved
    buffer.take()
    assert moved == [(9, 8)]
