"""Runs the fused kernel in Triton's interpreter on a CPU and saves what it gives, for test_record_fused.py.

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

from simpletuner_layerprobe.probe import angles_kernel as fused_kernel
from simpletuner_layerprobe.probe import fused
from simpletuner_layerprobe.probe.angles import plain_angles


def atan2(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    return tl.tensor(TensorHandle(np.arctan2(y.handle.data, x.handle.data), tl.float32), y.type)


def main(cases: str, out: str) -> None:
    fused_kernel.libdevice = SimpleNamespace(atan2=atan2)
    fused.DEVICES = ("cpu",)
    found = [fused_kernel.angles(before, after) for before, after in torch.load(cases)]
    # The check that a device has to pass before its kernel is used.
    bfloat16 = torch.bfloat16
    trusted = fused.fused_angles(torch.device("cpu"), bfloat16, bfloat16, plain_angles) is fused_kernel.angles
    differ = fused.difference(fused_kernel.angles, plain_angles, torch.device("cpu"), torch.float32, bfloat16)
    torch.save({"angles": found, "trusted": trusted, "difference": differ}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
