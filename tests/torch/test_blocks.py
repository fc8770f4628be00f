"""Blocks, streams, names, module table and fingerprint, in the model's own words whatever is wrapped around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small import DOUBLE_AND_JOINT, SMALL, Add, Denoiser, FluxLike, flux_like, hooks, model_error, observed
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from simpletuner_layerprobe.probe.blocks import discover, find_blocks, stream_blocks
from simpletuner_layerprobe.probe.families import DIFFUSERS, FAMILIES, REFUSED, SAME_SHAPE, Family, family, is_known
from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.probe.token_masks import RULES
from simpletuner_layerprobe.probe.tokens import LAYOUTS
from simpletuner_layerprobe.probe.wrappers import is_compiled, named_modules, unwrapped

ENTRIES = [*FAMILIES, *DIFFUSERS.values()]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_table_names_what_there_is(entry: Family):
    assert family(entry.name, entry.denoisers[0] if entry.denoisers else "") and is_known(entry.name)
    assert entry.text in ("stream", "cross", "none") and entry.forwards in ("one", "per sample")
    streams = {seam.stream for blocks in entry.blocks for seam in blocks.streams}
    assert "image" in streams and ("text" in streams) == (entry.text == "stream")
    for blocks in entry.blocks:
        assert blocks.layout in LAYOUTS
        assert not blocks.call or blocks.call.startswith((".", "simpletuner.helpers.models."))
    assert {target.blocks for target in entry.targets} <= {blocks.path for blocks in entry.blocks}


def test_no_rule_is_missing_or_there_for_nothing():
    assert set(RULES) == {seam.tokens for entry in ENTRIES for blocks in entry.blocks for seam in blocks.streams}


def test_families_that_are_not_known_are_refused():
    with model_error("model family 'heartmula' cannot be probed: it predicts tokens"):
        family("heartmula")
    with model_error(
        "the denoiser Other of model family 'qwen_image' is not supported by the layer probe; it knows: Q"
    ):
        family("qwen_image", "Other")
    with model_error("model family 'new' is not supported by the layer probe; it knows: ace_step, anima"):
        family("new")
    assert is_known("heartmula") and not is_known("new") and set(REFUSED).isdisjoint(entry.name for entry in FAMILIES)


def test_a_denoiser_of_another_family_is_refused():
    with model_error(
        "Linear has no 'transformer_blocks'; the layer probe expects transformer_blocks.* in family 'sd3'"
    ):
        find_blocks(nn.Linear(2, 2), family("sd3"))
    with model_error("Denoiser has no transformer blocks"):
        find_blocks(Denoiser(), SMALL)


def test_a_block_that_only_reads_the_text_has_no_text_stream():
    """SD3's last block is context_pre_only."""
    denoiser = FluxLike()
    denoiser.transformer_blocks[-1].context_pre_only = True
    streams = stream_blocks(find_blocks(denoiser, family("sd3")))
    assert list(streams) == ["image", "text"]
    assert streams["image"] == ("transformer_blocks.0", "transformer_blocks.1")
    assert streams["text"] == ("transformer_blocks.0",)


def test_a_guess_takes_every_list_of_blocks_outside_of_blocks():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Add(), Add()])

        def forward(self, temb: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x

    class New(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
            self.more = nn.ModuleList([Add(), Add(), Add()])
            self.mixed = nn.ModuleList([Add(), nn.Identity()])
            self.alone = nn.ModuleList([Add()])
            self.others = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    for model in (New(), torch.compile(New(), backend="eager"), regions(New())):
        guess = discover(model, "new")
        assert guess.text == "unknown" and [target.blocks for target in guess.targets] == ["inner.layers.*", "more.*"]
        assert [(blocks.path, blocks.streams[0].argument, blocks.streams[0].result) for blocks in guess.blocks] == [
            ("inner.layers.*", "x", SAME_SHAPE),
            ("more.*", "hidden_states", SAME_SHAPE),
        ]
        assert len(find_blocks(model, guess)) == 5
    with model_error("Linear of model family 'new' has no list of modules that look like transformer blocks"):
        discover(nn.Linear(2, 2), "new")


def regions(model: nn.Module) -> nn.Module:
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


def compiled_blocks(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.single_transformer_blocks):
        model.single_transformer_blocks[number] = torch.compile(block, backend="eager")
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.transformer_blocks[0].compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    for number, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[number] = checkpoint_wrapper(block)
    return torch.compile(model, backend="eager")


class FullySharded(nn.Module):
    """Holds the model as FSDP does; FSDP itself needs a GPU."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args: torch.Tensor) -> None:
        self._fsdp_wrapped_module(*args)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), True),
    "regional compilation": (regions, True),
    "blocks compiled one by one": (compiled_blocks, True),
    "a block compiled in place": (compiled_in_place, True),
    "the forward compiled": (compiled_forward, True),
    "checkpointed blocks, compiled": (checkpointed, True),
    "data parallel": (nn.DataParallel, False),
    "fully sharded": (FullySharded, False),
}


@torch.no_grad()
@pytest.mark.parametrize(("wrap", "compiled"), WRAPPERS.values(), ids=list(WRAPPERS))
def test_wrappers_change_no_name_and_no_number(wrap, compiled):
    model, image, text, _ = flux_like()
    names = [(name, type(module)) for name, module in model.named_modules()]
    table, print_before = module_table(model), fingerprint(model)
    expected = observed(model, DOUBLE_AND_JOINT, image, text, residual=True, pairs=3)
    streams = stream_blocks(find_blocks(model, DOUBLE_AND_JOINT))
    assert not is_compiled(model)

    wrapped = wrap(model)
    assert is_compiled(wrapped) == compiled
    assert [(name, type(module)) for name, module in named_modules(wrapped)] == names
    assert type(unwrapped(wrapped)) is FluxLike
    assert module_table(wrapped) == table and fingerprint(wrapped) == print_before
    with Observer(wrapped, DOUBLE_AND_JOINT, residual=True, pairs=3) as observer:
        assert observer.streams == streams
        for _ in range(2):
            observer.begin({})
            wrapped(image, text)
            taken = observer.finish()
    for key, value in expected.items():
        np.testing.assert_array_equal(taken[key], value)
    assert hooks(wrapped) == 0


def test_a_child_that_is_called_module_is_no_wrapper():
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)
            self.again = self.module
            self.none = None
            self.register_module("nothing", None)

    model = Holds()
    assert unwrapped(model) is model
    assert [name for name, _ in named_modules(model)] == [name for name, _ in model.named_modules()] == ["", "module"]
    assert module_table(model) == (("module", "Linear", (3, 2)),)


def test_the_module_table_has_logical_shapes():
    class Packed(nn.Linear):
        """As quantised subclasses of torch's Linear are."""

        def __init__(self) -> None:
            super().__init__(4, 6)
            self.weight = nn.Parameter(torch.zeros(12, 1))

    class OwnLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(torch.zeros(6, 4))

    class Fp8Linear(OwnLinear):
        pass

    model = nn.Sequential(nn.Linear(4, 6), Packed(), OwnLinear(), Fp8Linear(), nn.Conv2d(2, 3, 5), nn.LayerNorm(7))
    model.append(nn.LayerNorm(7, elementwise_affine=False))
    assert [(kind, shape) for _, kind, shape in module_table(model)] == [
        ("Linear", (6, 4)),
        ("Packed", (6, 4)),
        ("OwnLinear", ()),
        ("Fp8Linear", (6, 4)),
        ("Conv2d", (3, 2, 5, 5)),
        ("LayerNorm", (7,)),
        ("LayerNorm", ()),
    ]


def test_the_fingerprint_tells_models_apart():
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))

    assert fingerprint(model(0)) == fingerprint(model(0))
    tuned = model(0)
    with torch.no_grad():
        tuned[0].weight += 1e-3
    other_name = nn.Sequential(OrderedDict(zip("ab", model(0), strict=True)))
    prints = [model(0), tuned, model(1), model(0).bfloat16(), other_name]
    assert len({fingerprint(each) for each in prints}) == len(prints)
    assert len(fingerprint(nn.Linear(3, 3, device="meta"))) == 64
