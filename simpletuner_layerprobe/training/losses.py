"""The loss of each sample: mean squared error of what the model predicts against the family's own target.

The family table names a rule for the target; which one a family follows was read in the `loss` of its `model.py` of
SimpleTuner 4.10.1. What SimpleTuner makes of it further (weights by noise level, Huber, masks of conditioning images)
is left out.

Shape letters: B samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Prediction:
    """One thing that a model predicts, and what it should have been, (B, ...) both.

    valid: what of it counts, 0 or 1, with as many dimensions; None if all does.
    """

    value: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor | None = None

    def loss(self) -> torch.Tensor:
        """(B,) float32 mean of the squared error over what counts; 0 for a sample of which nothing does."""
        squares_BN = self.counted(self.value.float() - self.target.float()).square()
        if self.valid is None:
            return squares_BN.mean(dim=1)
        valid_BN = self.valid.expand_as(self.value).flatten(1)
        return squares_BN.sum(dim=1) / valid_BN.sum(dim=1).clamp_min(1)

    def counted(self, values: torch.Tensor) -> torch.Tensor:
        """(B, N) values like the prediction's, one row for each sample, 0 for what does not count."""
        return (values if self.valid is None else values * self.valid).flatten(1)


Rule = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], list[Prediction]]


def _prediction(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
    return [Prediction(output["model_prediction"], model.get_prediction_target(batch))]


def _latents(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
    return [Prediction(output["model_prediction"], batch["latents"])]


def _song(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
    """ace_step: the clean latents, in its second layout the flow; frames after the song's end do not count."""
    value = output["model_prediction"]
    target = batch["flow_target"] if model._is_v15_layout_active() else batch["latents"]
    valid = batch.get("attention_mask")
    if valid is not None:
        valid = valid.unsqueeze(-1) if value.ndim == 3 else valid[:, None, None]
    return [Prediction(value, target, valid)]


def _last_frames(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
    """longcat_video: of frames that are given at the start nothing is predicted."""
    (video,) = _prediction(model, batch, output)
    return [Prediction(video.value, video.target[:, :, -video.value.shape[2] :])]


def _masked_video(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
    """cosmos3: frames that condition the others do not count."""
    video = Prediction(output["model_prediction"], batch["noise"] - batch["latents"], batch.get("vision_loss_mask"))
    return [video, *_audio(batch, output.get("audio_model_prediction"), 1)]


def _video_and_audio(sign: int) -> Rule:
    """Both where the batch has them; sign: 1 where the audio's target is noise - latents, -1 for the reverse."""

    def rule(model: Any, batch: Mapping[str, Any], output: Mapping[str, Any]) -> list[Prediction]:
        (video,) = _prediction(model, batch, output)
        valid = _for_each(batch.get("video_latent_mask"), video.value)
        denoised_BS = batch.get("video_loss_mask")
        if valid is None and denoised_BS is not None:
            valid = _of_tokens(denoised_BS, video.value)
        return [Prediction(video.value, video.target, valid), *_audio(batch, output.get("audio_prediction"), sign)]

    return rule


def _audio(batch: Mapping[str, Any], value: torch.Tensor | None, sign: int) -> list[Prediction]:
    if value is None:
        return []
    target = sign * (batch["audio_noise"] - batch["audio_latents"])
    return [Prediction(value, target, _for_each(batch.get("audio_latent_mask"), value))]


def _of_tokens(mask_BS: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """A mask of tokens, one or more latents wide and frame by frame, as one of the latents (B, 1, F, H, W)."""
    frames, height, width = video.shape[2:]
    side = round((frames * height * width / mask_BS.shape[1]) ** 0.5)
    mask = mask_BS.reshape(len(mask_BS), 1, frames, height // side, width // side)
    return mask.repeat_interleave(side, dim=3).repeat_interleave(side, dim=4)


def _for_each(has_B: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor | None:
    """Which samples have it, one number each, as a mask of the value."""
    if has_B is None or has_B.numel() != len(value):
        return None
    return (has_B.reshape(-1, *[1] * (value.ndim - 1)) > 0).to(value.device)


RULES: dict[str, Rule] = {
    "prediction": _prediction,
    "latents": _latents,
    "song": _song,
    "last_frames": _last_frames,
    "masked_video": _masked_video,
    "video_and_audio": _video_and_audio(1),
    "video_and_reversed_audio": _video_and_audio(-1),
}


def predictions(rule: str, model: Any, batch: Mapping[str, Any], output: Any) -> list[Prediction]:
    """What SimpleTuner's `model` predicted for a prepared batch, by the family's rule; [] if that cannot be told.

    batch: as it is after `model_predict`, which made `output` of it.
    """
    if not isinstance(output, Mapping) or not torch.is_tensor(output.get("model_prediction")):
        return []
    made = RULES[rule](model, batch, output)
    if any(not torch.is_tensor(part.target) or part.target.shape != part.value.shape for part in made):
        return []
    return made


def sample_losses(parts: Sequence[Prediction]) -> torch.Tensor:
    """(B,) float32: the loss of each sample, added up over what is predicted."""
    return torch.stack([part.loss() for part in parts]).sum(dim=0)


def relative_changes(plain: Sequence[Prediction], other: Sequence[Prediction]) -> torch.Tensor:
    """(B,) float32: |other - plain| / |plain| of the predictions of each sample, over all that is predicted."""
    pairs = [(before, after.value.float() - before.value.float()) for before, after in zip(plain, other, strict=True)]
    change_B = torch.stack([before.counted(change).square().sum(dim=1) for before, change in pairs]).sum(dim=0)
    norm_B = torch.stack([before.counted(before.value.float()).square().sum(dim=1) for before in plain]).sum(dim=0)
    return (change_B / norm_B).sqrt()
