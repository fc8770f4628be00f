"""Rows recorded since the last flush, kept on the device; one transfer to the host per flush."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from simpletuner_layerprobe.run.records import Rows


@dataclass(frozen=True)
class Facts:
    """What the host knows of each sample of a batch, without asking the device. All of length B.

    width, height: pixels of the training image, 0 if unknown. caption_dropped: 1 if the model got the empty
    caption, else 0; -1 if unknown. backend: the data backend's id, "" if unknown.
    """

    width: Sequence[int]
    height: Sequence[int]
    caption_dropped: Sequence[int]
    backend: Sequence[str]


class RowBuffer:
    """Collects the rows of the steps since the last flush.

    lengths: number of blocks of each (stream, reading), which fixes the columns.
    """

    def __init__(self, lengths: Mapping[tuple[str, str], int]) -> None:
        self.lengths = dict(lengths)
        self._packed: list[torch.Tensor] = []
        self._facts: list[Facts] = []
        self.count = 0

    def append(
        self,
        distances: Mapping[tuple[str, str], torch.Tensor],
        sigma_B: torch.Tensor,
        text_tokens_B: torch.Tensor,
        loss: torch.Tensor,
        facts: Facts,
        keep: int,
    ) -> None:
        """Add the first `keep` samples of a batch.

        distances: (stream, reading) -> (B, L). sigma_B in [0, 1]. text_tokens_B: number of valid text tokens.
        loss: scalar, SimpleTuner's loss of the batch. Nothing leaves the device.
        """
        device = sigma_B.device
        columns = [
            sigma_B.float().unsqueeze(1),
            text_tokens_B.to(device).float().unsqueeze(1),
            loss.detach().to(device).float().expand(len(sigma_B)).unsqueeze(1),
            *(distances[key].to(device) for key in self.lengths),
        ]
        self._packed.append(torch.cat(columns, dim=1)[:keep])
        self._facts.append(
            Facts(facts.width[:keep], facts.height[:keep], facts.caption_dropped[:keep], facts.backend[:keep])
        )
        self.count += keep

    def take(self) -> Rows | None:
        """The collected rows, moved to the host in one transfer; None if there are none. The buffer is empty after."""
        if not self.count:
            return None
        table_NK = torch.cat(self._packed).cpu().numpy()
        backends = tuple(dict.fromkeys(name for facts in self._facts for name in facts.backend if name))
        number = {name: index for index, name in enumerate(backends)} | {"": -1}
        distances, start = {}, 3
        for key, length in self.lengths.items():
            distances[key] = np.ascontiguousarray(table_NK[:, start : start + length])
            start += length
        rows = Rows(
            sigma_N=table_NK[:, 0].astype(np.float64),
            loss_N=table_NK[:, 2].copy(),
            width_N=_column([facts.width for facts in self._facts], np.int32),
            height_N=_column([facts.height for facts in self._facts], np.int32),
            text_tokens_N=table_NK[:, 1].astype(np.int32),
            caption_dropped_N=_column([facts.caption_dropped for facts in self._facts], np.int8),
            backend_N=_column([[number[name] for name in facts.backend] for facts in self._facts], np.int16),
            backends=backends,
            distances=distances,
        )
        self._packed.clear()
        self._facts.clear()
        self.count = 0
        return rows


def _column(parts: list[Sequence[int]], dtype: type[np.generic]) -> np.ndarray:
    return np.array([value for part in parts for value in part], dtype=dtype)
