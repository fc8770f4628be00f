"""A loss as the size of an equal plan that has the same, between equal plans of several sizes.

Intervals, Holm's correction and verdicts are the product's: simpletuner_layerprobe.analyse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exchange_rate(loss: float, sizes: Sequence[float], losses: Sequence[float]) -> float | None:
    """The size, 1 for the equal plan's, at which equal plans have this loss: linear between them in log size.

    None outside what was measured, or where the losses do not fall with the size.
    """
    order = np.argsort(sizes)
    size = np.log(np.asarray(sizes, dtype=np.float64)[order])
    falling = np.asarray(losses, dtype=np.float64)[order]
    if np.any(np.diff(falling) >= 0) or not falling[-1] <= loss <= falling[0]:
        return None
    return float(np.exp(np.interp(-loss, -falling, size)))
