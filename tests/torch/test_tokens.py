"""Readings of a stream's own tokens, and the rules whose guards no family run reaches; the others are in families/."""

from __future__ import annotations

import math

import torch
from small import model_error

from simpletuner_layerprobe.probe.calls import Call
from simpletuner_layerprobe.probe.parts import Part
from simpletuner_layerprobe.probe.token_masks import RULES
from simpletuner_layerprobe.probe.tokens import Forward

VALUES = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.3, 0.5, math.nan, 0.7]])


def call(**arguments: object) -> Call:
    return Call(lambda self: None, (), arguments)


def test_readings_of_a_slice():
    part = Part(slice(0, 3))
    torch.testing.assert_close(part.last(VALUES), torch.tensor([0.6, math.nan]), equal_nan=True)
    torch.testing.assert_close(part.mean(VALUES), torch.tensor([0.3, math.nan]), equal_nan=True)
    valid = torch.tensor([[True, True, False], [False, True, False]])
    part = Part(slice(0, 3), valid)
    torch.testing.assert_close(part.last(VALUES), torch.tensor([0.6, math.nan]), equal_nan=True)
    torch.testing.assert_close(part.mean(VALUES), torch.tensor([0.15, 0.5]))
    torch.testing.assert_close(part.mean(VALUES, among_BS=VALUES > 0.15), torch.tensor([0.2, 0.5]))
    assert Part(slice(0, 3), torch.zeros(2, 3, dtype=torch.bool)).mean(VALUES).isnan().all()


def test_values_of_several_blocks_are_read_as_those_of_each():
    values_LBS = torch.stack([VALUES, 1 - VALUES, VALUES.flip(1)])
    valid = torch.tensor([[True, True, False], [False, True, False]])
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    for part in (Part(slice(0, 3)), Part(slice(1, 4), valid), Part(mask)):
        for among in (None, values_LBS > 0.15):
            each = [part.mean(values, None if among is None else among[i]) for i, values in enumerate(values_LBS)]
            torch.testing.assert_close(part.mean(values_LBS, among), torch.stack(each), equal_nan=True)
        torch.testing.assert_close(part.last(values_LBS), torch.stack([*map(part.last, values_LBS)]), equal_nan=True)
    packed_LBS = values_LBS[:, :1]  # both samples in one row
    expected = torch.stack([*map(Part(mask).last, packed_LBS)])
    torch.testing.assert_close(Part(mask).last(packed_LBS), expected, equal_nan=True)


def test_a_rule_is_asked_once_for_blocks_that_are_alike():
    """Of the same tokens and lengths, unless it looks at what the block itself got."""
    forward = Forward(call(encoder_attention_mask=torch.ones(2, 3)), {}, torch.ones(2, 3, dtype=torch.bool))
    for name, once in (("own_text_first", True), ("after_own_text", False)):
        parts = []
        for kept in (4, 3):
            forward.block = call(attention_mask=torch.arange(5).expand(2, -1) < kept)
            parts.append(forward.part(RULES[name], 5))
        assert (parts[0] is parts[1]) == once
        assert forward.part(RULES[name], 6 if once else 5) is not parts[0]
    assert [part.tokens.sum().item() for part in parts] == [2, 0]
    forward.lengths["text"] = 3
    first = forward.part(RULES["text_first"], 8)
    assert forward.part(RULES["text_first"], 8) is first and first.tokens == slice(0, 3)
    forward.lengths["text"], forward.text_mask_BS = 2, None
    assert forward.part(RULES["text_first"], 8).tokens == slice(0, 2)


def test_readings_of_a_mask():
    part = Part(torch.tensor([[True, False, True, False], [True, True, False, False]]))
    torch.testing.assert_close(part.readings(VALUES)["last"], torch.tensor([0.6, 0.5]))
    torch.testing.assert_close(part.readings(VALUES)["mean"], torch.tensor([0.35, 0.4]))
    torch.testing.assert_close(part.mean(VALUES, among_BS=VALUES > 0.15), torch.tensor([0.6, 0.4]))
    packed = part.readings(VALUES[:1])  # both samples in one row
    torch.testing.assert_close(packed["last"], torch.tensor([0.6, 0.2]))
    absent = Part(torch.tensor([[True, False, False, False], [False] * 4])).readings(VALUES)
    for reading in absent.values():
        torch.testing.assert_close(reading, torch.tensor([0.1, math.nan]), equal_nan=True)


def test_given_tokens_are_left_out():
    """Per-token timesteps: a given frame has 0; a sample that is given as a whole has no token left."""
    timestep = torch.tensor([[0.0, 0.0, 400.0, 400.0], [0.0, 0.0, 0.0, 0.0], [700.0] * 4])
    forward = Forward(call(timestep=timestep), {}, None)
    part = RULES["noised_tokens"](forward, 4)
    assert part.tokens.tolist() == [[False, False, True, True], [False] * 4, [True] * 4]
    last = part.last(torch.full((3, 4), 0.5))
    assert last[[0, 2]].tolist() == [0.5, 0.5] and last[1].isnan()
    assert RULES["noised_tokens"](Forward(call(timestep=timestep[:, 0]), {}, None), 4).tokens == slice(0, 4)
    one_each = RULES["noised_tokens"](Forward(call(timestep=torch.tensor([[300.0], [0.0]])), {}, None), 4)
    assert one_each.tokens.tolist() == [[True] * 4, [False] * 4]


def test_samples_without_the_stream_have_no_token():
    batch = {"latents": torch.zeros(2, 3), "audio_latent_mask": torch.tensor([1.0, 0.0])}
    part = RULES["tokens_of_audio"](Forward(call(), batch, None), 3)
    assert part.tokens.tolist() == [[True] * 3, [False] * 3]


def test_an_attention_mask_of_another_length_is_refused():
    with model_error("the denoiser's attention_mask is for 5 tokens and the hidden states have 4"):
        RULES["attended"](Forward(call(attention_mask=torch.ones(2, 5)), {}, None), 4)
