"""The fused kernel: exact in Triton's interpreter, compiled for every architecture, trusted only where it agrees."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import float64_angles, float64_updates, laid_out, states

from simpletuner_layerprobe.probe import angles as plain
from simpletuner_layerprobe.probe import distances
from simpletuner_layerprobe.probe.angles import plain_angles
from simpletuner_layerprobe.probe.distances import token_angles, token_changes
from simpletuner_layerprobe.probe.updates import token_updates

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux only")

CPU = torch.device("cpu")
FLOAT32 = torch.float32
ROWS = (FLOAT32, True)
SIZE = (96, 256)
LAYOUTS = list(itertools.product((False, True), repeat=2))


@pytest.fixture(autouse=True)
def tried_anew():
    yield
    distances.device_kernel.cache_clear()
    distances._warn.cache_clear()


def test_exact_in_the_interpreter(tmp_path):
    shapes = ((1, 1, 8), (2, 35, 300), (2, 3, 1111), (1, 3, 2432), (1, 2, 3072), (1, 2, 5120), (1, 1, 8200))
    cases = []
    for dtype, layouts in ((torch.bfloat16, LAYOUTS), (FLOAT32, LAYOUTS[::2]), (torch.float16, LAYOUTS[1::2])):
        for (number, shape), (first, second) in itertools.product(enumerate(shapes), layouts):
            size = (1e-2, 1.0, 100.0)[number % 3]
            before, after = states(number, shape, size, dtype)
            cases.append((laid_out(before, first), laid_out(after, second)))
    before, after = states(1, (3, 40, 96), 0.3, torch.float32)
    cases.append((before[1:, 3:30], after[1:, 3:30]))  # a part of the tokens, as Flux's joint sequences have it
    # One number is most of a state, and the first numbers change otherwise: read a second time.
    before, after = states(2, (1, 4, 300), 0.01, torch.float32)
    after = 3 * after
    before[..., -1] = after[..., -1] = 2e4
    cases += [(before, after), (laid_out(before, True), laid_out(after, True))]
    exact = len(cases)
    for by_width in (False, True):
        before, after = (laid_out(state, by_width) for state in states(1, (1, 40, 96), 0.3, torch.float32))
        cases += [(before, before), (before, -before), (before, 3 * before)]
        before, after = before.clone(), after.clone()
        before[0, 1], after[0, 2], after[0, 3, 4], before[0, 4, 90] = 0, 0, torch.inf, torch.nan
        before[0, 5, :64] = 0  # no stretch of the first numbers
        cases.append((before, after))
    earlier = []
    for by_width in (False, True):
        earlier.append([laid_out(states(seed, (2, 5, 96), 0.3, torch.bfloat16)[0], by_width) for seed in range(7)])
    torch.save({"cases": cases, "earlier": earlier}, tmp_path / "cases")
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
    for (before, after), (angles, norms, cosines) in zip(cases[:exact], taken["changes"], strict=False):
        assert angles.dtype == norms.dtype == cosines.dtype == torch.float32
        np.testing.assert_allclose(angles.numpy(), float64_angles(before, after), rtol=0, atol=2e-7)
        norm_BS, cosine_BS = float64_updates(before, after)
        np.testing.assert_allclose(norms.numpy(), norm_BS, rtol=1e-6, atol=0)
        np.testing.assert_allclose(cosines.numpy(), cosine_BS, rtol=0, atol=5e-7)
    for (after, before, *further), (angles, *spans) in zip(earlier, taken["earlier"], strict=True):
        for state, angles_BS in zip((before, *further), (angles, *spans[2:]), strict=True):
            np.testing.assert_allclose(angles_BS.numpy(), float64_angles(state, after), rtol=0, atol=2e-7)
        for value, expected in zip(spans[:2], float64_updates(before, after), strict=True):
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=5e-7)
    for number in (exact, exact + 4):
        same, opposite, longer, broken = taken["changes"][number : number + 4]
        for values, expected in ((same, (0, 0, math.nan)), (opposite, (1, 2, -1)), (longer, (0, 2, 1))):
            for value, number_expected in zip(values, expected, strict=True):
                np.testing.assert_allclose(value.numpy(), number_expected, rtol=3e-7, atol=2e-7)
        before, after = cases[number + 3]
        assert broken[0].isnan()[0].nonzero().flatten().tolist() == [1, 2, 3, 4]
        np.testing.assert_allclose(broken[0][0, 5:], float64_angles(before[0, 5:], after[0, 5:]), rtol=0, atol=2e-7)
        torch.testing.assert_close(broken[1:], token_updates(before, after), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("samples", "tokens", "size", "taken"),
    [
        (1, 231, 2, 16),
        (1, 1024, 2, 16),
        (1, 4096, 2, 32),
        (1, 8191, 2, 32),
        (4, 4096, 2, 64),
        (1, 32760, 2, 64),
        (1, 1024, 4, 16),
        (1, 4096, 4, 32),
    ],
)
def test_whole_lines_are_read_where_that_leaves_programs_enough(samples, tokens, size, taken):
    from simpletuner_layerprobe.probe import angles_kernel

    state = torch.empty(samples, 2432, tokens, dtype={2: torch.bfloat16, 4: FLOAT32}[size], device="meta").mT
    shape = angles_kernel.launch(state, state)
    assert shape["TOKENS"] == taken and shape["TOKENS"] * shape["WIDTH"] == 2048
    assert 32 <= taken * size <= 128  # from a sector to a line
    on_the_way = 2 * size * 2048 * (shape["STAGES"] - 1)
    assert on_the_way == 32 * 1024
    if samples * tokens >= 4096:
        assert on_the_way * samples * -(-tokens // taken) > 3e6  # Little's law for 4.3 TB/s and 0.7 us


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and shared memory of a compiled kernel, by NVIDIA's own tool."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}


@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # Triton's own parser
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT32])
def test_compiles_without_a_device_and_without_spills(capability, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simpletuner_layerprobe.probe import angles_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled anew
    short = {torch.bfloat16: "*bf16", FLOAT32: "*fp32"}[dtype]
    names = angles_kernel._changes.arg_names
    launches = []
    for width, tokens, updates, layout in (
        (300, 64, True, (False, False)),
        (2432, 64, False, (False, False)),
        (2432, 64, True, (False, False)),
        (5120, 64, True, (False, False)),
        (9216, 64, True, (False, False)),
        (2432, 64, True, (True, False)),
        (2432, 1024, True, (True, True)),
        (2432, 4096, False, (True, True)),
        (5120, 32760, True, (True, True)),  # by 8, as the tokens of a video
    ):
        before, after = (
            laid_out(torch.empty(1, tokens, width, dtype=dtype, device="meta"), by_width) for by_width in layout
        )
        constants = angles_kernel.launch(before, after) | {"UPDATES": updates}
        launches.append(tuple(constants.values()))
        options = {"num_warps": constants.pop("num_warps")}
        values = dict(zip(names[3:], (3, tokens, width, *before.stride(), *after.stride()), strict=False))
        constants |= {name: 1 for name, value in values.items() if value == 1}
        pointers = {"u_ptrs": (short,) * angles_kernel.STATES, "v_ptr": short, "out_ptr": "*fp32"}
        signature = pointers | dict.fromkeys(names[3:], "i32")
        # As Triton itself notes it when it sees the values.
        sixteenth = [(0, state) for state in range(angles_kernel.STATES)] + [
            (n,) for n, name in enumerate(names) if n > 0 and values.get(name, 0) % 16 == 0 and name not in constants
        ]
        source = ASTSource(
            angles_kernel._changes,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs=constants,
            attrs={place: [["tt.divisibility", 16]] for place in sixteenth},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        used = resources(made.asm["cubin"], tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (constants, used)
        assert made.metadata.shared <= 48 * 1024
        assert "ld.global.b16" not in made.asm["ptx"] or width == 300  # 16 bytes at once
        assert ("cp.async" in made.asm["ptx"]) == (not constants["WHOLE"])  # the next numbers are on their way
    assert len(set(launches)) == len(launches)


def tried(monkeypatch, changes, updates=False) -> object:
    """What `device_kernel` makes of a kernel on a device that has one; here the CPU stands for it."""
    from simpletuner_layerprobe.probe import angles_kernel

    monkeypatch.setattr(distances, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(angles_kernel, "changes", changes)
    return distances.device_kernel(CPU, SIZE, ROWS, ROWS, updates)


def slightly_off(angle: float = 0, norm: float = 0, cosine: float = 0, earlier: float = 0):
    """A kernel whose values are off by so much, the norm relatively."""

    def changes(u_BSD, v_BSD, updates, earlier_BSD=()):
        angles_BS, norm_BS, cosine_BS = plain_angles(u_BSD, v_BSD), *token_updates(u_BSD, v_BSD)
        made = angles_BS + angle, norm_BS * (1 + norm), cosine_BS + cosine
        further = (plain_angles(state_BSD, v_BSD) + earlier for state_BSD in earlier_BSD)
        return *(made if updates else made[:1]), *further

    return changes


def test_a_kernel_that_agrees_is_used(monkeypatch, caplog):
    right = slightly_off(1e-7, 1e-7, 1e-7)
    calls = []

    def changes(*states):
        calls.append(states)
        return right(*states)

    assert tried(monkeypatch, changes) is changes and len(calls) == 1
    assert tried(monkeypatch, changes) is changes and len(calls) == 1  # tried once
    assert tried(monkeypatch, changes, updates=True) is changes and len(calls) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (slightly_off(angle=3e-6), "its values differ by 3e-06"),
        (slightly_off(norm=-3e-6), "its values differ by 3e-06"),
        (slightly_off(cosine=3e-6), "its values differ by 3e-06"),
        (slightly_off(earlier=3e-6), "its values differ by 3e-06"),
        (slightly_off(angle=math.nan), "its values differ by inf"),
        (slightly_off(norm=math.nan), "its values differ by inf"),
        (slightly_off(cosine=math.nan), "its values differ by inf"),
        (lambda u, v, *more: slightly_off()(u.flip(-1), v, *more), "its values differ by"),
        (lambda u, v, updates, earlier: slightly_off()(u, v, updates), "ValueError: zip()"),
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_that_does_not_agree_is_not_used(monkeypatch, caplog, changes, reason):
    assert tried(monkeypatch, changes, updates=True) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("layerprobe: the fused kernel is not used on cpu, steps take a little longer")
    assert reason in record.getMessage()


def test_without_triton_the_plain_operations_do(monkeypatch, caplog):
    monkeypatch.setattr(distances, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "simpletuner_layerprobe.probe.angles_kernel", None)
    for width in (96, 64):  # one warning
        assert distances.device_kernel(CPU, (width, 256), ROWS, ROWS, False) is None
    (record,) = caplog.records
    assert "fused kernel is not used" in record.getMessage()


def test_the_kernel_can_be_switched_off(monkeypatch, caplog):
    right = slightly_off()
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE_KERNEL", "0")
    assert tried(monkeypatch, right) is None and not caplog.records
    distances.device_kernel.cache_clear()
    monkeypatch.setenv("SIMPLETUNER_LAYERPROBE_KERNEL", "1")
    assert tried(monkeypatch, right) is right
    assert distances.device_kernel(torch.device("meta"), SIZE, ROWS, ROWS, False) is None  # another kind of device


def test_other_devices_take_the_kernel_or_the_plain_operations(monkeypatch):
    """The choice, on torch's device without data."""
    state, result = torch.empty(2, 5, 8, device="meta"), torch.zeros(2, 5)
    by_width = laid_out(state, True)
    asked = []
    taken = []

    def device_kernel(*key):
        asked.append(key)

    def kernel(u_BSD, v_BSD, updates, earlier_BSD=()):
        taken.append((updates, len(earlier_BSD)))
        return (result,) * (1 + 2 * updates + len(earlier_BSD))

    monkeypatch.setattr(distances, "device_kernel", device_kernel)
    assert token_angles(state, by_width).shape == (2, 5)
    assert [value.shape for value in token_changes(state, state, updates=True)] == [(2, 5)] * 3
    monkeypatch.setattr(distances, "device_kernel", lambda *_: kernel)
    assert token_angles(state, state) is result
    assert token_changes(state, state, updates=True) == (result,) * 3
    # One launch where the earlier states lie as the one before does, else one for each.
    assert token_changes(state, by_width, True, [state] * 3) == (result,) * 6
    assert token_changes(state, state, True, [state, by_width]) == (result,) * 5
    assert taken == [(False, 0), (True, 0), (True, 3), (True, 0), (False, 0), (False, 0)]
    assert asked[0] == (state.device, (8, 8), ROWS, (FLOAT32, False), False) and asked[1][4]  # 10 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_the_plain_operations_are_exact(size, dtype, monkeypatch):
    """What a device without the kernel does, here by a CPU with the other devices' pieces and with small ones."""
    before, after = states(0, (2, 333, 96), size, dtype)
    for elements in (plain.CHUNK_ELEMENTS_DEVICE, 96 * 100):
        monkeypatch.setitem(plain.CHUNK_ELEMENTS, "cpu", elements)
        np.testing.assert_allclose(
            plain_angles(before, after).numpy(), float64_angles(before, after), rtol=0, atol=2e-7
        )
    assert math.isclose(float(plain_angles(before, -before).min()), 1, abs_tol=1e-7)
