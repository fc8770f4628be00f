"""What SimpleTuner's batch says of each sample, beside the noise: facts of run/rows.py.

All of it is on the host already; the device is not asked.

Shape letters: B samples of the batch, S text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from simpletuner_layerprobe.run.rows import UNKNOWN, image_hash

HOST_FACTS = (
    "image",
    "caption_words",
    "caption_characters",
    "width",
    "height",
    "crop_top",
    "crop_left",
    "dropped",
    "backend",
)


def text_mask(prepared_batch: Mapping[str, Any], count: int) -> torch.Tensor | None:
    """True for the valid text tokens, (B, S); None if the batch has no mask with a row for each of `count` samples."""
    mask: Any = prepared_batch.get("encoder_attention_mask")
    if not torch.is_tensor(mask) or mask.shape[0] != count:
        return None
    return mask.reshape(mask.shape[0], -1) > 0.5


def sample_facts(prepared_batch: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """The facts of `count` samples that SimpleTuner keeps on the host: name -> B values, UNKNOWN where it does not.

    The caption is the one that the model got: empty where it was dropped. The crop's origin is what SimpleTuner keeps
    of it, which for random crops is the middle of where they may begin.
    """
    backend = str(prepared_batch.get("data_backend_id") or "")
    facts = {name: [UNKNOWN[name]] * count for name in HOST_FACTS} | {"backend": [backend] * count}
    paths = prepared_batch.get("filepaths") or []
    if len(paths) == count:
        facts["image"] = [image_hash(backend, str(path)) for path in paths]
        sizes = [_size_and_crop(str(path), backend) for path in paths]
        for number, name in enumerate(("width", "height", "crop_top", "crop_left")):
            facts[name] = [size[number] for size in sizes]
    prompts = prepared_batch.get("prompts")
    if isinstance(prompts, list) and len(prompts) == count and all(isinstance(prompt, str) for prompt in prompts):
        facts["caption_words"] = [len(prompt.split()) for prompt in prompts]
        facts["caption_characters"] = [len(prompt) for prompt in prompts]
        facts["dropped"] = [int(not prompt) for prompt in prompts]
    return facts


def _size_and_crop(path: str, backend: str) -> tuple[int, int, int, int]:
    """Width, height, and the crop's top and left, in pixels; 0, 0, -1, -1 where SimpleTuner does not know."""
    from simpletuner.helpers.training.state_tracker import StateTracker

    metadata = StateTracker.get_metadata_by_filepath(path, data_backend_id=backend) or {}
    width, height = metadata.get("target_size") or (0, 0)
    top, left = metadata.get("crop_coordinates") or (-1, -1)
    return int(width), int(height), int(top), int(left)
