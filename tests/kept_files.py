"""Pictures that tests leave behind to be looked at: in the folder that LAYERPROBE_ARTEFACTS names, else artefacts/."""

from __future__ import annotations

import os
from pathlib import Path


def artefact(name: str) -> Path:
    folder = Path(os.environ.get("LAYERPROBE_ARTEFACTS") or Path(__file__).parent.parent / "artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
