from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, randomised, taped_forwards
from torch import nn

TEXT = 11
# Each sample's text is followed by its image at once: there is no padding between them.
VALID = [4, TEXT]
MASK = torch.tensor([[1.0] * count + [0.0] * (TEXT - count) for count in VALID])
IMAGE = 3 * 5
PATHS = [f"layers.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.lumina2.transformer import Lumina2Transformer2DModel

    return randomised(
        Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            hidden_size=48,
            num_layers=len(PATHS),
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(30, 32, 32),
            cap_feat_dim=20,
        )
    )


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 16, 6, 10),
        "prompt_embeds": torch.randn(BATCH, TEXT, 20) * MASK[..., None],
        "encoder_attention_mask": MASK,
        "data_backend_id": "photographs",
        "prompts": ["a", "b"],
    }


def equal_batch(dtype: torch.dtype) -> dict[str, Any]:
    """Texts of one length: the blocks get no attention mask."""
    return raw_batch(dtype) | {"encoder_attention_mask": torch.tensor([[1.0] * 7 + [0.0] * (TEXT - 7)] * BATCH)}


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.lumina2.transformer import Lumina2TransformerBlock

    return taped_forwards(model, (Lumina2TransformerBlock,))


def reference(lengths: list[int]) -> Any:
    def compare(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
        for path in PATHS:
            (crossing,) = tape.of(path)
            assert crossing.arguments["hidden_states"].shape[1] == max(lengths) + IMAGE
        return {
            "image": joint(tape, PATHS, "hidden_states", [(count, count + IMAGE) for count in lengths]),
            "text": joint(tape, PATHS, "hidden_states", [(0, count) for count in lengths]),
        }

    return compare


CASES = [
    Case(
        family="lumina2",
        flavour="2.0",
        denoiser=denoiser,
        raw_batch=batch,
        tape=tape,
        reference=reference(lengths),
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=lambda prepared: prepared["timesteps"] / 1000,
        label=label,
    )
    for label, batch, lengths in (("2.0", raw_batch, VALID), ("2.0 equal texts", equal_batch, [7] * BATCH))
]
