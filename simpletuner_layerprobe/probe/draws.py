"""The states of the random generators that a forward may draw from: kept, and set again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Draws:
    """The states at this moment, of torch's generators (that of the current CUDA device too), Python's and numpy's."""

    def __init__(self) -> None:
        self._torch = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            self._torch.append(torch.cuda.get_rng_state())
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()

    def restore(self) -> None:
        """Draw from here on what was drawn from that moment on."""
        torch.set_rng_state(self._torch[0])
        if len(self._torch) > 1:
            torch.cuda.set_rng_state(self._torch[1])
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def same(self, other: Draws) -> bool:
        """Whether nothing was drawn between the two moments."""
        return (
            self._python == other._python
            and all(np.array_equal(*pair) for pair in zip(self._numpy, other._numpy, strict=True))
            and all(torch.equal(*pair) for pair in zip(self._torch, other._torch, strict=True))
        )


@contextmanager
def restored() -> Iterator[None]:
    """What is drawn inside does not count for what is drawn afterwards."""
    draws = Draws()
    try:
        yield
    finally:
        draws.restore()
