"""The loss of each sample, beside float64. What each family compares is tested with the families."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simpletuner_layerprobe.training.losses import Prediction, predictions, relative_changes, sample_losses

FLOW = SimpleNamespace(get_prediction_target=lambda batch: batch["target"])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_loss_and_the_change_of_each_sample():
    value, target, other = drawn(3, 2, 5, 4).bfloat16(), drawn(3, 2, 5, 4).add(1), drawn(3, 2, 5, 4).add(0.1).bfloat16()
    made = predictions("prediction", FLOW, {"target": target}, {"model_prediction": value})
    v, t, o = (part.double().numpy() for part in (value, target, other))
    np.testing.assert_allclose(sample_losses(made).numpy(), ((v - t) ** 2).mean(axis=(1, 2, 3)), rtol=1e-6)
    changed = predictions("prediction", FLOW, {"target": target}, {"model_prediction": other})
    expected = np.sqrt(((o - v) ** 2).sum(axis=(1, 2, 3)) / (v**2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(relative_changes(made, changed).numpy(), expected, rtol=1e-6)
    assert sample_losses(made).dtype == torch.float32


def test_what_does_not_count_is_left_out():
    value, target = drawn(2, 3, 6), drawn(2, 3, 6) + 1
    valid = torch.tensor([[1, 1, 1, 0, 0, 0], [0] * 6])[:, None]
    part = Prediction(value, target, valid)
    squares = (value - target).double().square()
    assert part.loss()[0].item() == pytest.approx(squares[0, :, :3].mean().item(), rel=1e-6)
    assert part.loss()[1] == 0
    change = relative_changes([part], [Prediction(value * 2, target, valid)])
    assert change[0] == 1 and change[1].isnan()


def test_predictions_of_several_kinds_add_up():
    parts = [Prediction(drawn(2, 3), drawn(2, 3) * 0), Prediction(drawn(2, 4, 4), drawn(2, 4, 4) * 0)]
    expected = sum(part.value.double().square().flatten(1).mean(1) for part in parts)
    torch.testing.assert_close(sample_losses(parts).double(), expected)


@pytest.mark.parametrize(
    "output", [torch.zeros(2), {}, {"model_prediction": None}, {"model_prediction": torch.zeros(2, 3)}]
)
def test_what_cannot_be_compared_is_nothing(output):
    assert predictions("prediction", FLOW, {"target": torch.zeros(2, 4)}, output) == []
