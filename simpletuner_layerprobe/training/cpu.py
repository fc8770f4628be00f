"""Lets SimpleTuner run on a machine without an accelerator."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

logger = logging.getLogger("SimpleTuner")

_original: Any = None


def install_pin_memory_fallback() -> None:
    """Without any accelerator, make `Tensor.pin_memory` give the tensor itself.

    SimpleTuner's collate function pins every latent, which torch refuses there: no run would reach its first
    step. Nothing changes on a machine with an accelerator.
    """
    global _original
    if _original is not None or torch.accelerator.is_available():
        return
    _original = torch.Tensor.pin_memory

    def pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    torch.Tensor.pin_memory = pin_memory
    if os.environ.get("RANK", "0") == "0":
        logger.info("layerprobe: no accelerator found; tensors stay unpinned so that SimpleTuner runs on the CPU")


def uninstall_pin_memory_fallback() -> None:
    global _original
    if _original is not None:
        torch.Tensor.pin_memory = _original
        _original = None
