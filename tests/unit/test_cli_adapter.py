"""`layerprobe adapter` and the API behind it: places, sums, plans, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, Result, assert_one_line
from safetensors.numpy import save_file
from synthetic_run import sd3_modules

import simpletuner_layerprobe as layerprobe_api

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

Command = Callable[..., Result]
LINEAR = {m.name: m.shape for m in sd3_modules(6) if m.type == "Linear" and m.name.startswith("transformer_blocks")}


def lokr(names: dict[str, tuple[int, ...]], factor: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A full LoKr's tensors for these modules, float32."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in names.items():
        key = f"lycoris_{name.replace('.', '_')}"
        tensors[f"{key}.lokr_w1"] = generator.normal(size=(factor, factor)).astype(np.float32)
        tensors[f"{key}.lokr_w2"] = generator.normal(size=(rows // factor, columns // factor)).astype(np.float32)
        tensors[f"{key}.alpha"] = np.array(1, np.float32)
    return tensors


def norms(tensors: dict[str, np.ndarray]) -> dict[str, float]:
    """Of kron(w1, w2), built."""
    keys = [key.removesuffix(".lokr_w1") for key in tensors if key.endswith(".lokr_w1")]
    return {
        key: float(np.linalg.norm(np.kron(*(tensors[f"{key}.lokr_w{part}"].astype(np.float64) for part in (1, 2)))))
        for key in keys
    }


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return lokr(LINEAR)


@pytest.fixture
def adapter(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "trained" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline with weights of 1 everywhere, so that a norm is the root of a count."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(
        {f"{name}.weight": np.ones(shape, np.float32) for name, shape in LINEAR.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    return folder.parent


def config(factor: int, blocks: str = "*") -> dict[str, Any]:
    preset = {"target_module": [], "use_fnmatch": True}
    names = {f"transformer_blocks.{blocks}": {"factor": factor}}
    whole = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10**6, "linear_alpha": 1, "full_matrix": True}
    return whole | {"factor": 1, "apply_preset": preset | {"name_algo_map": names}}


def test_blocks_kinds_and_streams_are_sums_of_squares(
    layerprobe: Command, adapter: Path, base: Path, tiny_run: Path, tensors: dict[str, np.ndarray]
) -> None:
    told = layerprobe("adapter", adapter, "--run", tiny_run, "--model", base, "--json").json
    assert told["base"] == str(base / "transformer") and told["config"] is None and told["notes"] == []
    by_key = norms(tensors)
    modules = {module["name"]: module for module in told["modules"]}
    assert list(modules) == list(LINEAR)
    for name, module in modules.items():
        assert module["update"] == pytest.approx(by_key[f"lycoris_{name.replace('.', '_')}"], rel=1e-12)
        assert module["weight"] == pytest.approx(np.sqrt(np.prod(LINEAR[name])), rel=1e-12)
        assert module["relative"] == pytest.approx(module["update"] / module["weight"], rel=1e-12)
    assert [part["name"] for part in told["blocks"]] == list(TINY["image"])
    assert [part["name"] for part in told["kinds"]] == ["feed-forward", "attention", "modulation"]
    assert {part["name"] for part in told["streams"]} == {"image", "text"}
    for label, parts in (("block", told["blocks"]), ("kind", told["kinds"]), ("stream", told["streams"])):
        assert sum(part["share"] for part in parts) == pytest.approx(1)
        assert sum(part["parameters"] for part in parts) == told["all"]["parameters"]
        for part in parts:
            inside = [module for module in modules.values() if module[label] == part["name"]]
            for number in ("update", "weight"):
                assert part[number] == pytest.approx(np.linalg.norm([module[number] for module in inside]), rel=1e-12)
            assert part["relative"] == pytest.approx(part["update"] / part["weight"], rel=1e-12)
            assert part["share"] == pytest.approx((part["update"] / told["all"]["update"]) ** 2)
            assert part["modules"] == len(inside)
    of = {name: (module["kind"], module["stream"]) for name, module in modules.items()}
    assert of["transformer_blocks.2.attn.to_q"] == ("attention", "image")
    assert of["transformer_blocks.2.ff_context.net.2"] == ("feed-forward", "text")
    assert of["transformer_blocks.2.norm1_context.linear"] == ("modulation", "text")


def test_the_table_fits_and_says_the_same(layerprobe: Command, adapter: Path, base: Path, tiny_run: Path) -> None:
    arguments = ("adapter", adapter, "--run", tiny_run, "--model", base)
    (adapter.parent / "lycoris_config.json").write_text(json.dumps(config(2)))  # another factor than the file's
    shown = layerprobe(*arguments)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"lokr, {len(LINEAR)} modules: an update of norm ")
    assert all(len(line) <= 100 for line in lines if not line.startswith(("base", "plan", "note")))
    assert [line.split()[0] for line in lines[2:8]] == list(TINY["image"]) and lines[8].startswith("all ")
    assert lines[1].split() == ["block", "update", "share", "weight", "relative", "parameters", "share", "planned"]
    assert lines[-2] == f"base     {base / 'transformer'}" and lines[-1].endswith(
        ": the file has otherwise than planned"
    )
    made = layerprobe_api.adapter(adapter, run=tiny_run, model=base)
    assert made.planned_M is not None and (made.planned_M != made.parameters_M).all()
    for line, part in zip(lines[2:9], (*made.by_block, made.whole), strict=True):
        assert line.split()[5] == f"{part.parameters:,}" and line.split()[7] == f"{part.planned:,}"


def test_the_plan_beside_the_file(layerprobe: Command, adapter: Path, tiny_run: Path, tmp_path: Path) -> None:
    beside = adapter.parent / "lycoris_config.json"
    beside.write_text(json.dumps(config(4)))
    made = layerprobe_api.adapter(adapter, run=tiny_run)
    assert made.config == beside and made.planned_M is not None
    assert made.planned_M.tolist() == made.parameters_M.tolist() and made.left_out == ()
    assert layerprobe("adapter", adapter, "--run", tiny_run).out.count("the planned parameters everywhere") == 1
    less = {name: shape for name, shape in LINEAR.items() if ".3." not in name}
    save_file(lokr(less), adapter)
    told = layerprobe("adapter", adapter, "--run", tiny_run, "--config", beside, "--json").json
    assert told["left_out"] == [name for name in LINEAR if name not in less]
    shown = layerprobe("adapter", adapter, "--run", tiny_run).out
    assert "planned modules not in the file, first transformer_blocks.3." in shown
    beside.write_text("{}")
    assert "the plan is not shown" in layerprobe("adapter", adapter, "--run", tiny_run).out
    assert_one_line(layerprobe("adapter", adapter, "--run", tiny_run, "--config", beside), 1, "has no algo")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config(4)))
    assert_one_line(layerprobe("adapter", adapter, "--config", other), 1, "give --run or --model")


def test_the_base_that_the_run_names(layerprobe: Command, adapter: Path, base: Path, tiny_run: Path) -> None:
    options = tiny_run / "config.json"
    options.write_text(json.dumps({"--pretrained_model_name_or_path": str(base)}))
    assert layerprobe("adapter", adapter, "--run", tiny_run, "--json").json["base"] == str(base / "transformer")
    options.write_text(json.dumps({"pretrained_model_name_or_path": "somebody/model"}))
    told = layerprobe("adapter", adapter, "--run", tiny_run, "--json").json
    assert told["base"] is None and told["all"]["weight"] is None and told["modules"][0]["relative"] is None
    assert told["notes"][0] == "the run's base somebody/model is no folder with weights here"
    assert told["notes"][1].startswith("the base's weights are not known")


def test_without_a_model_the_names_tell_the_blocks(layerprobe: Command, adapter: Path, base: Path) -> None:
    names = {f"transformer_blocks.{number}.attn.to_q": (64, 64) for number in (0, 2, 10)} | {"proj_out": (16, 64)}
    save_file(lokr(names), adapter)
    told = layerprobe("adapter", adapter, "--json").json
    assert [part["name"] for part in told["blocks"]] == [*(f"transformer_blocks.{n}" for n in (0, 2, 10)), "other"]
    assert told["modules"][1]["name"] == "transformer_blocks_0_attn_to_q" and told["kinds"] == told["streams"] == []
    assert "updates are shown alone: name the base with --model FOLDER" in layerprobe("adapter", adapter).out
    save_file(lokr(LINEAR), adapter)
    told = layerprobe("adapter", adapter, "--model", base, "--json").json  # without a config.json
    assert told["notes"][0].startswith("blocks are told by their names alone") and told["all"]["weight"] is not None
    assert [part["name"] for part in told["blocks"]] == list(TINY["image"])


def test_a_small_update_of_zero(adapter: Path, base: Path, tiny_run: Path, layerprobe: Command) -> None:
    save_file({name: np.zeros_like(tensor) for name, tensor in lokr(LINEAR).items()}, adapter)
    made = layerprobe_api.adapter(adapter, model=base, run=layerprobe_api.load(tiny_run))
    assert not made.update_M.any() and not made.relative_M.any() and made.whole.share == 0
    assert layerprobe("adapter", adapter, "--model", base, "--run", tiny_run).code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "No such file"),
        ("text", "is not a safetensors file"),
        ("empty", "has no module of a denoiser"),
        ("oft", "of no algorithm that is known; expected lokr, loha, locon or lora"),
        ("dora", "DoRA"),
        ("name", "is an adapter of another model: 2 of its 43 modules are not in"),
        ("shape", "another model: lycoris_transformer_blocks_0_attn_to_q changes a weight of 32 x 64"),
        ("nan", "lycoris_transformer_blocks_1_attn_to_q has numbers that are not finite"),
        ("model", "there is no architecture"),
        ("run", "no-run does not exist"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    change: str,
    said: str,
    layerprobe: Command,
    adapter: Path,
    base: Path,
    tiny_run: Path,
    tensors: dict[str, np.ndarray],
) -> None:
    options = ["--model", base, "--run", tiny_run]
    key = "lycoris_transformer_blocks_{}_attn_to_q"
    if change == "missing":
        adapter.unlink()
    elif change == "text":
        adapter.write_text("no tensors")
    elif change == "model":
        options = ["--model", adapter.parent / "none"]
    elif change == "run":
        options = ["--run", adapter.parent / "no-run"]
    else:
        tensors |= {
            "oft": {f"{key.format(0)}.oft_blocks": np.ones((2, 2))},
            "dora": {f"{key.format(0)}.dora_scale": np.ones((2, 1))},
            "name": lokr({"transformer_blocks.9.ff": (8, 8), "double_blocks.0.ff": (8, 8)}),
            "shape": {f"{key.format(0)}.lokr_w1": np.ones((2, 4))},
            "nan": {f"{key.format(1)}.lokr_w1": np.full((4, 4), np.nan)},
        }.get(change, {})
        save_file({} if change == "empty" else tensors, adapter)
    assert_one_line(layerprobe("adapter", adapter, *options), 1, said)
