from __future__ import annotations

import numpy as np
import torch

from simpletuner_layerprobe.probe.rows import Facts, RowBuffer

LENGTHS = {("image", "last"): 3, ("text", "last"): 2}


def facts(count: int, backend: str) -> Facts:
    return Facts([640] * count, [480] * count, [0, 1, -1][:count], [backend] * count)


def test_rows_come_back_as_they_went_in():
    buffer = RowBuffer(LENGTHS)
    image, text = torch.rand(3, 3), torch.rand(3, 2)
    sigma, tokens = torch.rand(3), torch.tensor([3, 5, 9])
    values = {("image", "last"): image, ("text", "last"): text}
    buffer.append(values, sigma, tokens, torch.tensor(0.5), facts(3, "a"), keep=3)
    buffer.append(values, sigma, tokens, torch.tensor(1.5), facts(3, "b"), keep=1)
    buffer.append(values, sigma, tokens, torch.tensor(2.5), facts(3, ""), keep=1)
    assert buffer.count == 5
    rows = buffer.take()
    assert rows is not None and buffer.take() is None
    assert np.array_equal(rows.distances["image", "last"], torch.cat([image, image[:1], image[:1]]).numpy())
    assert np.array_equal(rows.distances["text", "last"], torch.cat([text, text[:1], text[:1]]).numpy())
    assert np.array_equal(rows.sigma_N, torch.cat([sigma, sigma[:1], sigma[:1]]).double().numpy())
    assert rows.text_tokens_N.tolist() == [3, 5, 9, 3, 3]
    assert rows.loss_N.tolist() == [0.5, 0.5, 0.5, 1.5, 2.5]
    assert rows.caption_dropped_N.tolist() == [0, 1, -1, 0, 0]
    assert rows.backends == ("a", "b")
    assert rows.backend_N.tolist() == [0, 0, 0, 1, -1]
    assert (rows.width_N == 640).all() and (rows.height_N == 480).all()


def test_nothing_kept_is_nothing_taken():
    buffer = RowBuffer(LENGTHS)
    values = {("image", "last"): torch.rand(1, 3), ("text", "last"): torch.rand(1, 2)}
    buffer.append(values, torch.rand(1), torch.tensor([1]), torch.tensor(0.0), facts(1, "a"), keep=0)
    assert buffer.take() is None
