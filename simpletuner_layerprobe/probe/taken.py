"""What the blocks of one forward did to every token, kept until the forward is over, and then read at once.

Two readings of each stream after a block are four to seven small operations, more where a mask is made, and each costs
a GPU's host more than the GPU. Read together they are as many for a whole forward. What is kept is a number a token,
block and stream: for SD3.5 Large at 1024 px 0.66 MB a sample.

Shapes: B batch, S tokens, L blocks of one stream with the same tokens.
"""

from __future__ import annotations

import torch

from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.updates import update_readings

Values = dict[tuple[str, str], dict[str, torch.Tensor]]
"""Of one forward: (stream, reading) -> (B,) float32 by the path of the (first) block."""


class Taken:
    """The distances of all tokens, by stream and block.

    What is put under one name has one kind: the angles, (B, S), or the norms and cosines of the updates.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], dict[str, tuple[Part, tuple[torch.Tensor, ...]]]] = {}

    def put(self, stream: str, name: str, path: str, part: Part, *values_BS: torch.Tensor) -> None:
        """Keep the angles, or the norms and cosines, of the stream's `part` of a state, by the path of the block."""
        self._kept.setdefault((stream, name), {})[path] = part, values_BS

    def read(self) -> Values:
        """Every reading; those of angles have the name that they were put under before theirs."""
        found: Values = {}
        for (stream, name), kept in self._kept.items():
            alike: dict[tuple[int, torch.Size], list[str]] = {}  # blocks with the same tokens
            for path, (part, values_BS) in kept.items():
                alike.setdefault((id(part), values_BS[0].shape), []).append(path)
            for paths in alike.values():
                part = kept[paths[0]][0]
                values_LBS = [torch.stack(values) for values in zip(*(kept[path][1] for path in paths), strict=True)]
                if len(values_LBS) == 1:
                    read = {name + reading: value_LB for reading, value_LB in part.readings(*values_LBS).items()}
                else:
                    norm_LBS, cosine_LBS = values_LBS
                    read = update_readings(norm_LBS, cosine_LBS, part)
                for reading, value_LB in read.items():
                    found.setdefault((stream, reading), {}).update(zip(paths, value_LB.unbind(), strict=True))
        return found
