"""Tiny random models of diffusers' own classes with one batch of inputs, and their states at the block boundaries.

The states are copied by another mechanism than the observer's hooks: the `forward` of the blocks' class is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from small import float64_angles
from torch import nn

BATCH, TEXT, IMAGE = 2, 7, 15


@dataclass
class Model:
    """inputs: those besides the text and the timestep that all models get, or in their place. streams: of each stream
    the lists of blocks and what of them: (paths, argument, result). valid_BS: which of its tokens are no padding.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    streams: dict[str, list[tuple[list[str], str, int | None]]]
    valid_BS: dict[str, np.ndarray] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
        """The model with all parameters drawn anew, so that gates that start at zero do not hide the blocks."""
        torch.manual_seed(0)
        model = self.make()
        text_BSD = torch.randn(BATCH, TEXT, 12)
        inputs = {"encoder_hidden_states": text_BSD, "timestep": torch.tensor([200, 700])} | self.inputs()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
        floats = {name: value.to(dtype) if _is_float(value) else value for name, value in inputs.items()}
        return model.to(dtype), floats

    def paths(self, stream: str) -> tuple[str, ...]:
        return tuple(path for paths, _, _ in self.streams[stream] for path in paths)

    def expected(self, crossings: dict[str, Crossing], stream: str) -> dict[str, np.ndarray]:
        """ "last" and "mean" of the forward that these crossings are of, (B, L) float64."""
        last, mean = [], []
        for paths, argument, result in self.streams[stream]:
            for path in paths:
                before, after = crossings[path].arguments[argument], crossings[path].output
                angle_BS = float64_angles(before, after if result is None else after[result])
                valid_BS = self.valid_BS.get(stream, np.ones(angle_BS.shape, dtype=bool))
                samples = [angle_S[valid_S] for angle_S, valid_S in zip(angle_BS, valid_BS, strict=True)]
                last.append([angle_S[-1] for angle_S in samples])
                mean.append([angle_S.mean() for angle_S in samples])
        return {"last": np.array(last).T, "mean": np.array(mean).T}


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


@dataclass
class Crossing:
    """The last run of a block: its arguments by name and what came out, all tensors cloned."""

    arguments: dict[str, Any]
    output: Any


def cloned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(cloned, value))
    return value.detach().clone() if torch.is_tensor(value) else value


@contextmanager
def taped(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Crossing]]:
    """Crossing by block path; blocks that run again have their last."""
    crossings: dict[str, Crossing] = {}
    names = {id(model.get_submodule(path)): path for path in paths}

    def taping(forward: Callable[..., Any]) -> Any:
        signature = inspect.signature(forward)

        def replacement(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs).arguments
            arguments = {name: cloned(value) for name, value in bound.items() if name != "self"}
            output = forward(self, *args, **kwargs)
            if id(self) in names:
                crossings[names[id(self)]] = Crossing(arguments, cloned(output))
            return output

        replacement.__signature__ = signature
        return replacement

    with ExitStack() as stack:
        for kind in {type(model.get_submodule(path)) for path in paths}:
            forward = kind.forward
            kind.forward = taping(forward)
            stack.callback(setattr, kind, "forward", forward)
        yield crossings


def numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{number}" for number in range(count)]


VALID = np.array([[True] * TEXT, [True] * 4 + [False] * (TEXT - 4)])
DOUBLE, SINGLE = numbered("transformer_blocks", 3), numbered("single_transformer_blocks", 2)
UNET = [
    *numbered("down_blocks.1.attentions.0.transformer_blocks", 2),
    *numbered("mid_block.attentions.0.transformer_blocks", 2),
    *numbered("up_blocks.0.attentions.0.transformer_blocks", 2),
    *numbered("up_blocks.0.attentions.1.transformer_blocks", 2),
]

MODELS = {
    "SD3Transformer2DModel": Model(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=len(DOUBLE),
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 6, 10),
            "pooled_projections": torch.randn(BATCH, 10),
        },
        # The last block does not update the text.
        {"image": [(DOUBLE, "hidden_states", 1)], "text": [(DOUBLE[:-1], "encoder_hidden_states", 0)]},
    ),
    "FluxTransformer2DModel": Model(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=len(DOUBLE),
            num_single_layers=len(SINGLE),
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda: {
            "hidden_states": torch.randn(BATCH, IMAGE, 16),
            "pooled_projections": torch.randn(BATCH, 10),
            "timestep": torch.tensor([0.2, 0.7]),
            "guidance": torch.tensor([3.5, 3.5]),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(5.0)),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        {
            "image": [(DOUBLE, "hidden_states", 1), (SINGLE, "hidden_states", 1)],
            "text": [(DOUBLE, "encoder_hidden_states", 0), (SINGLE, "encoder_hidden_states", 0)],
        },
    ),
    "QwenImageTransformer2DModel": Model(
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=len(DOUBLE),
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(8, 4, 4),
        ),
        lambda: {
            "hidden_states": torch.randn(BATCH, IMAGE, 16),
            "encoder_hidden_states_mask": torch.from_numpy(VALID).long(),
            "timestep": torch.tensor([0.2, 0.7]),
            "img_shapes": [[(1, 3, 5)]] * BATCH,
        },
        {"image": [(DOUBLE, "hidden_states", 1)], "text": [(DOUBLE, "encoder_hidden_states", 0)]},
        {"text": VALID},
    ),
    "WanTransformer3DModel": Model(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        ),
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 6, 10),
        },
        {"image": [(numbered("blocks", 3), "hidden_states", None)]},
    ),
    "PixArtTransformer2DModel": Model(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=len(DOUBLE),
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=12,
        ),
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 6, 10),
            "encoder_attention_mask": torch.from_numpy(VALID).float(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        {"image": [(DOUBLE, "hidden_states", None)]},
    ),
    "UNet2DConditionModel": Model(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 10,
            cross_attention_dim=12,
            norm_num_groups=4,
            use_linear_projection=True,
        ),
        lambda: {
            "sample": torch.randn(BATCH, 4, 8, 12),
            "added_cond_kwargs": {"text_embeds": torch.randn(BATCH, 10), "time_ids": torch.randn(BATCH, 6)},
        },
        {"image": [(UNET, "hidden_states", None)]},
    ),
}
