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

from simpletuner_layerprobe.probe import angles, angles_kernel

CPU = torch.device("cpu")
torch.set_num_threads(1)


def atan2(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    return tl.tensor(TensorHandle(np.arctan2(y.handle.data, x.handle.data), tl.float32), y.type)


def main(cases: str, out: str) -> None:
    angles_kernel.libdevice = SimpleNamespace(atan2=atan2)
    angles.KERNEL_DEVICES = ("cpu",)
    taken = [angles_kernel.angles(before, after) for before, after in torch.load(cases)]
    # The check that a device has to pass before its kernel is used.
    trusted = angles.device_kernel(CPU, torch.bfloat16, torch.bfloat16) is angles_kernel.angles
    differ = angles.difference(angles_kernel.angles, CPU, torch.float32, torch.bfloat16)
    torch.save({"angles": taken, "trusted": trusted, "difference": differ}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
