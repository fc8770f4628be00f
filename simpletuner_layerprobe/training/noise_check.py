"""The invariant of every recorded number: the noise in a batch's latents is that of the sigma that is written down.

SimpleTuner has many options that change how noise is mixed in, and gets new ones. Whatever they are called, the noisy
latents y are a * x + b * e of the latents x and the noise e, and b / (a + b) is the share of noise. Least squares over
the elements of a sample gives a and b, and the recorded sigma says what the share has to be (`NoiseRule.share`).

How far apart may they be? SimpleTuner mixes in the dtype of the latents, bfloat16 as a rule, whose numbers are rounded
by up to U = 2^-8 of themselves.
- Sigma and 1 - sigma are rounded first. Where sigma is at least a half, 1 - sigma is exact then, and sigma is off by
  half of the spacing below 1, which is U / 2. Below a half, sigma is off by at most U / 4, and the rounding of
  1 - sigma changes the share by at most sigma * U / 2, which is U / 4 again. So the share is off by at most U / 2.
- The sum y is rounded. The smaller one of a * x and b * e can be lost in that, element by element: latents of 5 do not
  feel noise of 0.01. By the inequality of Cauchy and Schwarz that changes a by at most U * |y| / |x| and b by at most
  U * |y| / |e| (norms over the elements), and the share by at most U * |y| * (b / |x| + a / |e|) / (a + b)^2: by U
  where latents and noise have the same size, more where they do not.
- The products are rounded with no regard to each other. That averages out, and the residuals of the fit say how well:
  ERRORS standard errors of the fit are allowed for it.

Shape letters: B samples of the batch, E elements of one sample's latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.training.noise import NoiseRule

U = 2.0**-8
ERRORS = 6.0
TENSORS = ("noisy_latents", "latents", "noise")

# Families whose prepared batch does not have what the check needs, with the reason.
UNCHECKED = {"ace_step": "the batch of ace_step does not keep its noise"}


def how_checked(family: str) -> str:
    """What the manifest says of the check for this family."""
    if family in UNCHECKED:
        return f"none: {UNCHECKED[family]}"
    return "least squares of the noisy latents on latents and noise, every sample"


def noise_share(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of noise in the noisy latents of a batch, and how far off rounding may put it: both (B,) float32.

    Nothing waits for the device. Elements that SimpleTuner gives clean and takes out of the loss, such as a first
    frame, are left out. NaN for a sample without latents or noise. Raises SeamError naming what the batch lacks.
    """
    lacking = [name for name in TENSORS if not torch.is_tensor(batch.get(name))]
    if lacking:
        raise SeamError(
            f"the prepared batch has no {' and no '.join(lacking)}, so that its sigma cannot be checked; this "
            f"SimpleTuner prepares batches in another way than the layer probe knows"
        )
    noise = batch.get("input_noise")
    noised = batch.get("vision_loss_mask")
    parts = [batch["noisy_latents"], batch["latents"], batch["noise"] if noise is None else noise]
    y_BE, x_BE, e_BE = ((part if noised is None else part * noised).detach().float().flatten(1) for part in parts)
    count = y_BE.shape[1] if noised is None else noised.expand_as(batch["latents"]).float().flatten(1).sum(1)
    # Products and sums: a matrix product may be taken in TF32.
    xx, ee, xe = ((u * v).sum(1) for u, v in ((x_BE, x_BE), (e_BE, e_BE), (x_BE, e_BE)))
    yy, yx, ye = ((y_BE * v).sum(1) for v in (y_BE, x_BE, e_BE))
    determinant = xx * ee - xe * xe
    a, b = (yx * ee - ye * xe) / determinant, (ye * xx - yx * xe) / determinant
    explained = a * yx + b * ye
    variance = (yy - explained).clamp(min=0) / count
    error = (variance * explained / determinant).sqrt()
    lost = yy.sqrt() * (b.abs() / xx.sqrt() + a.abs() / ee.sqrt())
    return b / (a + b), U / 2 + (U * lost + ERRORS * error) / (a + b).square()


class NoiseCheck:
    """Compares every batch with its sigmas and keeps the worst of them on the device until it is asked."""

    def __init__(self, rule: NoiseRule, family: str) -> None:
        self._rule = rule
        self._checks = family not in UNCHECKED
        self._model: Any = None
        self._worst: torch.Tensor | None = None  # (1, 4): by how much it is too much, difference, sigma, share

    def add(self, model: Any, batch: Mapping[str, Any], sigma_B: torch.Tensor) -> None:
        """Compare one prepared batch. Raises SeamError if it lacks what that needs."""
        if not self._checks:
            return
        share_B, allowed_B = noise_share(batch)
        difference_B = (share_B - self._rule.share(model, sigma_B)).abs()
        rows = torch.stack([difference_B - allowed_B, difference_B, sigma_B, share_B], dim=1)
        rows = torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, -math.inf)
        rows = rows if self._worst is None else torch.cat([self._worst, rows])
        self._model = model
        self._worst = rows.index_select(0, rows[:, 0].argmax().reshape(1))

    def require(self) -> float | None:
        """The worst sample's difference from its sigma's share since `forget`; None if none could be compared.

        This waits for the device. Raises SeamError naming both sigmas if rounding does not explain the difference.
        """
        if self._worst is None:
            return None
        excess, difference, sigma, share = self._worst[0].tolist()
        if excess > 0:
            raise SeamError(
                f"the latents of a sample are mixed with noise at sigma {self._nearest(share):.3f}, and its batch says "
                f"sigma {sigma:.3f}; some option of this SimpleTuner changes the noise in a way that the layer probe "
                f"does not know: find it and switch it off"
            )
        return None if math.isinf(difference) else difference

    def forget(self) -> None:
        """Begin anew: the rows compared so far are written, or given up."""
        self._worst = None

    def _nearest(self, share: float) -> float:
        """The sigma whose share of noise is nearest to this one."""
        sigmas = torch.linspace(0, 1, 1001, dtype=torch.float32)
        return float(sigmas[(self._rule.share(self._model, sigmas) - share).abs().argmin()])
