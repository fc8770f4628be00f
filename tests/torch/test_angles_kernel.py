"""The fused kernel: exact in Triton's interpreter, compiled for every architecture, trusted only where it agrees."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import float64_angles, laid_out, states

from simpletuner_layerprobe.probe import angles as distance
from simpletuner_layerprobe.probe.angles import plain_angles, token_angles

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux only")

CPU = torch.device("cpu")
FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def tried_anew():
    distance.device_kernel.cache_clear()
    yield
    distance.device_kernel.cache_clear()


def test_exact_in_the_interpreter(tmp_path):
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases += [states(0, (2, 19, 300), size, dtype) for size in (1e-4, 100.0)]
        for shape in ((1, 1, 8), (2, 19, 300), (1, 3, 2432)):
            before, after = states(0, shape, 1.0, dtype)
            layouts = itertools.product((False, True), repeat=2)
            cases += [(laid_out(before, first), laid_out(after, second)) for first, second in layouts]
    before, after = states(1, (3, 40, 96), 0.3, torch.float32)
    cases.append((before[1:, 3:30], after[1:, 3:30]))  # a part of the tokens, as Flux's joint sequences have it
    cases.append((before, -before))
    before, after = before.clone(), after.clone()
    before[0, 1], after[0, 2], after[0, 3, 4] = 0, 0, torch.inf
    cases.append((before, after))
    torch.save(cases, tmp_path / "cases")
    script = Path(__file__).parent / "interpreted_kernel.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "cases", tmp_path / "taken"],
        capture_output=True,
        text=True,
        env=os.environ | {"SIMPLETUNER_LAYERPROBE": "0"},
    )
    assert done.returncode == 0, done.stderr
    taken = torch.load(tmp_path / "taken")
    assert taken["trusted"] and taken["difference"] < 5e-7
    for (before, after), angles in zip(cases[:-2], taken["angles"], strict=False):
        assert angles.dtype == torch.float32
        np.testing.assert_allclose(angles.numpy(), float64_angles(before, after), rtol=0, atol=2e-7)
    np.testing.assert_allclose(taken["angles"][-2].numpy(), 1, rtol=0, atol=1e-7)
    none = taken["angles"][-1]
    assert none[0, 1:4].isnan().all() and none.isnan().sum() == 3


@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # Triton's own parser
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_without_a_device(capability, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simpletuner_layerprobe.probe import angles_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled anew
    for by_width in (False, True):
        state = laid_out(torch.empty(1, 64, 2432), by_width)
        options = angles_kernel.launch(state, state)
        warps = options.pop("num_warps")
        signature = dict.fromkeys(angles_kernel._angles.arg_names, "i32") | dict.fromkeys(options, "constexpr")
        signature |= {"u_ptr": f"*{dtype}", "v_ptr": f"*{dtype}", "angle_ptr": "*fp32"}
        source = ASTSource(angles_kernel._angles, signature=signature, constexprs=options)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert len(made.asm["cubin"]) > 0


def tried(monkeypatch, angles) -> object:
    """What `device_kernel` makes of a kernel on a device that has one; here the CPU stands for it."""
    from simpletuner_layerprobe.probe import angles_kernel

    monkeypatch.setattr(distance, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(angles_kernel, "angles", angles)
    return distance.device_kernel(CPU, FLOAT32, FLOAT32)


def test_a_kernel_that_agrees_is_used(monkeypatch, caplog):
    calls = []

    def angles(u_BSD, v_BSD):
        calls.append(u_BSD.shape)
        return plain_angles(u_BSD, v_BSD) + 1e-7

    assert tried(monkeypatch, angles) is angles
    count = len(calls)
    assert distance.device_kernel(CPU, FLOAT32, FLOAT32) is angles and len(calls) == count  # tried once
    assert not caplog.records


@pytest.mark.parametrize(
    ("angles", "reason"),
    [
        (lambda u, v: plain_angles(u, v) + 3e-6, "its angles differ by 3e-06"),
        (lambda u, v: plain_angles(u, v).nan_to_num(0.5), "its angles differ by inf"),
        (lambda u, v: plain_angles(u.contiguous().flip(-1), v), "its angles differ by"),
        (lambda u, v: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_that_does_not_agree_is_not_used(monkeypatch, caplog, angles, reason):
    assert tried(monkeypatch, angles) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("layerprobe: the fused kernel is not used on cpu, steps take a little longer")
    assert reason in record.getMessage()


def test_without_triton_the_plain_operations_do(monkeypatch, caplog):
    monkeypatch.setattr(distance, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "simpletuner_layerprobe.probe.angles_kernel", None)
    assert distance.device_kernel(CPU, FLOAT32, FLOAT32) is None
    assert "fused kernel is not used" in caplog.records[0].getMessage()


def test_the_kernel_can_be_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE_KERNEL", "0")
    assert tried(monkeypatch, plain_angles) is None and not caplog.records
    distance.device_kernel.cache_clear()
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE_KERNEL", "1")
    assert tried(monkeypatch, plain_angles) is plain_angles
    assert distance.device_kernel(torch.device("meta"), FLOAT32, FLOAT32) is None  # another kind of device


def test_other_devices_take_the_kernel_or_the_plain_operations(monkeypatch):
    """The choice, on torch's device without data."""
    state, result = torch.empty(2, 5, 8, device="meta"), torch.zeros(2, 5)
    kernels = {(state.device, FLOAT32, FLOAT32): None}
    monkeypatch.setattr(distance, "device_kernel", lambda *asked: kernels[asked])
    assert token_angles(state, state).shape == (2, 5)
    kernels = dict.fromkeys(kernels, lambda u_BSD, v_BSD: result)
    assert token_angles(state, state) is result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_plain_operations_are_exact(size, dtype, monkeypatch):
    """What a device without the kernel does, here by a CPU with the other devices' pieces and with small ones."""
    before, after = states(0, (2, 333, 96), size, dtype)
    for elements in (distance.CHUNK_ELEMENTS_DEVICE, 96 * 100):
        monkeypatch.setitem(distance.CHUNK_ELEMENTS, "cpu", elements)
        np.testing.assert_allclose(
            plain_angles(before, after).numpy(), float64_angles(before, after), rtol=0, atol=2e-7
        )
    assert math.isclose(float(plain_angles(before, -before).min()), 1, abs_tol=1e-7)
