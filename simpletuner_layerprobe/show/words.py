"""Numbers and names as the commands and the pages write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner_layerprobe.readings import WHOLE

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest


def model_name(manifest: Manifest) -> str:
    """SimpleTuner's names of the model, such as "sd3 large"; else its class, "" if nothing is known."""
    return " ".join(part for part in (manifest.family, manifest.flavour) if part) or manifest.model_class


def counted(count: int, noun: str) -> str:
    """ "1 block", "1,455 blocks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def samples_text(samples: int, images: int | None) -> str:
    """ "2,000 samples of 60 images"; without the images where they are not known."""
    return counted(samples, "sample") + (f" of {counted(images, 'image')}" if images is not None else "")


def listed(names: Sequence[str]) -> str:
    """ "image", "image and text", "image, audio and text"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def block_range(numbers: Sequence[int]) -> str:
    """ "block 3", "blocks 3 to 7"."""
    return f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]} to {numbers[-1]}"


def capital(text: str) -> str:
    """With a capital letter, for a sentence of its own."""
    return text[:1].upper() + text[1:]


def share_text(share: float) -> str:
    """A share rounded down: "100%" means every single replicate."""
    return f"{math.floor(share * 100 + 1e-9)}%"


def stream_text(stream: str) -> str:
    """Where a stream's numbers are: "in the text stream", or "of whole blocks"."""
    return "of whole blocks" if stream == WHOLE else f"in the {stream} stream"


def size_text(size_bytes: int) -> str:
    """A size in decimal units, as disks and model pages give it: "1.53 GB"."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
