"""Merge an adapter into the weights of a diffusers SD3 transformer, by LyCORIS's own means.

python tests/merge_lycoris.py TRANSFORMER LYCORIS_CONFIG ADAPTER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(transformer: str, config_path: str, adapter: str) -> None:
    from diffusers import SD3Transformer2DModel
    from lycoris import LycorisNetwork, create_lycoris

    config = json.loads(Path(config_path).read_text())
    model = SD3Transformer2DModel.from_pretrained(transformer)
    LycorisNetwork.apply_preset(config.pop("apply_preset"))
    numbers = [config.pop(name) for name in ("multiplier", "linear_dim", "linear_alpha")]
    network = create_lycoris(model, *numbers, **config)
    network.apply_to()
    assert network.load_weights(adapter) == {}
    network.merge_to(1.0)
    network.restore()
    model.save_pretrained(transformer)


if __name__ == "__main__":
    main(*sys.argv[1:])
