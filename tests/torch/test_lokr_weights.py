"""Updates of saved adapters against LyCORIS's and PEFT's own, and weights that are read one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails
from safetensors.torch import save_file
from torch import nn

import simpletuner_layerprobe as layerprobe
from simpletuner_layerprobe.lokr.saved import Saved, read_adapter
from simpletuner_layerprobe.lokr.weights import Weights, weights_folder

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "conv1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 2, 2)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lokr": {"full_matrix": True, "factor": 4, "lora_dim": 100000, "alpha": 1},
    "lokr low rank": {"factor": 2, "lora_dim": 3, "alpha": 2},
    "lokr both low rank": {"factor": -1, "lora_dim": 1, "alpha": 0.5, "decompose_both": True},
    "lokr unbalanced": {"factor": 3, "lora_dim": 2, "alpha": 3, "unbalanced_factorization": True},
    "lokr scalar": {"factor": 2, "lora_dim": 3, "alpha": 2, "use_scalar": True},
    "lokr rank-stabilised": {"factor": 2, "lora_dim": 4, "alpha": 3, "rs_lora": True},
    "lokr tucker": {"factor": 2, "lora_dim": 2, "alpha": 3, "use_tucker": True},
    "loha": {"lora_dim": 4, "alpha": 3},
    "loha scalar": {"lora_dim": 4, "alpha": 3, "use_scalar": True},
    "loha tucker": {"lora_dim": 3, "alpha": 2, "use_tucker": True},
    "locon": {"lora_dim": 4, "alpha": 3},
    "locon, alpha 0": {"lora_dim": 4, "alpha": 0},
    "locon scalar, rank-stabilised": {"lora_dim": 4, "alpha": 3, "use_scalar": True, "rs_lora": True},
    "locon tucker": {"lora_dim": 3, "alpha": 2, "use_tucker": True},
}


def lycoris_module(algo: str, layer: nn.Module, **settings: Any) -> Any:
    """LyCORIS's adapter of one layer, in float64, with random numbers in it."""
    from lycoris.modules import LoConModule, LohaModule, LokrModule

    kinds = {"lokr": LokrModule, "loha": LohaModule, "locon": LoConModule}
    made = kinds[algo]("lycoris_blocks_0_layer", layer, 1.0, **settings).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made.eval()


def saved(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> Saved:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path, metadata or None)
    return read_adapter(path)


def assert_same(file: Saved, key: str, expected: torch.Tensor, rtol: float = 1e-10) -> None:
    """The update has the shape of `expected`, and its norm, which is worked out without it."""
    update = file.update(key)
    matrix = expected.detach().reshape(expected.shape[0], -1).double().numpy()
    assert update.shape == matrix.shape
    assert update.norm() == pytest.approx(np.linalg.norm(matrix), rel=rtol)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_update_is_lycoris_own(name: str, layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    algo = name.split()[0].rstrip(",")
    module = lycoris_module(algo, LAYERS[layer]().double(), **SETTINGS[name])
    state = {f"lycoris_blocks_0_layer.{key}": tensor for key, tensor in module.state_dict().items()}
    file = saved(tmp_path / "adapter.safetensors", state)
    # What the forward adds. get_diff_weight, with which LyCORIS merges, has no scalar in it and the scale once more.
    if algo == "locon":
        expected = module.get_diff_weight()[0]
    else:
        expected = module.get_weight(module.shape) * module.scalar
        merged = module.get_diff_weight(shape=module.shape)[0]
        torch.testing.assert_close(merged * module.scalar, expected * module.scale, rtol=1e-12, atol=1e-12)
        if "rank-stabilised" in name and module.use_w2:
            expected = expected / module.scale  # no file tells it: LyCORIS loads whole matrices with the scale 1
    assert_same(file, "lycoris_blocks_0_layer", expected)
    trained = [tensor for key, tensor in module.state_dict().items() if key != "alpha"]
    assert file.update("lycoris_blocks_0_layer").parameters == sum(tensor.numel() for tensor in trained)


@pytest.mark.parametrize("name", ["lokr", "lokr both low rank", "lokr low rank", "loha", "locon"])
def test_the_update_is_what_a_linear_layer_adds(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).double()
    module = lycoris_module(name.split()[0], layer, **SETTINGS[name])
    states = torch.eye(24, dtype=torch.float64)
    before = layer(states)
    module.apply_to()
    added = (layer(states) - before).T
    state = {f"lycoris_blocks_0_layer.{key}": tensor for key, tensor in module.state_dict().items()}
    assert_same(saved(tmp_path / "adapter.safetensors", state), "lycoris_blocks_0_layer", added)


@pytest.mark.parametrize(
    "name", ["lokr", "lokr both low rank", "lokr rank-stabilised", "loha", "locon", "locon tucker"]
)
def test_a_bf16_file_is_what_lycoris_loads_from_it(name: str, tmp_path: Path) -> None:
    from lycoris.modules import get_module, make_module

    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3)
    module = lycoris_module(name.split()[0], layer, **SETTINGS[name])
    state = {f"lycoris_blocks_0_layer.{key}": tensor.bfloat16() for key, tensor in module.state_dict().items()}
    file = saved(tmp_path / "adapter.safetensors", state)
    kind, tensors = get_module(state, "lycoris_blocks_0_layer")
    loaded = make_module(kind, tensors, "lycoris_blocks_0_layer", layer).double()
    expected = loaded.get_diff_weight()[0] if name.startswith("locon") else loaded.get_weight(loaded.shape)
    assert_same(file, "lycoris_blocks_0_layer", expected)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: LAYERS[name]() for name in ("linear", "conv")})] * 1)
        self.out = nn.Linear(16, 8)


@pytest.mark.parametrize("stabilised", [False, True])
def test_the_update_is_pefts_own(stabilised: bool, tmp_path: Path) -> None:
    """As diffusers saves it: settings in the metadata, "transformer." before everything."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(0)
    settings = {
        "lora_alpha": 6,
        "alpha_pattern": {"blocks.0.conv": 5},
        "rank_pattern": {"out": 3},
        "use_rslora": stabilised,
    }
    config = LoraConfig(r=4, target_modules=["linear", "conv", "out"], **settings)
    model = inject_adapter_in_model(config, Small().double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = {f"transformer.{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()}
    metadata = {f"transformer.{key}": value for key, value in settings.items()} | {"text_encoder.lora_alpha": 1}
    file = saved(tmp_path / "adapter.safetensors", state, lora_adapter_metadata=json.dumps(metadata))
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert {f"transformer.{name}" for name in layers} == set(file.keys) and len(layers) == 3
    for name, layer in layers.items():
        assert_same(file, f"transformer.{name}", layer.get_delta_weight("default"))
    assert file.names(["blocks.0.linear", "blocks.0.conv", "out"]).keys() == set(file.keys)


def test_other_spellings_of_peft_are_read_alike(tmp_path: Path) -> None:
    down, up = torch.randn(2, 6).double(), torch.randn(4, 2).double()
    for number, (first, second) in enumerate(
        [
            ("diffusion_model.x.y.lora_A.weight", "diffusion_model.x.y.lora_B.weight"),
            ("transformer.x.y.lora.down.weight", "transformer.x.y.lora.up.weight"),
            ("x.y.lora_A.default.weight", "x.y.lora_B.default.weight"),
            ("lycoris_x_y.lora_down.weight", "lycoris_x_y.lora_up.weight"),
        ]
    ):
        file = saved(tmp_path / f"{number}.safetensors", {first: down, second: up, "text_encoder.a.lora_A.weight": up})
        (key,) = file.keys
        assert_same(file, key, up @ down)
        assert file.names(["x.y"]) == {key: "x.y"} and file.others == 1
        alpha = f"{first.partition('.lora')[0]}.alpha"
        assert_same(
            saved(tmp_path / "a.safetensors", {first: down, second: up, alpha: torch.tensor(3.0)}), key, 1.5 * up @ down
        )


def test_weight_decomposition_is_refused(tmp_path: Path) -> None:
    for algo in ("lokr", "loha", "locon"):
        module = lycoris_module(algo, nn.Linear(24, 40), lora_dim=4, alpha=4, weight_decompose=True)
        state = {f"lycoris_blocks_0_layer.{key}": tensor for key, tensor in module.state_dict().items()}
        with fails("lycoris_blocks_0_layer.dora_scale: DoRA"):
            saved(tmp_path / "adapter.safetensors", state)
    with fails("lora_magnitude_vector: DoRA"):
        saved(tmp_path / "adapter.safetensors", {"transformer.x.lora_magnitude_vector": torch.ones(4)})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lokr_w1": (2, 2)}, "lycoris_x lacks lokr_w2_a"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (3, 4)}, "do not fit each other (their ranks differ)"),
        ({"lokr_w1": (2,), "lokr_w2": (2, 2)}, "do not fit each other (expected a matrix)"),
        ({"hada_w1_a": (3, 2), "hada_w1_b": (2, 4), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)}, "differ in shape"),
        ({"lora_up.weight": (3, 2), "lora_down.weight": (2, 4), "lora_mid.weight": (1, 1, 3)}, "another rank"),
        ({"lora_up.weight": (3, 0), "lora_down.weight": (0, 4)}, "an empty tensor"),
        ({"lora_up.weight": (3, 2), "lora_down.weight": (2, 4), "alpha": (3,)}, "an alpha that is not a number"),
        ({"lora_up.weight": (3, 2), "lokr_w1": (2, 4)}, "the tensors lokr_w1, lora_up: of no known algorithm"),
        ({"alpha": ()}, "alpha alone: of no known algorithm"),
        ({"oft_blocks": (2, 2)}, "'lycoris_x.oft_blocks', of no algorithm that is known"),
        ({"lokr_w3": (2, 2)}, "lacks lokr_w1_a"),
    ],
)
def test_tensors_that_make_no_update_are_one_line(
    tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path
) -> None:
    with fails(said):
        state = {f"lycoris_x.{name}": torch.ones(shape) for name, shape in tensors.items()}
        saved(tmp_path / "adapter.safetensors", state).update("lycoris_x")


# The base's weights


def folder_of(path: Path, tensors: dict[str, torch.Tensor], name: str = "diffusion_pytorch_model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / name)
    return path


def test_weights_come_from_a_file_or_an_index(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 6), "b.c.weight": torch.randn(3, 2, 3, 3).bfloat16(), "a.bias": torch.ones(4)}
    single = folder_of(tmp_path / "pipeline" / "transformer", tensors)
    parts = tmp_path / "parts"
    names = {key: f"part-{number}.safetensors" for number, key in enumerate(tensors)}
    for key, name in names.items():
        folder_of(parts, {key: tensors[key]}, name)
    index = parts / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    folder_of(tmp_path / "pipeline", {"other": tensors["a.bias"]}, "model.safetensors")  # as Stability publishes them
    assert weights_folder(tmp_path / "pipeline") == weights_folder(single) == single
    assert weights_folder(parts) == parts and weights_folder(tmp_path) is None
    for folder in (single, parts):
        weights = Weights(folder)
        assert set(weights.file_of) == {"a", "b.c"} and weights.shape("b.c") == (3, 2, 3, 3)
        for name in ("a", "b.c"):
            expected = tensors[f"{name}.weight"].double().norm().item()
            assert weights.norm(name) == pytest.approx(expected, rel=1e-14)
    (parts / "part-0.safetensors").unlink()
    with fails("part-0.safetensors"):
        Weights(parts).norm("a")
    folder_of(parts, {"z": tensors["a.bias"]}, "part-0.safetensors")
    with fails("a.weight is missing"):
        Weights(parts).norm("a")
    index.write_text(json.dumps({"weight_map": {"a.weight": "../transformer/x.safetensors"}}))
    with fails("expected files beside it"):
        Weights(parts).norm("a")
    index.write_text("{}")
    with fails("has no weight_map"):
        Weights(parts).norm("a")


def test_quantised_weights_and_several_models_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "int8", {"a.weight": torch.ones(4, 6, dtype=torch.int8)})
    with fails("a.weight is of the type I8"):
        Weights(folder).norm("a")
    folder_of(tmp_path / "two", {"a.weight": torch.ones(1, 1)}, "x.safetensors")
    folder_of(tmp_path / "two", {"a.weight": torch.ones(1, 1)}, "y.safetensors")
    with fails("has 2 safetensors and no index"):
        Weights(tmp_path / "two").norm("a")


def test_a_network_of_lycoris_on_a_diffusers_model(tmp_path: Path) -> None:
    """From LyCORIS's own names to the model's: every module, its block, kind and stream, and the merged weights."""
    from diffusers import SD3Transformer2DModel
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(0)
    size = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    shape = {"sample_size": 8, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
    model = SD3Transformer2DModel(**size, **shape)
    model.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="20KB")
    before = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    config = {"algo": "lokr", "multiplier": 1, "linear_dim": 10**6, "linear_alpha": 1, "factor": 4, "full_matrix": True}
    preset = {"target_module": ["JointTransformerBlock"]}
    kept = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    LycorisNetwork.apply_preset(preset)
    network = create_lycoris(model, 1, 10**6, 1, algo="lokr", factor=4, full_matrix=True)
    network.apply_to()
    for name, value in kept.items():
        setattr(LycorisNetwork, name, value)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    path = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    saved(path, network.state_dict())
    (path.parent / "lycoris_config.json").write_text(json.dumps(config | {"apply_preset": preset}))
    made = layerprobe.adapter(path, model=tmp_path / "base")
    expected = {
        name: (lora.get_diff_weight(shape=lora.shape)[0].double().norm().item(), before[f"{name}.weight"].norm().item())
        for lora in network.loras
        for name, module in model.named_modules()
        if module is lora.org_module[0]
    }
    assert set(made.names) == set(expected) and len(made.names) == 3 * 13 - 3 + 3
    np.testing.assert_allclose(made.update_M, [expected[name][0] for name in made.names], rtol=1e-6)
    np.testing.assert_allclose(made.weight_M, [expected[name][1] for name in made.names], rtol=1e-12)
    assert made.planned_M is not None and made.planned_M.tolist() == made.parameters_M.tolist()
    assert made.notes == () and made.left_out == ()
