"""What a noise seed fixes: sigma, noise and caption of a sample by the seed, its image and its repeat alone.

Nothing else counts: not what ran before, in which batch or on which rank the sample comes, nor the state of any random
generator. So two runs with one seed are paired sample by sample. Crops and the draw of the VAE are in SimpleTuner's VAE
cache: they are the same for runs that share it.

Shape letters: B samples of the batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from simpletuner_layerprobe.errors import ModelError, SeamError
from simpletuner_layerprobe.run.rows import image_hash
from simpletuner_layerprobe.training.sigmas import image_sigma

Place = tuple[int, int]
"""(image hash, repeat) of a sample."""

OF_SAMPLES: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.randn_like: torch.randn,
    torch.randn: torch.randn,
    torch.rand_like: torch.rand,
    torch.rand: torch.rand,
}
"""Function that draws for a whole batch -> what draws the same for one sample."""
STEPS = frozenset({torch.multinomial, torch.randint})
"""What SimpleTuner draws the steps of a DDPM schedule with, which `noise.py` replaces afterwards."""
OTHERS: frozenset[Callable[..., Any]] = STEPS | {
    torch.normal,
    torch.bernoulli,
    torch.poisson,
    torch.randint_like,
    torch.randperm,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.random_,
    torch.Tensor.bernoulli_,
    torch.Tensor.bernoulli,
    torch.Tensor.multinomial,
}


class FixedNoise:
    """The draws of one run with a noise seed, in one process.

    seed: the option. stratified: whether the repeats of an image spread over its sigmas. seen: how often each image
    came before, counted by whoever keeps the samples.
    """

    def __init__(self, seed: int, stratified: bool, seen: Mapping[int, int]) -> None:
        self.seed = seed
        self._stratified = stratified
        self._seen = seen
        self._places: list[Place] = []

    def preparing(self, batch: Mapping[str, Any], family: str, ddpm: bool) -> SampleDraws:
        """A context in which a batch is prepared with its fixed draws; `sigmas` gives those of this batch from now on.

        Raises SeamError if the batch does not name its images.
        """
        backend, paths = batch.get("data_backend_id"), batch.get("filepaths")
        if not backend or not paths:
            raise SeamError(
                "the batch does not name its images, and layerprobe_noise_seed fixes the noise of each image; leave "
                "layerprobe_noise_seed out"
            )
        came, self._places = Counter(self._seen), []
        for path in paths:
            image = image_hash(str(backend), str(path))
            self._places.append((image, came[image]))
            came[image] += 1
        return SampleDraws(self.seed, self._places, family, STEPS if ddpm else frozenset())

    def sigmas(self, count: int) -> NDArray[np.float64]:
        """The sigmas of the batch that is prepared, (count,) in [0, 1). Raises SeamError if it has another count."""
        if count != len(self._places):
            raise SeamError(
                f"a batch with {len(self._places)} images asks for {count} noise levels; leave layerprobe_noise_seed "
                f"out"
            )
        return np.array([image_sigma(*place, seed=self.seed, stratified=self._stratified) for place in self._places])


class SampleDraws(TorchFunctionMode):
    """While it is entered, what torch draws for a batch is drawn for each sample by its place, in this thread alone.

    The draw is made on the CPU in float32, so that it does not depend on the device, and then moved to the device and
    dtype that were asked for; a million numbers take about 10 ms of one core. Raises ModelError, naming the family, for
    a draw that is none of single samples.
    """

    def __init__(
        self, seed: int, places: list[Place], family: str, allowed: frozenset[Callable[..., Any]] = frozenset()
    ) -> None:
        super().__init__()
        self._seed = seed
        self._places = places
        self._family = family
        self._allowed = allowed
        self._draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._allowed or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in OTHERS:
            raise _not_fixed(self._family, func, "while it prepares a batch")
        drawn = func(*args, **kwargs)  # shape, dtype and device are those of the plain draw
        if func not in OF_SAMPLES:
            return drawn
        if not drawn.ndim or drawn.shape[0] != len(self._places):
            raise _not_fixed(self._family, func, f"of shape {tuple(drawn.shape)} while it prepares a batch")
        fixed = torch.stack([self._sample(OF_SAMPLES[func], place, drawn.shape[1:]) for place in self._places])
        self._draws += 1
        return fixed.to(drawn.device, drawn.dtype)

    def _sample(self, draw: Callable[..., torch.Tensor], place: Place, shape: torch.Size) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hashed(self._seed, *place, self._draws))
        return draw(shape, generator=generator, dtype=torch.float32, device="cpu")


class NoDraws(TorchFunctionMode):
    """While it is entered, a random draw in this thread raises ModelError naming the family."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self._family = family

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dropout = func is functional.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0
        if (func in OF_SAMPLES or func in OTHERS or dropout) and kwargs.get("generator") is None:
            raise _not_fixed(self._family, func, "in its forward")
        return func(*args, **kwargs)


def hashed(*numbers: int | str) -> int:
    """63 bits that depend on all of these."""
    text = "\0".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def fixed_captions(seed: int) -> Iterator[None]:
    """Of several captions of an image, SimpleTuner takes the one that the seed and the image say, in every repeat.

    It draws captions when it loads a batch, ahead of the loop and before it is known which repeat will be kept. Raises
    SeamError if this SimpleTuner asks for captions in another way.
    """
    from simpletuner.helpers.prompts import PromptHandler

    original = vars(PromptHandler).get("caption_for_sampler")
    if not isinstance(original, staticmethod):
        raise SeamError(
            "PromptHandler.caption_for_sampler is missing in this SimpleTuner, so layerprobe_noise_seed cannot fix "
            "captions; leave layerprobe_noise_seed out"
        )

    def caption_for_sampler(sampler: Any, image_path: Any) -> Any:
        captions = original.__func__(sampler, image_path)
        if not isinstance(captions, list) or not captions:
            return captions
        return captions[hashed(seed, image_hash(str(sampler.id), str(image_path)), "caption") % len(captions)]

    PromptHandler.caption_for_sampler = staticmethod(caption_for_sampler)
    try:
        yield
    finally:
        PromptHandler.caption_for_sampler = original


def _not_fixed(family: str, function: Any, where: str) -> ModelError:
    return ModelError(
        f"model family {family!r} draws by {getattr(function, '__name__', function)} {where}, which no seed of a "
        f"sample can fix; leave layerprobe_noise_seed out for this family"
    )
