"""Runs the kernel in Triton's interpreter on a CPU and saves what it gives, for test_angles_kernel.py.

The interpreter does everything but libdevice's functions; numpy's arctan2 stands for the one that the kernel calls.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from simpletuner_layerprobe.probe import angles_kernel, distances

CPU = torch.device("cpu")
torch.set_num_threads(1)


def atan2(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    return tl.tensor(TensorHandle(np.arctan2(y.handle.data, x.handle.data), tl.float32), y.type)


def main(cases: str, out: str) -> None:
    angles_kernel.libdevice = SimpleNamespace(atan2=atan2)
    angles_kernel.PROGRAMS = 2  # so that few tokens are in lines, half lines and sectors
    distances.KERNEL_DEVICES = ("cpu",)
    given = torch.load(cases)
    taken = [angles_kernel.changes(before, after, updates=True) for before, after in given["cases"]]
    earlier = [angles_kernel.changes(before, after, True, further) for after, before, *further in given["earlier"]]
    # The check that a device has to pass before its kernel is used.
    differ = [
        distances.difference(angles_kernel.changes, CPU, (300, tokens), (dtype, before), (torch.bfloat16, after), True)
        for tokens, dtype, before, after in (
            (192, torch.float32, False, True),
            (64, torch.float32, True, True),
            (192, torch.bfloat16, False, False),
        )
    ]
    state = torch.randn(2, 3, 300)
    trusted = distances.token_changes(state, state, updates=False)
    torch.save({"changes": taken, "earlier": earlier, "difference": max(differ), "trusted": len(trusted) == 1}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
