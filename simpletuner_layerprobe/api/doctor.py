"""Doctor: whether the probe is active, and fits the SimpleTuner that is here."""

from __future__ import annotations

from simpletuner_layerprobe.training.doctor import Check, checks

__all__ = ["Check", "checks"]
