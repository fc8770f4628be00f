"""What of a Trainer is replaced while its loop runs, on its own objects; afterwards nothing is left of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.training.fixed_noise import fixed_captions
from simpletuner_layerprobe.training.noise import RULES
from simpletuner_layerprobe.training.overrides import refuse_backends_with_noise_seed
from simpletuner_layerprobe.training.session import Session


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A method of one object, replaced on the object itself."""
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def observed(trainer: Any, session: Session) -> AbstractContextManager[None]:
    """The session sees what the family's own `model_predict` gets, whatever the Trainer did to the batch before."""
    model = trainer.model
    predict = model.model_predict

    @functools.wraps(predict)
    def model_predict(prepared_batch: dict, *args: Any, **kwargs: Any) -> Any:
        return session.forward(model, prepared_batch, lambda batch: predict(batch, *args, **kwargs))

    return _replaced(model, "model_predict", model_predict)


def no_backward(trainer: Any, session: Session) -> AbstractContextManager[None]:
    """In place of `accelerator.backward(loss)`: a backward through the idle parameter alone.

    It leaves a zero gradient, so that clipping, gradient scaling and the optimizer find what they expect.
    """
    backward = trainer.accelerator.backward
    return _replaced(
        trainer.accelerator, "backward", lambda loss, **kwargs: backward(session.idle_parameter * 0, **kwargs)
    )


@contextmanager
def probe_progress(train: Callable[..., Any], session: Session) -> Iterator[None]:
    """SimpleTuner's progress bar tells what a probe does, in place of a learning rate and a loss.

    train: the Trainer's method, in whose module the bar's class is looked up.
    """
    names = train.__globals__
    bar: Any = names["tqdm"]

    class ProbeBar(bar):
        def set_postfix(self, *_: Any, **__: Any) -> None:
            super().set_postfix(session.progress)

    names["tqdm"] = ProbeBar
    try:
        yield
    finally:
        names["tqdm"] = bar


def counted_at_the_end(trainer: Any, session: Session) -> AbstractContextManager[None]:
    """Count the run's samples when the loop is over and before the ranks part: every rank has written then."""
    accelerator = trainer.accelerator
    end_training = accelerator.end_training

    def count_and_end() -> None:
        session.end(accelerator.wait_for_everyone)
        end_training()

    return _replaced(accelerator, "end_training", count_and_end)


@contextmanager
def probe_sigmas(trainer: Any, session: Session) -> Iterator[None]:
    """Let the probe draw the noise levels, unless the user's own schedule is asked for."""
    if session.settings.sigmas == "training":
        yield
        return
    rule = RULES[session.family.noise]
    if rule.prescribe is None:
        raise ConfigError(
            f"layerprobe_sigmas is {session.settings.sigmas!r}, but model family {session.family.name!r} chooses its "
            f"noise levels itself; set layerprobe_sigmas to 'training'"
        )
    seed = int(session.options.get("seed", 0) or 0)

    def draw(count: int) -> torch.Tensor:
        sigmas = torch.from_numpy(session.draw_sigmas(count, seed))
        return sigmas.to(device=trainer.accelerator.device, dtype=torch.float32)

    with rule.prescribe(trainer.model, draw):
        yield


@contextmanager
def fixed_noise(trainer: Any, session: Session) -> Iterator[None]:
    """With a noise seed: batches are prepared with the noise, and loaded with the captions, that it says.

    Raises SeamError for a data backend whose latents are drawn anew.
    """
    fixed = session.fixed_noise
    if fixed is None:
        yield
        return
    from simpletuner.helpers.training.state_tracker import StateTracker

    refuse_backends_with_noise_seed(StateTracker.get_data_backends())
    model, family = trainer.model, session.family
    prepare = model.prepare_batch

    @functools.wraps(prepare)
    def prepare_batch(batch: dict, *args: Any, **kwargs: Any) -> Any:
        with fixed.preparing(batch, family.name, family.noise == "ddpm"):
            return prepare(batch, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(fixed_captions(fixed.seed))
        stack.enter_context(_replaced(model, "prepare_batch", prepare_batch))
        yield
