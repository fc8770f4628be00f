"""SimpleTuner's own server, started as `simpletuner server ...` does it.

Its job queue waits for a GPU. On a machine without one, this gives the queue the processor as its only device, so that
a job starts at all; everything else is SimpleTuner's.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    os.environ["SIMPLETUNER_SKIP_TORCH"] = "1"  # as its command line sets it
    from simpletuner.simpletuner_sdk.server.services import local_gpu_allocator

    detect = local_gpu_allocator.detect_gpu_inventory

    def at_least_one() -> dict[str, Any]:
        inventory: dict[str, Any] = detect()
        if not inventory["devices"]:
            inventory |= {"devices": [{"index": 0, "id": 0, "name": "processor"}], "count": 1}
        return inventory

    local_gpu_allocator.detect_gpu_inventory = at_least_one
    from st_cli import main as simpletuner

    sys.argv[0] = "simpletuner"
    sys.exit(simpletuner())


if __name__ == "__main__":
    main()
