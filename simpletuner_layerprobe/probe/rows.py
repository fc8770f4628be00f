"""Rows recorded since the last flush, kept on the device; one transfer to the host per flush.

Shapes: B batch, N samples, C columns of a reading (L blocks, fewer for pairs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class RowBuffer:
    """Collects the rows of the steps since the last flush.

    columns: number of columns C of each (stream, reading). count: rows that are in it.
    """

    def __init__(self, columns: Mapping[tuple[str, str], int]) -> None:
        self.columns = dict(columns)
        self.count = 0
        self._packed: list[torch.Tensor] = []
        self._facts: dict[str, list[Any]] = {}

    def append(
        self,
        distances: Mapping[tuple[str, str], torch.Tensor],
        sigma_B: torch.Tensor,
        loss_B: torch.Tensor,
        tokens_B: torch.Tensor,
        facts: Mapping[str, Sequence[Any]],
        keep: int,
    ) -> None:
        """Add the first `keep` samples of a batch. Nothing leaves the device.

        distances: (stream, reading) -> (B, C); a reading that is not there is NaN. sigma_B: as the batch has it.
        loss_B: of each sample. tokens_B: number of valid text tokens. facts: what the host knows of each sample,
        name -> B values; the same names in every step.
        """
        if keep <= 0:
            return
        device = sigma_B.device
        columns = [
            sigma_B.float().unsqueeze(1),
            loss_B.to(device).float().unsqueeze(1),
            tokens_B.to(device).float().unsqueeze(1),
            *(
                distances[key].to(device)
                if key in distances
                else torch.full((len(sigma_B), width), math.nan).to(device)
                for key, width in self.columns.items()
            ),
        ]
        self._packed.append(torch.cat(columns, dim=1)[:keep])
        for name, values in facts.items():
            self._facts.setdefault(name, []).extend(values[:keep])
        self.count += keep

    def take(self) -> dict[str, Any] | None:
        """The collected rows, moved to the host in one transfer; None if there are none. The buffer is empty after.

        "sigma": (N,) float64, each a float32. "loss": (N,) float32. "facts": name -> list of N values, and
        "text_tokens" (N,) int32. "distances": (stream, reading) -> (N, C) float32.
        """
        if not self.count:
            return None
        table_NK = torch.cat(self._packed).cpu().numpy()
        distances, start = {}, 3
        for key, width in self.columns.items():
            distances[key] = np.ascontiguousarray(table_NK[:, start : start + width])
            start += width
        rows = {
            "sigma": table_NK[:, 0].astype(np.float64),
            "loss": table_NK[:, 1].copy(),
            "facts": self._facts | {"text_tokens": table_NK[:, 2].astype(np.int32)},
            "distances": distances,
        }
        self.count = 0
        self._packed, self._facts = [], {}
        return rows
