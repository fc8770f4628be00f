"""All pictures on the device, and batches of them as the models see them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESOLUTION = 128


class Pictures:
    def __init__(self, images: np.ndarray, device: torch.device):
        """`images`: (N, 64, 64, 3) uint8."""
        self.images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) from -1 to 1. With a generator each is moved by up to 6% and drawn at 88 to 104% of its size."""
        count, device = len(index), index.device
        darkness = self.images[index].float() / 127.5 - 2  # 0 is white, which is also what lies outside the picture
        placement = torch.zeros(count, 2, 3, device=device)
        placement[:, 0, 0] = placement[:, 1, 1] = 1
        if generator is not None:
            x, y, size = torch.rand(3, count, device=device, generator=generator)
            placement[:, 0, 0] = placement[:, 1, 1] = 1 / (0.88 + 0.16 * size)
            placement[:, 0, 2], placement[:, 1, 2] = (2 * x - 1) * 0.12, (2 * y - 1) * 0.12
        grid = F.affine_grid(placement, [count, 3, RESOLUTION, RESOLUTION], align_corners=False)
        return (F.grid_sample(darkness, grid, mode="bicubic", align_corners=False) + 1).clamp(-1, 1)
