from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, randomised
from torch import nn

TEXT = 9
IMAGE = 3 * 5
REFERENCE = 2 * 4
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.longcat_image.transformer import LongCatImageTransformer2DModel

    return randomised(
        LongCatImageTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=len(DOUBLE),
            num_single_layers=len(SINGLE),
            attention_head_dim=24,
            num_attention_heads=2,
            joint_attention_dim=20,
            pooled_projection_dim=20,
            axes_dims_rope=[8, 8, 8],
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    # The family's prompts have no mask.
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20),
        "encoder_attention_mask": None,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def edit_batch(dtype: torch.dtype) -> dict[str, Any]:
    return raw_batch(dtype) | {"conditioning_latents": [torch.randn(BATCH, 16, 4, 8)]}


@contextmanager
def tape(model: nn.Module) -> Iterator[Tape]:
    """The forward never calls a block: the joint states are what its norm layers get.

    After the last block only the image is seen, by the last norm; the text after it is the residual of the block's
    last projection, which the tape adds up itself.
    """
    states: list[torch.Tensor] = []
    handles = []

    def keep(module: nn.Module, *, joined: bool = False) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            states.append(torch.cat([states.pop(), args[0]], dim=1) if joined else args[0].clone())

        handles.append(module.register_forward_pre_hook(hook))

    for block in model.transformer_blocks:
        # The image's norm runs first and the text's second; order them as [image | text].
        keep(block.norm1.norm)
        keep(block.norm1_context.norm, joined=True)
    for block in model.single_transformer_blocks:
        keep(block.norm.norm)
    last = model.single_transformer_blocks[-1]
    update: dict[str, torch.Tensor] = {}

    def gate(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        # With references there is a timestep for each token.
        update["gate"] = output.reshape(BATCH, -1, output.shape[-1]).chunk(3, dim=-1)[2]

    def project(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        states.append(states[-1] + update["gate"] * output)

    handles.append(last.norm.linear.register_forward_hook(gate))
    handles.append(last.proj_out.register_forward_hook(project))
    result = Tape()
    result.states = states  # type: ignore[attr-defined]
    result.seen = []  # type: ignore[attr-defined]
    handles.append(
        model.norm_out.norm.register_forward_pre_hook(lambda _, args: result.seen.append(args[0].clone()))  # type: ignore[attr-defined]
    )
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, references: int = 0
) -> dict[str, StreamReference]:
    states = tape.states  # type: ignore[attr-defined]
    tokens = TEXT + IMAGE + references
    assert [one.shape[1] for one in states] == [tokens] * 6
    assert torch.equal(states[-1][:, TEXT:], tape.seen[0])  # type: ignore[attr-defined]
    turned = [torch.cat([one[:, -TEXT:], one[:, :-TEXT]], dim=1) for one in states[: len(DOUBLE)]]
    states = turned + states[len(DOUBLE) :]
    streams: dict[str, StreamReference] = {}
    for stream, (start, stop) in (("image", (TEXT, TEXT + IMAGE)), ("text", (0, TEXT))):
        streams[stream] = []
        for path, before, after in zip(DOUBLE + SINGLE, states[:-1], states[1:], strict=True):
            angle_BS = angles(before, after)
            streams[stream].append((path, [(angle_BS[b, start:stop], None) for b in range(BATCH)]))
    return streams


CASES = [
    Case(
        family="longcat_image",
        flavour=flavour,
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=compare,
        blocks={"image": 5, "text": 5},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
    )
    for flavour, batch, compare in (
        ("final", raw_batch, reference),
        ("edit", edit_batch, partial(reference, references=REFERENCE)),
    )
]
