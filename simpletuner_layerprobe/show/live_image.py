"""A heatmap as a small picture, drawn in milliseconds: for trackers, while a run is being recorded.

Shape letters: T bins, L blocks, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
"""matplotlib's viridis at 17 even steps, as in all other figures; matplotlib itself takes half a second to import."""
COLOURS = tuple(tuple(bytes.fromhex(colour)) for colour in VIRIDIS.split())
EMPTY = (200, 200, 200)
MARGIN = 34
CELL_HEIGHT = 24
MAX_WIDTH = 1600


def live_image(title: str, mean_TL: NDArray[np.float64], count_T: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The heatmap with sigma 1 (noise) at the top and the first block on the left, (H, W, 3) uint8.

    The colours go from 0 to the largest mean, which the line above names. Bins without samples are grey.
    """
    from PIL import Image, ImageDraw

    L = mean_TL.shape[1]
    largest = float(mean_TL.max(initial=0.0))
    cell_width = max(1, min(28, MAX_WIDTH // L))
    cells = np.where((count_T > 0)[::-1, None, None], _colour(mean_TL[::-1] / (largest or 1.0)), EMPTY)
    body = np.kron(cells, np.ones((CELL_HEIGHT, cell_width, 1))).astype(np.uint8)
    height, width = body.shape[:2]
    picture = Image.new("RGB", (max(width + 2 * MARGIN, 420), height + 2 * MARGIN), "white")
    picture.paste(Image.fromarray(body), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 4), title, fill="black")
    draw.text((MARGIN, 18), f"0 (dark) to {largest:.4f} (bright), fractions of pi", fill="black")
    for sigma in (0.0, 0.5, 1.0):
        draw.text((6, MARGIN + (1 - sigma) * height - 6), f"{sigma:g}", fill="black")
    step = max(1, -(-40 // cell_width), -(-L // 20))
    for block in range(0, L, step):
        draw.text((MARGIN + block * cell_width, MARGIN + height + 2), str(block), fill="black")
    draw.text((MARGIN, MARGIN + height + 16), "block; sigma upwards", fill="black")
    return np.asarray(picture)


def _colour(share_TL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares in [0, 1] as (T, L, 3) of COLOURS, linear in between."""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(share_TL, steps, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
