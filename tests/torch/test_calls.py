"""Every way in which a model runs its blocks, and that the way is as it was afterwards."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from small import SMALL, Add, Denoiser, cosine_distances, entry, hooks
from torch import nn

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.probe.blocks import find_blocks
from simpletuner_layerprobe.probe.calls import watched
from simpletuner_layerprobe.probe.observer import Observer


class ByMethod(Denoiser):
    """Its forward calls a method of the blocks, as Cosmos 3 does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block.run(x)
        return x


class Runs(Add):
    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 0.5


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A Python module with the function that runs the blocks of `ByFunction`, as SD3's."""
    module = ModuleType("runner_of_blocks")
    module.run = lambda block, hidden_states, temb=None: hidden_states + 0.5
    monkeypatch.setitem(sys.modules, "runner_of_blocks", module)
    return module


class ByFunction(Denoiser):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            run = sys.modules["runner_of_blocks"].run
            x = run(block, x, temb=1) if number else run(block, hidden_states=x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kind", "call"), [(ByMethod, ".run"), (ByFunction, "runner_of_blocks:run")])
def test_blocks_that_are_run_in_another_way(runner, kind, call, compiled):
    denoiser, x = kind(Runs(), Runs()), torch.randn(2, 3, 4)
    own = denoiser.blocks[1].run
    denoiser.blocks[1].run = own  # an attribute of the block, as some wrappers leave it
    other = kind(Runs())
    if compiled:
        denoiser.blocks[0] = torch.compile(denoiser.blocks[0], backend="eager")
    function = runner.run
    with Observer(denoiser, entry(call=call)) as observer:
        observer.begin({})
        denoiser(x)
        other(x)  # another model's blocks are not observed
        taken = observer.finish()
        assert observer.streams == {"image": ("blocks.0", "blocks.1")}
    expected = cosine_distances([x, x + 0.5, x + 1.0])[:, -1]
    np.testing.assert_allclose(taken["image", "last"], expected, rtol=0, atol=2e-7)
    assert runner.run is function
    assert "run" not in vars(find_blocks(denoiser, SMALL)[0].module) and vars(denoiser.blocks[1])["run"] is own


@pytest.mark.parametrize(
    ("call", "missing"), [(".gone", "Runs.gone is missing"), ("runner_of_blocks:gone", "runner_of_blocks:gone is miss")]
)
def test_a_way_that_is_not_there_is_refused(runner, call, missing):
    denoiser = Denoiser(Runs(), Runs())
    with pytest.raises(SeamError, match=re.escape(missing)), Observer(denoiser, entry(call=call)):
        pass
    assert hooks(denoiser) == 0


@pytest.mark.parametrize(("kind", "call"), [(Denoiser, ""), (ByMethod, ".run"), (ByFunction, "runner_of_blocks:run")])
def test_nothing_stays_behind_a_block_that_fails(runner, kind, call):
    class Fails(Runs):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

        run = forward

    def fail(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    runner.run = fail
    denoiser = kind(Fails())
    events: list[str] = []
    blocks = find_blocks(denoiser, entry(call=call))
    with (
        pytest.raises(ZeroDivisionError),
        watched(blocks, lambda block, _: events.append(f"into {block.path}"), lambda *_: events.append("out")),
    ):
        denoiser(torch.ones(1, 2, 4))
    assert events == ["into blocks.0"]
    assert hooks(denoiser) == 0 and "run" not in vars(denoiser.blocks[0]) and runner.run is fail
