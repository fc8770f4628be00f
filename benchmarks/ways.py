"""One training step's forward in every way that is compared: bare, probed, trained, and as others measure.

The peers' ways are written here from their description, for comparison only. They read the same block boundaries as
the probe, through their own hooks.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from denoisers import Subject
from measure import ABLATED, CHECKPOINTED, PROBE
from torch.nn import functional as F

from simpletuner_layerprobe.probe import distances
from simpletuner_layerprobe.probe.blocks import Block, find_blocks
from simpletuner_layerprobe.probe.distances import Kernel
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.rows import RowBuffer
from simpletuner_layerprobe.probe.side_stream import STREAM_DEVICES, STREAM_SWITCH
from simpletuner_layerprobe.probe.updates import token_updates
from simpletuner_layerprobe.readings import TOKENS, parse_reading
from simpletuner_layerprobe.training.ablation import StepAblation

Step = Callable[[], object]
Way = Callable[[Subject], Any]  # a context manager that gives the step


@contextmanager
def bare(subject: Subject) -> Iterator[Step]:
    """The physical limit: the forward without autograd."""
    yield torch.no_grad()(subject.forward)


class Probe:
    """The probe, as in a run: hooks, the readings of all streams, and the row kept for the next flush.

    It always takes both readings of the angle; residual and pairs: further ones, as the Observer has them.
    """

    def __init__(self, subject: Subject, residual: bool = False, pairs: int = 0) -> None:
        self.observer = Observer(subject.denoiser, subject.entry, residual, pairs)
        readings = [parse_reading(name) for name in (*TOKENS, *self.observer.extra)]
        self.buffer = RowBuffer(
            {
                (stream, reading.name): len(reading.columns(paths))
                for reading in readings
                for stream, paths in self.observer.streams.items()
                if reading.span <= len(paths)
            }
        )
        count = subject.count
        self.facts = {"width": [1024] * count, "height": [1024] * count, "backend": ["images"] * count}
        device = subject.batch["latents"].device
        self.sigma_B = torch.full((count,), 0.5, device=device)
        self.tokens_B = torch.full((count,), 77, device=device)
        self.loss_B = torch.full((count,), 0.5, device=device)

    @contextmanager
    def __call__(self, subject: Subject) -> Iterator[Step]:
        @torch.no_grad()
        def step() -> None:
            self.observer.begin(subject.batch)
            subject.forward()
            found = self.observer.finish()
            self.buffer.append(found, self.sigma_B, self.loss_B, self.tokens_B, self.facts, subject.count)

        with self.observer:
            yield step
        self.buffer.take()


class Ablated(Probe):
    """A step in which every block is left out once, as `layerprobe_ablation: blocks` has it for some of the samples.

    What ran before the block that is left out is kept, and not run again.
    """

    @contextmanager
    def __call__(self, subject: Subject) -> Iterator[Step]:
        device = subject.batch["latents"].device
        model = SimpleNamespace(get_prediction_target=lambda batch: subject.inputs["hidden_states"])
        ablation = StepAblation(self.observer, "blocks", device)

        @torch.no_grad()
        def step() -> None:
            self.observer.begin(subject.batch)
            batch = dict(subject.batch)
            ablation.run(model, batch, lambda _: {"model_prediction": subject.forward()}, self.observer.finish)

        with self.observer:
            yield step


@mock.patch.dict(os.environ, {STREAM_SWITCH: "1"})
def beside(subject: Subject) -> dict[str, Way]:
    """The probe with its distances on a stream of their own, where the device has such."""
    has_streams = subject.batch["latents"].device.type in STREAM_DEVICES
    return {"probe, on a stream of its own": Probe(subject)} if has_streams else {}


def other_kernel(path: Path) -> Kernel:
    """The kernel of another angles_kernel.py, with a launch for each state before.

    Of one that has the angles only, with torch's operations for the updates.
    """
    spec = importlib.util.spec_from_file_location("other_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def changes(u_BSD: torch.Tensor, v_BSD: torch.Tensor, updates: bool) -> tuple[torch.Tensor, ...]:
        if hasattr(module, "changes"):
            return tuple(module.changes(u_BSD, v_BSD, updates))
        return module.angles(u_BSD, v_BSD), *(token_updates(u_BSD, v_BSD) if updates else ())

    def kernel(
        u_BSD: torch.Tensor, v_BSD: torch.Tensor, updates: bool, earlier_BSD: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, ...]:
        return *changes(u_BSD, v_BSD, updates), *(changes(state_BSD, v_BSD, False)[0] for state_BSD in earlier_BSD)

    return kernel


def with_kernel(way: Way, kernel: Kernel | None) -> Way:
    """The way with another kernel; with None by torch's own operations, as devices without a kernel have it."""

    @contextmanager
    def other(subject: Subject) -> Iterator[Step]:
        kept = distances.device_kernel
        distances.device_kernel = lambda *_: kernel
        try:
            with way(subject) as step:
                yield step
        finally:
            distances.device_kernel = kept

    return other


def host_us(subject: Subject, steps: int = 10) -> float:
    """What the probe costs the host for one block: microseconds of this thread, launches included, arithmetic not.

    The hooks, and a block's share of the readings after the forward; of each the run that was least disturbed. On a
    CPU a kernel that does nothing stands for the angles'.
    """
    probe = Probe(subject)
    observer, spent = probe.observer, []

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time()
            result = hook(*args)
            spent.append(time.thread_time() - began)
            return result

        return call

    observer._enter_block, observer._leave_block = timed(observer._enter_block), timed(observer._leave_block)  # type: ignore[method-assign]
    observer.finish = timed(observer.finish)  # type: ignore[method-assign]
    way: Way = probe
    if subject.batch["latents"].device.type == "cpu":
        way = with_kernel(probe, lambda u_BSD, *_: (torch.empty(u_BSD.shape[:2], dtype=torch.float32),))
    with way(subject) as step:
        for _ in range(2 + steps):
            step()
    blocks = len(observer.blocks)
    calls = 2 * blocks + 1
    least = [min(spent[number + 2 * calls :: calls]) for number in range(calls)]
    return round(sum(least) / blocks * 1e6, 1)


def train(checkpointing: bool) -> Way:
    """SimpleTuner's training step of an adapter: forward with autograd and backward through all (frozen) blocks.

    Neither an adapter's own work nor the optimizer is in it, so a real training step is slower than this.
    """

    @contextmanager
    def way(subject: Subject) -> Iterator[Step]:
        denoiser = subject.denoiser
        # The gradient reaches the first block's input, as it does with an adapter in the first block.
        embedder = denoiser.pos_embed.proj if subject.entry.name == "sd3" else denoiser.x_embedder
        leaf = embedder.bias
        leaf.requires_grad_(True)
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()

        def step() -> None:
            leaf.grad = None
            subject.forward().float().square().mean().backward()

        try:
            yield step
        finally:
            leaf.requires_grad_(False)
            leaf.grad = None
            denoiser.eval()
            if checkpointing:
                denoiser.disable_gradient_checkpointing()

    return way


@contextmanager
def tapped(subject: Subject, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(stream, state)` with the state before the first block and after every block, for each stream."""
    started: set[str] = set()

    def enter(block: Block, arguments: dict[str, torch.Tensor]) -> None:
        for seam in block.seams:
            stream = seam.argument if len(block.seams) > 1 and seam.result is None else seam.stream
            if stream not in started:
                started.add(stream)
                see(stream, arguments[seam.argument])

    def leave(block: Block, output: Any) -> None:
        seen = set()
        for seam in block.seams:
            stream = seam.argument if len(block.seams) > 1 and seam.result is None else seam.stream
            if stream not in seen:
                seen.add(stream)
                see(stream, output if seam.result is None else output[seam.result])

    def hook(stack: ExitStack, block: Block) -> None:
        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            enter(block, kwargs)

        def after(module: Any, args: Any, output: Any) -> None:
            leave(block, output)

        stack.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.module.register_forward_hook(after).remove)

    with ExitStack() as stack:
        root = subject.denoiser.register_forward_pre_hook(lambda *_: started.clear())
        stack.callback(root.remove)
        blocks = find_blocks(subject.denoiser, subject.entry)
        if subject.entry.name == "sd3":
            module_name, name = blocks[0].entry.call.split(":")
            module = importlib.import_module(module_name)
            original = getattr(module, name)
            by_id = {id(block.module): block for block in blocks}

            def run(one: Any, *args: Any, **kwargs: Any) -> Any:
                states = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
                enter(by_id[id(one)], states)
                output = original(one, *args, **kwargs)
                leave(by_id[id(one)], output)
                return output

            setattr(module, name, run)
            stack.callback(setattr, module, name, original)
        else:
            for block in blocks:
                hook(stack, block)
        yield


def published_distance(before_BSD: torch.Tensor, after_BSD: torch.Tensor) -> torch.Tensor:
    """arccos(cos)/pi in the states' own dtype, with the usual clamp; (B, S)."""
    cos = F.cosine_similarity(before_BSD, after_BSD, dim=-1).clamp(-1 + 1e-7, 1 - 1e-7)
    return torch.acos(cos) / math.pi


def kept(keep: Callable[[torch.Tensor], torch.Tensor]) -> Way:
    """Keep every hidden state in some way, and take all distances after the forward."""

    @contextmanager
    def way(subject: Subject) -> Iterator[Step]:
        states: dict[str, list[torch.Tensor]] = {}

        @torch.no_grad()
        def step() -> list[torch.Tensor]:
            states.clear()
            subject.forward()
            pairs = (pair for stream in states.values() for pair in itertools.pairwise(stream))
            found = [published_distance(before, after).mean(dim=1) for before, after in pairs]
            states.clear()
            return found

        with tapped(subject, lambda stream, state: states.setdefault(stream, []).append(keep(state))):
            yield step

    return way


@contextmanager
def item_per_block(subject: Subject) -> Iterator[Step]:
    """The last token's distance as a Python number after each block: the host waits for the device every time."""
    previous: dict[str, torch.Tensor] = {}
    found: list[float] = []

    def see(stream: str, state: torch.Tensor) -> None:
        if stream in previous:
            found.append(published_distance(previous[stream][:, -1:], state[:, -1:]).mean().item())
        previous[stream] = state

    @torch.no_grad()
    def step() -> list[float]:
        previous.clear()
        found.clear()
        subject.forward()
        return list(found)

    with tapped(subject, see):
        yield step


@contextmanager
def read_once(subject: Subject) -> Iterator[Step]:
    """No measurement, but the least that one needs: both states of every block are read once, and nothing written."""
    previous: dict[str, torch.Tensor] = {}

    def see(stream: str, state: torch.Tensor) -> None:
        if stream in previous:
            previous[stream].sum()
            state.sum()
        previous[stream] = state

    @torch.no_grad()
    def step() -> None:
        previous.clear()
        subject.forward()
        previous.clear()

    with tapped(subject, see):
        yield step


def probes(subject: Subject, other: Kernel | None) -> dict[str, Way]:
    """The probe as it is set up without options, and with every further reading; both also with another kernel."""
    found: dict[str, Way] = {PROBE: Probe(subject), ABLATED: Ablated(subject)}
    readings: dict[str, Way] = {
        PROBE: found[PROBE],
        "probe, and residual readings": Probe(subject, residual=True),
        "probe, and pairs of 2 blocks": Probe(subject, pairs=2),
        "probe, and pairs of 2 to 4 blocks": Probe(subject, pairs=4),
    }
    if other:
        readings |= {f"{label}: the other kernel": with_kernel(way, other) for label, way in readings.items()}
    if subject.batch["latents"].device.type != "cpu":
        readings[f"{PROBE}: no kernel"] = with_kernel(found[PROBE], None)
    return found | readings | beside(subject)


def ways(subject: Subject, training: bool, other: Kernel | None = None) -> dict[str, Way]:
    """Every way but the bare one, by its name in the tables."""
    steps = {"training step": train(checkpointing=False), CHECKPOINTED: train(checkpointing=True)}
    return (
        probes(subject, other)
        | (steps if training else {})
        | {
            "keep all states on the device": kept(lambda state: state),
            ".item() per block": item_per_block,
            "floor: both states read once": read_once,
            "clone all states to the CPU": kept(lambda state: state.detach().to("cpu", copy=True)),
        }
    )
