"""Changes to SimpleTuner that a test makes inside the forked training process before it starts."""

from __future__ import annotations

import sys
from typing import Any


def another_trainer() -> None:
    """A SimpleTuner whose Trainer lacks one of the methods that the probe wraps."""
    from simpletuner.helpers.training import trainer
    from simpletuner_layerprobe.record import trainer as probe

    probe.uninstall(trainer)
    del trainer.Trainer._any_rank_reached_epoch_end
    probe.install(trainer)
    assert sys.excepthook is not sys.__excepthook__


def skipped_block() -> None:
    """A forward that leaves out block 3, as SD3's own `skip_layers` does."""
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    forward = SD3Transformer2DModel.forward

    def skipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "skip_layers": [3]})

    SD3Transformer2DModel.forward = skipping
