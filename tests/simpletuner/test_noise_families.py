"""A noise seed with every model family of SimpleTuner: all that is drawn is fixed, or the family is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from simpletuner_layerprobe.probe.families import FAMILIES

SCRIPT = Path(__file__).parent / "families" / "fixed.py"
# Cases that draw in another way than for single samples, or in their forward.
REFUSED = {
    ("ace_step", "base"): "dropout in its forward",
    ("infinitetalk", "single-14b-480p"): "randn of shape (1, 9, 2, 16) while it prepares a batch",
    ("ltxvideo2", "dev, first frame given"): "rand in its forward",
    ("ltxvideo2", "dev, still image given as first frame"): "rand in its forward",
    ("ltxvideo2", "dev, still image given as prefix"): "rand in its forward",
    ("stable_cascade", "stage-c"): "dropout in its forward",
    ("wan", "ti2v-5b-2.2"): "randn in its forward",
    ("wan", "ti2v-5b-2.2, all given"): "randn in its forward",
}


def test_every_draw_of_every_family_is_fixed_or_refused() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "SIMPLETUNER_LAYERPROBE": "0"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["family"] for line in lines} == {family.name for family in FAMILIES}
    assert [line for line in lines if line.get("different")] == []
    errors = {(line["family"], line["label"]): line["error"] for line in lines if "error" in line}
    assert errors == {
        (family, label): f"model family {family!r} draws by {what}, which no seed of a sample can fix; leave "
        f"layerprobe_noise_seed out for this family"
        for (family, label), what in REFUSED.items()
    }
