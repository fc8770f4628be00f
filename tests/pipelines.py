"""Makes the tiny pipelines that the real SimpleTuner is run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"


def make_pipeline(script: Path, *arguments: object) -> None:
    """In a process of its own: diffusers and transformers warn a lot, and here warnings are errors."""
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{EXAMPLES}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
