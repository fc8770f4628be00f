"""The distances on a stream of the device of their own, beside the next block; off unless the environment says so.

Not measured yet. The distances of a block read memory and hardly calculate, the next block's matrix products the other
way round, so that some of one may hide behind the other. At most: 0.4% of the bare forward for SD3.5 Large at batch 1,
whose states are read once at 4.3 TB/s, and about as much again of small kernels for the readings.

What runs there reads hidden states, which the model's own stream made and may free or change in place. So:

- it waits for all that the model's stream was given before, and the model's stream waits for it when the next block
  has been given to it: no state is let go of before, and the host waits for nothing;
- states that are changed in place in between are not read there. The first forward finds out, by the version that
  torch counts for a tensor, after which blocks that happens; their distances stay on the model's stream. Those of
  inference mode, whose tensors have no version, stay too. Where a later forward changes one after all, it is an error.

What is allocated there is used by the model's stream after it waited, and anew by this one after that: each waits for
the other at every block. Offloading and block swap move parameters on streams of theirs; only states are read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpletuner_layerprobe.errors import ModelError

STREAM_SWITCH = "SIMPLETUNER_LAYERPROBE_STREAM"
"""The environment variable that switches the stream on with "1"."""
STREAM_DEVICES = ("cuda",)
"""Types of devices that have such streams (AMD's are called so too)."""

Work = Callable[[], None]


@dataclass(frozen=True)
class _Running:
    """What was done last. versions: of the states that others can change. work: holds all that it reads."""

    block: str
    states: Sequence[torch.Tensor]
    versions: Sequence[int]
    work: Work
    stream: Any

    @property
    def changed(self) -> bool:
        return any(state._version != version for state, version in zip(self.states, self.versions, strict=True))


class SideStream:
    """Runs the distances of one block after the other. on: whether beside the model's stream."""

    def __init__(self, on: bool) -> None:
        self._on = on
        self._learning = True
        self._stay: set[str] = set()
        self._streams: dict[torch.device, Any] = {}
        self._running: _Running | None = None

    def run(self, block: str, states: Sequence[torch.Tensor], work: Work) -> None:
        """Do `work`, the distances of the block with this path. Raises ModelError as `join` does.

        states: those that it reads and that others can change, all on one device.
        """
        self.join()
        device = states[0].device
        if not self._on or device.type not in STREAM_DEVICES or any(state.is_inference() for state in states):
            work()
            return
        stream = None
        if self._learning or block in self._stay:
            work()
        else:
            module = torch.get_device_module(device)
            stream = self._streams.get(device) or self._streams.setdefault(device, module.Stream(device))
            stream.wait_stream(module.current_stream(device))
            with module.stream(stream):
                work()
        self._running = _Running(block, states, [state._version for state in states], work, stream)

    def join(self) -> None:
        """The model's stream goes on when the last work is done; its states are let go of.

        Raises ModelError if one was changed in place since then, except in the first forward.
        """
        running, self._running = self._running, None
        if running is None:
            return
        if running.stream is not None:
            device = running.states[0].device
            torch.get_device_module(device).current_stream(device).wait_stream(running.stream)
        if running.changed:
            if running.stream is not None:
                raise ModelError(
                    f"a state around {running.block} was changed in place after that block, which it was not in the "
                    f"first step, while its distance was taken beside the next block; unset {STREAM_SWITCH}"
                )
            self._stay.add(running.block)

    def learned(self) -> None:
        """The first forward is over."""
        self.join()
        self._learning = False
