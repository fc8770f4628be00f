"""Which modules share a factor, and which block a module belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from failing import fails
from lokr_models import Model, sd3_blocks, sd3_model, sd3_table

from simpletuner_layerprobe.lokr.groups import (
    ATTENTION,
    FEED_FORWARD,
    JOINT,
    MODULATION,
    Group,
    layer_kind,
    module_groups,
    owning_block,
)
from simpletuner_layerprobe.run.manifest import Module, Target


@pytest.mark.parametrize(
    ("type_", "shape", "kind"),
    [
        ("Linear", (8, 8), "linear"),
        ("Linear4bit", (8, 8), "linear"),
        ("CPUBouncingLinear", (8, 8), "weight"),
        ("Linear", (), ""),
        ("QConv2d", (8, 8, 3, 3), "conv"),
        ("Conv3d", (8, 8, 3, 3, 3), "conv"),
        ("Conv2d", (8, 8), "weight"),
        ("ConvTranspose2d", (8, 8, 3, 3), "weight"),
        ("RMSNorm", (8,), "weight"),
        ("SiLU", (), ""),
    ],
)
def test_what_lycoris_sees_in_a_module(type_, shape, kind):
    assert layer_kind(Module("a", type_, shape)) == kind


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.1.attn.to_q", "blocks.1"),
        ("blocks.10.attn.to_q", "blocks.10"),
        ("blocks.1.inner.0.ff", "blocks.1.inner.0"),
        ("blocks.1.inner.1.ff", "blocks.1"),
        ("other.blocks.1.ff", None),
        ("blocks.1", None),
    ],
)
def test_the_innermost_block_owns_a_module(name, block):
    assert owning_block(name, ["blocks.1", "blocks.10", "blocks.1.inner.0"]) == block


def test_the_kinds_of_a_block():
    """In order; what a target has no rule for, and layers that are not asked for, are left out."""
    shapes = {"attn": (8, 8), "rest": (8, 8), "norm": (8, 8), "ff": (8, 8), "ff.mix": (8, 8, 3, 3)}
    modules = tuple(
        Module(f"blocks.0.{name}", "Conv2d" if len(shape) > 2 else "Linear", shape) for name, shape in shapes.items()
    )
    model = Model(modules, (Target("blocks.*", ("norm*", "ff*"), ("attn*",)),))
    expected = {FEED_FORWARD: ["ff", "ff.mix"], ATTENTION: ["attn"], MODULATION: ["norm"]}
    groups = module_groups(model, ["blocks.0"])
    assert [(group.kind, [one.name[9:] for one in group.modules]) for group in groups] == list(expected.items())
    assert {group.stream for group in groups} == {JOINT}
    linear = module_groups(model, ["blocks.0"], kinds=["linear"])
    assert [one.name for one in linear[0].modules] == ["blocks.0.ff"]


def names_by_stream(groups: Sequence[Group], number: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for group in groups:
        if group.number == number:
            names.setdefault(group.stream, []).extend(one.name[len(group.block) + 1 :] for one in group.modules)
    return {stream: sorted(each) for stream, each in names.items()}


BOTH = {"image": ["blocks.0"], "text": ["blocks.0"]}


@pytest.mark.parametrize(
    ("names", "streams", "expected"),
    [
        # One sequence of both: nothing tells the modules apart.
        (["to_q", "ff.0"], BOTH, {JOINT: ["ff.0", "to_q"]}),
        # Blocks of one stream only.
        (["to_q", "ff.0"], {"image": ["blocks.1"], "text": ["blocks.0"]}, {"text": ["ff.0", "to_q"]}),
        # No text was recorded: what its modules are called does not count.
        (["to_q", "add_k_proj"], {"image": ["blocks.0"]}, {"image": ["add_k_proj", "to_q"]}),
        # SD3's; the last block has a text module and does not update the text.
        (
            ["attn.to_q", "attn.add_q_proj", "attn.to_add_out", "ff.net.2", "ff_context.net.2", "norm1_context.linear"],
            {"image": ["blocks.0"], "text": ["blocks.1"]},
            {
                "image": ["attn.to_q", "ff.net.2"],
                "text": ["attn.add_q_proj", "attn.to_add_out", "ff_context.net.2", "norm1_context.linear"],
            },
        ),
        (
            [
                "img_instruct_attn.processor.img_to_q",
                "img_instruct_attn.processor.instruct_to_q",
                "img_instruct_attn.o",
            ],
            BOTH,
            {
                "image": ["img_instruct_attn.o", "img_instruct_attn.processor.img_to_q"],
                "text": ["img_instruct_attn.processor.instruct_to_q"],
            },
        ),
        (
            ["attn.to_q_t", "ff_t.w1", "ff_i.w1", "audio_ff.0", "txt_mod.1", "mlp_text"],
            BOTH | {"audio": ["blocks.0"]},
            {
                "image": ["ff_i.w1"],
                "text": ["attn.to_q_t", "ff_t.w1", "mlp_text", "txt_mod.1"],
                "audio": ["audio_ff.0"],
            },
        ),
    ],
)
def test_the_stream_of_a_module(names, streams, expected):
    modules = tuple(Module(f"blocks.0.{name}", "Linear", (8, 8)) for name in names)
    groups = module_groups(Model(modules, (Target("blocks.*", (), ("*",)),)), ["blocks.0"], streams=streams)
    assert names_by_stream(groups, 0) == expected


def test_frozen_blocks_have_no_group():
    groups = module_groups(sd3_model(3, 64), sd3_blocks(3), freeze=[0, 2])
    assert {group.number for group in groups} == {1}
    with fails("all blocks are frozen"):
        module_groups(sd3_model(3, 64), sd3_blocks(3), freeze=[0, 1, 2])


LARGER = replace(
    sd3_model(1, 64),
    modules=(*sd3_table(1, 64), Module("transformer_blocks.1.ff", "CPUBouncingLinear", (8, 8))),
)


@pytest.mark.parametrize(
    ("model", "block", "text"),
    [
        (LARGER, "blocks.0", "'blocks.0' lies in none of the block lists that the config has rules for: transformer_b"),
        (LARGER, "transformer_blocks.0.ff", "lies in none of the block lists"),
        (LARGER, "transformer_blocks.1", "no linear or conv layer that can be adapted in block 'transformer_blocks.1'"),
        (Model(()), "transformer_blocks.0", "there is no module table"),
        (replace(LARGER, targets=()), "transformer_blocks.0", "rules for: none"),
    ],
)
def test_blocks_that_do_not_fit_the_table(model, block, text):
    with fails(text):
        module_groups(model, [block])
