"""Train the emoji pipeline from nothing: the VAE first, then the transformer together with its text encoders.

    python train_base.py --data emoji.npz --out base                       # nine minutes on one H200
    python train_base.py --data emoji.npz --out base --tiny --device cpu   # only to see that everything runs

Writes into --out: `pipeline/` (a StableDiffusion3Pipeline of 30 MB in diffusers' layout), `train.json` (settings and
numbers), `train.log` and `samples.png`.

The transformer sees the styles noto and twemoji. The style fluent and a tenth of the emoji are kept from it, so that a
fine-tuning has something to learn and something to be judged on. (The VAE sees fluent too, not the tenth.)

Needs torch, diffusers, transformers, tokenizers, numpy and Pillow, and no network.
"""

import os
import sys
import time

from base.settings import read_settings


def main() -> None:
    start = time.monotonic()
    settings = read_settings(__doc__)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from base.run import run  # the slow imports, after the clock has started

    run(settings, start)


if __name__ == "__main__":
    sys.exit(main())
