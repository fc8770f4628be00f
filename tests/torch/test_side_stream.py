"""The distances on a stream of their own, through torch's streams of a CPU: what waits for what, and what may leave."""

from __future__ import annotations

import weakref

import pytest
import torch
from small import DOUBLE_AND_JOINT, SMALL, Add, Denoiser, flux_like, model_error, observed

from simpletuner_layerprobe.probe import changes, side_stream
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.side_stream import SideStream


@pytest.fixture
def log(monkeypatch):
    """What happened in turn; the streams are "model" and "side"."""
    seen: list[str] = []

    class Stream(torch.cpu.Stream):
        def wait_stream(self, other):
            seen.append(f"{name(self)} waits for {name(other)}")

    def name(stream):
        return "side" if isinstance(stream, Stream) and stream is not model else "model"

    model = Stream()
    taken = changes.token_changes

    def token_changes(before, after, *rest):
        seen.append(f"{name(torch.cpu.current_stream())}: {float(before.mean()):.1f} to {float(after.mean()):.1f}")
        return taken(before, after, *rest)

    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "_current_stream", model)
    monkeypatch.setattr(changes, "token_changes", token_changes)
    monkeypatch.setattr(side_stream, "STREAM_DEVICES", ("cpu",))
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE_STREAM", "1")
    return seen


def forward(observer: Observer, **inputs) -> None:
    observer.begin({})
    observer.denoiser(torch.zeros(1, 2, 4), **inputs)


@torch.no_grad()
def test_each_stream_waits_for_the_other_at_every_block(log):
    with Observer(Denoiser(Add(), Add(), Add()), SMALL, pairs=2) as observer:
        forward(observer)
        # The first forward finds out which states are changed in place.
        assert log == ["model: 0.0 to 0.5", "model: 0.5 to 1.0", "model: 1.0 to 1.5"]
        log.clear()
        forward(observer, watch=lambda x: log.append(f"block made {float(x.mean()):.1f}"))
        assert log == [
            *("side waits for model", "side: 0.0 to 0.5", "block made 0.5"),
            *("model waits for side", "side waits for model", "side: 0.5 to 1.0", "block made 1.0"),
            *("model waits for side", "side waits for model", "side: 1.0 to 1.5", "block made 1.5"),
            "model waits for side",  # before anything of the forward is let go of
        ]
        log.clear()
        observer.finish()
        assert not log


class InPlace(Denoiser):
    """Adds to a state in place: to what a block returned ("after"), or got ("before"), after the block of a number."""

    def __init__(self, which: str, number: int, start: int = 1) -> None:
        super().__init__(*(Add() for _ in range(4)))
        self.which, self.number, self.start, self.calls = which, number, start, 0

    def forward(self, x: torch.Tensor) -> None:
        self.calls += 1
        for number, block in enumerate(self.blocks):
            before, x = x, block(x)
            if number == self.number and self.calls >= self.start:
                (x if self.which == "after" else before).add_(100.0)


@torch.no_grad()
@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_state_that_is_changed_between_blocks_stays_on_the_models_stream(log, which, number):
    with Observer(InPlace(which, number), SMALL) as observer:
        for _ in range(3):
            log.clear()
            forward(observer)
    streams = [line.split(":")[0] for line in log if ":" in line]
    assert streams == ["model" if block == number else "side" for block in range(4)]


@torch.no_grad()
def test_so_does_one_that_the_next_block_changes(log):
    with Observer(Denoiser(Add(), Add(), Add(in_place_from=1), Add()), SMALL) as observer:
        for _ in range(2):
            log.clear()
            forward(observer)
    # The block that changes its input got a copy, which is the observer's own.
    assert [line.split(":")[0] for line in log if ":" in line] == ["side", "model", "side", "side"]


@torch.no_grad()
def test_a_state_that_is_changed_only_later_is_an_error(log):
    for denoiser in (InPlace("before", 1, start=2), InPlace("after", 1, start=2), InPlace("after", 3, start=2)):
        with Observer(denoiser, SMALL) as observer:
            forward(observer)
            with model_error(f"a state around blocks.{denoiser.number} was changed in place after that block"):
                forward(observer)


@torch.inference_mode()
def test_states_of_inference_mode_stay(log):
    with Observer(Denoiser(Add(), Add()), SMALL) as observer:
        for _ in range(2):
            forward(observer)
    assert log == ["model: 0.0 to 0.5", "model: 0.5 to 1.0"] * 2


@torch.no_grad()
def test_states_are_kept_until_the_models_stream_has_waited(log):
    side = SideStream(on=True)
    side.learned()
    kept = []
    for block in "ab":
        state, own = torch.zeros(1), torch.zeros(1)
        kept.append((weakref.ref(state), weakref.ref(own)))
        side.run(block, [state], lambda own=own: None)
        del state, own
    assert [reference() is None for references in kept for reference in references] == [True, True, False, False]
    side.join()
    assert all(reference() is None for references in kept for reference in references)
    assert log == ["side waits for model", "model waits for side"] * 2


@torch.no_grad()
def test_the_numbers_are_the_same(log, monkeypatch):
    denoiser, image, text, mask = flux_like()
    with Observer(denoiser, DOUBLE_AND_JOINT, residual=True, pairs=4) as observer:
        for _ in range(2):
            observer.begin({}, mask)
            denoiser(image, text)
            taken = observer.finish()
    assert sum(line.startswith("side:") for line in log) == 7  # two states for two blocks, one for three
    log.clear()
    monkeypatch.delenv("SIMPLETUNER_LAYERPROBE_STREAM")
    plain = observed(denoiser, DOUBLE_AND_JOINT, image, text, mask=mask, residual=True, pairs=4)
    assert not any("waits" in line or line.startswith("side") for line in log)
    assert taken.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(taken[key], value, rtol=0, atol=0, equal_nan=True)
