"""Numbers and names as the commands and the pages write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner_layerprobe.counts import counted as counted
from simpletuner_layerprobe.counts import samples_text as samples_text
from simpletuner_layerprobe.readings import WHOLE

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest


def model_name(manifest: Manifest) -> str:
    """SimpleTuner's names of the model, such as "sd3 large"; else its class, "" if nothing is known."""
    return " ".join(part for part in (manifest.family, manifest.flavour) if part) or manifest.model_class


def listed(names: Sequence[str]) -> str:
    """ "image", "image and text", "image, audio and text"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def block_range(numbers: Sequence[int]) -> str:
    """ "block 3", "blocks 3 to 7"."""
    return f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]} to {numbers[-1]}"


def blocks_text(numbers: Sequence[int]) -> str:
    """ "block 3", "blocks 0, 3 to 5 and 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"block{'s' * (len(numbers) > 1)} {listed([part for text in parts for part in text.split(', ')])}"


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
