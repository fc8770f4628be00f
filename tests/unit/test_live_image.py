from __future__ import annotations

import matplotlib
import numpy as np

from simpletuner_layerprobe.show.live_image import CELL_HEIGHT, EMPTY, MARGIN, live_image


def test_cells_have_viridis_colours_with_noise_at_the_top():
    mean_TL = np.linspace(0, 0.5, 40).reshape(10, 4)
    count_T = np.arange(10)  # the bin next to sigma 0 is empty
    picture = live_image("title", mean_TL, count_T)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    centre = MARGIN + CELL_HEIGHT // 2
    for t in range(10):
        row = centre + (9 - t) * CELL_HEIGHT
        for block in range(4):
            found = picture[row, MARGIN + 14 + 28 * block].astype(int)
            viridis = np.array(matplotlib.colormaps["viridis"](mean_TL[t, block] / 0.5)[:3]) * 255
            if t == 0:
                assert tuple(found) == EMPTY
            else:
                assert abs(found - viridis).max() < 7


def test_a_thousand_blocks_and_a_run_of_zeros_are_drawn():
    assert live_image("title", np.full((10, 1000), 0.2), np.ones(10, dtype=np.int64)).shape[1] < 1700
    assert live_image("title", np.zeros((10, 1)), np.zeros(10, dtype=np.int64)).shape[1] == 420
