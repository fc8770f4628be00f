"""The probe without SimpleTuner: the distances of the forwards of one of diffusers' own transformers or U-Nets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from simpletuner_layerprobe.errors import ConfigError, ModelError
from simpletuner_layerprobe.probe.families import DIFFUSERS, Family
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.wrappers import unwrapped
from simpletuner_layerprobe.readings import TOKENS


class Seen:
    """What `observe` saw: the distances of the last forward of the model; of a forward that failed, nothing.

    streams: stream -> paths of the L blocks that update it, image first. readings: the names that `distances` takes.
    """

    def __init__(self, observer: Observer) -> None:
        self.streams = observer.streams
        self.readings = (*TOKENS, *observer.extra)
        self._observer = observer

    def distances(self, stream: str, reading: str = "mean") -> torch.Tensor:
        """(B, L) float32 on the CPU: of each sample of the last forward and each block of the stream.

        "mean" and "last" are angular distances arccos(cos)/pi in [0, 1] of the hidden states before and after the
        block: "mean" over the stream's tokens, "last" of its last token. Asking waits for the device. It may be asked
        inside and after the `with`. Raises ModelError for another stream and if no forward ran to its end, ConfigError
        for another reading.
        """
        if stream not in self.streams:
            raise ModelError(f"there is no stream {stream!r}; this model has: {', '.join(self.streams)}")
        if reading not in self.readings:
            raise ConfigError(f"there is no reading {reading!r}; expected one of {', '.join(self.readings)}")
        return self._observer.distances()[stream, reading].cpu()


@contextmanager
def observe(model: nn.Module, *, residual: bool = False, pairs: int = 0) -> Iterator[Seen]:
    """Take the angular distances over every block in the forwards of a model, which are not changed by it.

        with observe(transformer) as seen:
            transformer(...)
        seen.distances("image", "mean")  # (B, L)

    model: one of diffusers' own classes in DIFFUSERS, alone or in a pipeline, compiled or not; a compiled one runs
    uncompiled inside. Streams: "image" has all tokens of the image, those of reference images included; "text" has all
    tokens of the text, in Qwen-Image those that `encoder_hidden_states_mask` keeps. Models whose text only conditions
    the image (Wan, PixArt, the U-Nets) have no text stream. B is the batch of the model's forward: a pipeline with
    classifier-free guidance may double it.

    residual: also what each block adds ("update_norm_mean", "update_cosine_last" ...). pairs: also the distances over
    2 .. `pairs` blocks in a row ("pair2_mean" ...). It keeps one hidden state a stream (with pairs as many as the
    longest has blocks) and no autograd graph.

    Raises ModelError for another class, and names those that it knows.
    """
    with Observer(model, _family(model), residual, pairs) as observer:
        observer.begin({})
        yield Seen(observer)


def _family(model: nn.Module) -> Family:
    """The table's entry for a class of diffusers, or for one that is derived from it."""
    kind = type(unwrapped(model))
    for base in kind.__mro__:
        if base.__module__.split(".")[0] == "diffusers" and base.__name__ in DIFFUSERS:
            return DIFFUSERS[base.__name__]
    raise ModelError(
        f"{kind.__module__}.{kind.__qualname__} cannot be observed; of diffusers' own classes these can: "
        f"{', '.join(DIFFUSERS)}"
    )
