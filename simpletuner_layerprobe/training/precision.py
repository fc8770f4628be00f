"""The layers of a quantised base: replaced by SimpleTuner's own function, on the meta device.

A LyCORIS config goes by class names, and base_model_precision changes those of many layers (Linear to QLinear).
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

AS_IT_IS = "no_change"


def quantised(model: nn.Module, family: str, precision: str) -> nn.Module:
    """The model with the layers that SimpleTuner's base_model_precision gives it in a training of an adapter.

    Raises ConfigError for a precision that SimpleTuner does not have, that it applies while it loads the weights, or
    that its function refuses on this machine.
    """
    known = _levels()
    if precision not in known:
        raise ConfigError(f"SimpleTuner has no base_model_precision {precision!r}; it has: {', '.join(known)}")
    if precision == AS_IT_IS:
        return model
    try:
        return _replaced(model, family, precision)
    except (ImportError, RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"SimpleTuner cannot replace the layers for {precision} here: {said}") from error


def _levels() -> list[str]:
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from simpletuner.helpers.training import quantised_precision_levels
    return list(quantised_precision_levels)


def _replaced(model: nn.Module, family: str, precision: str) -> nn.Module:
    import torch

    with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # TorchAO's workarounds print
        warnings.simplefilter("ignore")
        from simpletuner.helpers.training.quantisation import get_quant_fn, quantise_model
        from simpletuner.helpers.training.state_tracker import StateTracker

        if get_quant_fn(precision) is None:
            raise NotImplementedError("it does so while it loads the weights")
        options = _options(family, precision)
        before = StateTracker.get_args()
        StateTracker.set_args(options)
        try:
            with torch.compiler.set_stance("force_eager"):  # SDNQ compiles its functions, which needs real tensors
                made: Any = quantise_model(model=model, args=options, return_dict=True)
        finally:
            StateTracker.set_args(before)
    replaced: nn.Module = made["model"]
    return replaced


def _options(family: str, precision: str) -> SimpleNamespace:
    """SimpleTuner's options as its function asks for them: an adapter, weights alone, no move to another device."""
    encoders = {f"text_encoder_{number}_precision": AS_IT_IS for number in range(1, 5)}
    return SimpleNamespace(
        model_family=family,
        model_type="lora",
        base_model_precision=precision,
        quantize_activations=False,
        quantize_via="meta",
        gradient_checkpointing=False,
        **encoders,
    )
