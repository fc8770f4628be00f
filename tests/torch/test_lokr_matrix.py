"""Many forms of a LyCORIS config on a small SD3: what the check says against the network that LyCORIS really builds.

Each form is built on the model with weights, as SimpleTuner builds it, and trained for a step. What a note says to be
without effect is taken out, and the network must stay the same; every other key is given other values, and it must not.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import fails
from lokr_models import Model
from safetensors.torch import load_file, save_file

from simpletuner_layerprobe.lokr.check import Check
from simpletuner_layerprobe.lokr.network import fresh_wrapper, silent
from simpletuner_layerprobe.lokr.origin import origin
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.probe.modules import module_table, norm_widths
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

BLOCKS = {"target_module": ["JointTransformerBlock"]}
NAMES = {"use_fnmatch": True, "target_module": []}
TOML = """enable_conv = false
target_module = ["FeedForward"]
unet_target_module = ["Attention"]
[module_algo_map.FeedForward]
factor = 2
"""
INPUTS = {
    "hidden_states": torch.ones(1, 4, 8, 8),
    "encoder_hidden_states": torch.ones(1, 5, 24),
    "pooled_projections": torch.ones(1, 24),
    "timestep": torch.ones(1),
}


def form(algo: str = "lokr", apply: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    config = {"algo": algo, "multiplier": 1, "linear_dim": 2, "linear_alpha": 4} | more
    return config | ({} if apply is None else {"apply_preset": apply})


def names(**of: dict[str, Any]) -> dict[str, Any]:
    return NAMES | {"name_algo_map": {f"transformer_blocks.{key.replace('__', '.')}*": to for key, to in of.items()}}


NUMBERS = {
    "linear_dim",
    "linear_alpha",
}  # without which SimpleTuner does not start, and which not every algorithm reads

# The form, and what of it has no effect: keys at the top, of apply_preset ("preset.") and of single names ("map.").
FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    **{algo: (form(algo, BLOCKS), set()) for algo in ("lokr", "lora", "locon", "loha", "glora", "LoKr")},
    **{algo: (form(algo, BLOCKS), NUMBERS) for algo in ("full", "ia3")},
    "dylora": (form("dylora", BLOCKS, linear_dim=4), set()),
    "diag-oft": (form("diag-oft", BLOCKS), {"linear_alpha"}),
    "boft": (form("boft", names(**{"0__attn__to_q": {}}), linear_dim=8), {"linear_alpha"}),
    "boft that cannot be": (form("boft", BLOCKS), set()),
    "a setting given twice": (form("lokr", names(**{"0": {"dropout": 0.5}})), set()),
    "tlora": (form("tlora", names(**{"0__attn__to_q": {}}), tlora_min_rank=2, tlora_alpha=2.0), set()),
    "TLoRA": (form("TLoRA", names(**{"0__attn__to_q": {}}), tlora_min_rank=2), {"tlora_min_rank"}),
    "tlora settings for lokr": (
        form("lokr", BLOCKS, tlora_min_rank=2, tlora_alpha=1.5),
        {"tlora_min_rank", "tlora_alpha"},
    ),
    "factor": (form("lokr", BLOCKS, factor=4), set()),
    "factor for locon": (form("locon", BLOCKS, factor=4), {"factor"}),
    "factor for loha": (form("loha", BLOCKS, factor=4, full_matrix=True), {"factor", "full_matrix"}),
    "full_matrix": (form("lokr", BLOCKS, factor=4, full_matrix=True), NUMBERS),
    "full_matrix by custom": (
        form("lokr", BLOCKS, factor=4, full_matrix=True, linear_dim=10000, linear_alpha=1),
        set(),
    ),
    "large dim": (form("lokr", BLOCKS, factor=4, linear_dim=10000), {"linear_alpha"}),
    "full_matrix with names": (form("lokr", names(**{"0": {"factor": 2, "full_matrix": True}})), NUMBERS),
    "full_matrix with some names": (
        form("lokr", names(**{"0__attn": {"full_matrix": True}, "0__ff": {"full_matrix": False}})),
        set(),
    ),
    "alpha of full matrices": (
        form("lokr", names(**{"0": {"full_matrix": True, "dim": 3, "alpha": 5}, "1": {}})),
        {"map.alpha", "map.dim"},
    ),
    "dim for lora beside lokr": (form("lokr", names(**{"0": {"algo": "lora", "dim": 3, "alpha": 5}, "1": {}})), set()),
    "nothing to decompose": (form("lokr", BLOCKS, decompose_both=True, factor=4), {"decompose_both"}),
    "full_matrix decomposed": (
        form("lokr", BLOCKS, decompose_both=True, factor=8, full_matrix=True, linear_dim=1, linear_alpha=1),
        {"decompose_both"},
    ),
    "decompose_both": (form("lokr", BLOCKS, decompose_both=True, linear_dim=1, factor=8), set()),
    "unbalanced": (form("lokr", BLOCKS, unbalanced_factorization=True, factor=2), set()),
    "dora": (form("lokr", BLOCKS, dora_wd=True), set()),
    "dora on the input": (form("locon", BLOCKS, dora_wd=True, wd_on_output=False), set()),
    "dora on the output, of none": (form("lokr", BLOCKS, wd_on_output=False), {"wd_on_output"}),
    "dora for full": (form("full", BLOCKS, dora_wd=True), {"dora_wd", *NUMBERS}),
    "dora for glora": (form("glora", BLOCKS, dora_wd=True), {"dora_wd"}),
    "scalar": (form("lokr", BLOCKS, use_scalar=True), set()),
    "scalar for oft": (
        form("diag-oft", BLOCKS, use_scalar=True, constraint=0.5, rescaled=True),
        {"use_scalar", "linear_alpha"},
    ),
    "constraint for lokr": (form("lokr", BLOCKS, constraint=0.5, rescaled=True), {"constraint", "rescaled"}),
    "block size": (form("dylora", BLOCKS, block_size=2), set()),
    "block size for lokr": (form("lokr", BLOCKS, block_size=2), {"block_size"}),
    "tucker": (form("locon", {"target_module": ["PatchEmbed"]}, use_tucker=True, conv_dim=2, conv_alpha=1), set()),
    "tucker of no convolution": (
        form("locon", BLOCKS, use_cp=True, conv_dim=2, conv_alpha=3),
        {"use_cp", "conv_dim", "conv_alpha"},
    ),
    "tucker by its old name": (form("loha", {"target_module": ["PatchEmbed"]}, use_cp=True), set()),
    "tucker for full": (form("full", BLOCKS, use_tucker=True), {"use_tucker", *NUMBERS}),
    "dropouts of ia3": (form("ia3", BLOCKS, rank_dropout=0.1, module_dropout=0.1), {"rank_dropout", *NUMBERS}),
    "dropouts": (form("lokr", BLOCKS, rank_dropout=0.1, module_dropout=0.1), set()),
    "dropout": (form("lokr", BLOCKS, dropout=0.1), {"dropout"}),
    "dropout beside": (form("lokr", BLOCKS, dropout=0.1, bypass_mode=True), set()),
    "a bypass of dylora": (form("dylora", BLOCKS, bypass_mode=True, linear_dim=32), set()),
    "a bypass of dylora's only block": (form("dylora", BLOCKS, bypass_mode=True, linear_dim=4), set()),
    "a bypass of oft": (form("diag-oft", BLOCKS, bypass_mode=True), {"linear_alpha"}),
    "a bypass of oft with dropout": (form("diag-oft", BLOCKS, bypass_mode=True, dropout=0.1), {"linear_alpha"}),
    "all dropped": (form("lokr", BLOCKS, module_dropout=1), set()),
    "all ranks dropped": (form("loha", BLOCKS, rank_dropout=1.0), set()),
    "no rank of glora dropped": (form("glora", BLOCKS, rank_dropout=1.0), set()),
    "multiplier 0.8": (form("lokr", BLOCKS, multiplier=0.8), set()),
    "multiplier 0": (form("locon", BLOCKS, multiplier=0), set()),
    "multiplier -1": (form("locon", BLOCKS, multiplier=-1), set()),
    "multiplier 1.9": (form("lokr", BLOCKS, multiplier=1.9), set()),
    "text for numbers": (form("lokr", BLOCKS, multiplier="1", linear_dim="8"), {"linear_alpha"}),
    "half an alpha": (form("locon", BLOCKS, linear_alpha=0.5), set()),
    "no dim": (form("lokr", BLOCKS, linear_dim=0), set()),
    "rank": (form("lokr", BLOCKS, rank=16), {"rank"}),
    "network_dim": (form("locon", BLOCKS, network_dim=16, network_alpha=8), {"network_dim", "network_alpha"}),
    "dim and alpha": (form("locon", BLOCKS, dim=16, alpha=8), {"dim", "alpha"}),
    "rs_lora": (form("locon", BLOCKS, rs_lora=True), {"rs_lora"}),
    "rs_lora of a name": (form("locon", names(**{"0": {"rs_lora": True}})), set()),
    "weight_decompose": (form("lokr", BLOCKS, weight_decompose=True), {"weight_decompose"}),
    "weight_decompose of a name": (form("lokr", names(**{"0": {"weight_decompose": True}})), set()),
    "dora_wd of a name": (form("lokr", names(**{"0": {"dora_wd": True}})), {"map.dora_wd"}),
    "linear_dim of a name": (
        form("lokr", names(**{"0": {"linear_dim": 8, "linear_alpha": 1}})),
        {"map.linear_dim", "map.linear_alpha"},
    ),
    "dim of a name": (form("locon", names(**{"0": {"dim": 8, "alpha": 8}, "1": {}})), set()),
    "factor of a loha": (form("lokr", names(**{"0": {"algo": "loha", "factor": 4}})), {"map.factor"}),
    "constrain": (form("diag-oft", BLOCKS, constrain=0.5), {"linear_alpha"}),
    "a comment": (form("lokr", BLOCKS, comment="mine", _note="x"), {"comment", "_note"}),
    "warnings": (form("lokr", BLOCKS, warn_on_unmatched=False), set()),
    "target_module outside": (form("lokr", BLOCKS, target_module=["Attention"]), {"target_module"}),
    "use_fnmatch outside": (form("lokr", BLOCKS, use_fnmatch=True, lora_prefix="x"), {"use_fnmatch", "lora_prefix"}),
    "a prefix": (form("lokr", BLOCKS | {"lora_prefix": "mine"}), set()),
    "unet_target_module": (
        form("lokr", BLOCKS | {"unet_target_module": ["Attention"], "text_encoder_target_name": []}),
        {"preset.unet_target_module", "preset.text_encoder_target_name"},
    ),
    "no preset": (form("lokr"), set()),
    "an empty preset": (form("lokr", {}), set()),
    "classes and defaults": (form("lokr", {"module_algo_map": {"Attention": {"factor": 2}}}), set()),
    "names and defaults": (form("lokr", {"name_algo_map": {"transformer_blocks.0": {"factor": 2}}}), set()),
    "a bare Linear": (form("lokr", {"target_module": ["Linear"]}), set()),
    "a bare Linear beside": (form("lokr", {"target_module": ["Attention", "Linear"]}), set()),
    "attn-only": (form("lokr", BLOCKS, preset="attn-only"), set()),
    "attn-only alone": (form("lokr", None, preset="attn-only"), set()),
    "attn-mlp with a convolution": (
        form("lokr", {"target_module": ["PatchEmbed", "Attention"]}, preset="attn-mlp"),
        set(),
    ),
    "unet-only": (form("lokr", BLOCKS, preset="unet-only"), {"preset"}),
    "full by name": (form("lokr", BLOCKS, preset="full"), set()),
    "ia3 by name": (form("ia3", BLOCKS, preset="ia3"), NUMBERS),
    "ia3 over names": (form("ia3", names(**{"0": {}}), preset="ia3"), {"preset.name_algo_map"}),
    "a TOML": (form("lokr", None, preset="TOML"), {"preset.unet_target_module"}),
    "a TOML over classes": (
        form("lokr", {"target_module": ["Attention"]}, preset="TOML"),
        {"preset.target_module", "preset.unet_target_module"},
    ),
    "enable_conv": (form("lokr", {"target_module": ["PatchEmbed"], "enable_conv": False}), {"preset.enable_conv"}),
    "conv_dim 0": (form("locon", {"target_module": ["PatchEmbed"]}, conv_dim=0), set()),
    "norms": (form("lokr", {"target_module": ["LayerNorm", "Attention"]}, train_norm=True), set()),
    "no norms": (form("lokr", names(**{"0__attn__to": {}}), train_norm=True), {"train_norm"}),
    "nothing matches": (form("lokr", {"target_module": ["WanAttention"]}), set()),
    "nothing is aimed at": (form("lokr", {"target_module": []}), set()),
    "left out": (form("lokr", BLOCKS | {"exclude_name": ["transformer_blocks.0.*"], "use_fnmatch": True}), set()),
    "all left out": (form("lokr", BLOCKS | {"exclude_name": ["*"], "use_fnmatch": True}), set()),
    "a block without its layers": (
        form("lokr", names(**{"1": {"factor": 2}}) | {"target_name": ["transformer_blocks.0"]}),
        set(),
    ),
    "the first name wins": (form("lokr", names(**{"0": {"factor": 2}, "0__ff": {"factor": 8}})), set()),
    "the article's form": (form("lokr", names(**{"0__ff": {"factor": 2}, "1": {"factor": 8}}) | BLOCKS), set()),
}


# Keys that the log or SimpleTuner reads.
ALWAYS_INERT = {"warn_on_unmatched", "tlora_min_rank", "tlora_alpha", "apply_preset", "preset"}
ALWAYS_INERT |= {"algo", "multiplier", *NUMBERS}  # without which SimpleTuner does not start
# Keys that are read, and come to the same in this form.
INERT: dict[str, set[str]] = {
    "left out": {"preset.use_fnmatch"},
    "a setting given twice": {"preset.use_fnmatch", "preset.target_module"},
    **{algo: {"preset.target_module", "preset.use_fnmatch"} for algo in ("tlora", "TLoRA")},  # slow on a whole model
    "no norms": {"preset.use_fnmatch"},
    "full_matrix by custom": {"full_matrix"},
    "full_matrix with some names": {"preset.use_fnmatch"},
    "the first name wins": {"map.factor"},
    "the article's form": {"map.factor"},
}


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    sizes |= {"joint_attention_dim": 24, "pooled_projection_dim": 24, "sample_size": 8, "pos_embed_max_size": 8}
    return SD3Transformer2DModel(**sizes, in_channels=4, out_channels=4, qk_norm="rms_norm")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = sd3()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny
    gc.freeze()  # T-LoRA collects garbage once per module
    yield made
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def table(model: Any) -> Model:
    widths = norm_widths(model)
    modules = tuple(Module(*row, widths.get(row[0], 0)) for row in module_table(model))
    return Model(modules, model_class=type(model).__name__)


def network(config: dict[str, Any], model: Any) -> Any:
    """LyCORIS's, as SimpleTuner 4.10.1 builds it."""
    rest = copy.deepcopy(config)
    wrapper = fresh_wrapper()
    by_position = [int(rest.pop(key)) for key in ("multiplier", "linear_dim", "linear_alpha")]
    for key in ("tlora_min_rank", "tlora_alpha"):
        rest.pop(key, None)
    if rest.get("apply_preset"):
        wrapper.LycorisNetwork.apply_preset(rest["apply_preset"])
    torch.manual_seed(0)
    with silent():
        return wrapper.create_lycoris(model, *by_position, **rest)


def fingerprint(config: dict[str, Any], model: Any) -> Any:
    """All that tells one network from another: the modules, their tensors and settings; or why there is none."""
    try:
        made = network(config, model)
    except Exception as error:
        return repr(error)
    plain = (int, float, str, bool, type(None))
    return {
        lora.lora_name: (
            type(lora).__name__,
            [(name, tuple(tensor.shape)) for name, tensor in lora.state_dict().items()],
            {
                key: value
                for key, value in vars(lora).items()
                if isinstance(value, plain) and key not in kept_for_nothing(lora)
            },
            [float(t) for name, t in lora.named_buffers() if not t.dim() and name not in kept_for_nothing(lora)],
        )
        for lora in made.loras
        if any(True for _ in lora.parameters())
    }


def kept_for_nothing(lora: Any) -> set[str]:
    """What LyCORIS's module keeps, and `test_a_value_without_effect_trains_the_same` shows to count for nothing."""
    full = getattr(lora, "use_w1", False) and getattr(lora, "use_w2", False)
    rank_only = type(lora).__name__ == "IA3Module"
    return {
        *({"lora_dim", "alpha", "full_matrix"} if full else ()),
        *({"rank_dropout"} if rank_only else ()),
        *(() if getattr(lora, "wd", False) else ("wd_on_out",)),
    }


def learns(config: dict[str, Any], whole: Any) -> bool:
    """Whether any number would change in a step."""
    model = copy.deepcopy(whole)
    made = network(config, model)
    made.apply_to()
    model.requires_grad_(False)
    made.requires_grad_(True)
    made.train()
    trained = [p for p in made.parameters() if p.requires_grad]
    loss = (model(**INPUTS).sample ** 2).sum() if trained else torch.zeros(())
    if loss.requires_grad:
        loss.backward()
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in trained)


def places(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every key of the file: as a note calls it, and where it stands."""
    for key in config:
        yield key, config, key
    preset = config.get("apply_preset") or {}
    for key in preset:
        yield f"preset.{key}", preset, key
    for which in ("name_algo_map", "module_algo_map"):
        for settings in preset.get(which, {}).values():
            for key in settings:
                yield f"map.{key}", settings, key


def named(check: Check) -> list[str]:
    """The keys that the notes say to have no effect."""
    told = []
    for note in check.notes:
        match = re.match(r'"?(\w+).* has no effect(.*)', note)
        if match:
            inside = "map." if "given for" in match[2] else ""
            if " in apply_preset" in note or ".toml" in match[2] or match[1] == "enable_conv":
                inside = "preset."
            told.append(inside + match[1])
    return told


@pytest.mark.parametrize("name", FORMS)
def test_the_words_are_those_of_the_network(name, model, table, tmp_path):
    config, dead = copy.deepcopy(FORMS[name])
    if config.get("preset") == "TOML":
        config["preset"] = str(tmp_path / "mine.toml")
        (tmp_path / "mine.toml").write_text(TOML)
    try:
        real = network(config, model)
    except (ValueError, TypeError) as error:
        with fails(str(error).split("(")[0]):
            check_config(config, table)
        return
    check = check_config(config, table)
    paths = {id(module): path for path, module in model.named_modules()}
    built = {
        paths[id(lora.org_module[0])]: {key: tuple(tensor.shape) for key, tensor in lora.named_parameters()}
        for lora in real.loras
        if any(True for _ in lora.parameters())
    }
    assert {row.name: dict(row.got.tensors) for row in check.rows if row.got} == built
    assert check.parameters == sum(p.numel() for lora in real.loras for p in lora.parameters())
    try:
        trains = learns(config, model)
    except (AttributeError, RuntimeError):
        trains = False
    assert trains != bool(check.stops)
    # One note, once; and what has no effect is what the form says.
    told = named(check)
    assert len(set(check.notes)) == len(check.notes)
    assert sorted(told) == sorted(dead), check.notes


@pytest.mark.parametrize("name", FORMS)
def test_what_is_named_changes_nothing_and_what_is_not_does(name, model, tmp_path):
    config, dead = copy.deepcopy(FORMS[name])
    if config.get("preset") == "TOML":
        config["preset"] = str(tmp_path / "mine.toml")
        (tmp_path / "mine.toml").write_text(TOML)
    before = fingerprint(config, model)
    for told, where, key in list(places(config)):
        value = where.pop(key)
        if told in dead:
            if key in NUMBERS:
                where[key] = 4 * int(value) + 4
            now = fingerprint(config, model)
            if key == "dropout":
                now, kept = (_without_dropout(one) for one in (now, before))
                assert now == kept, told
            elif told not in ("tlora_min_rank", "tlora_alpha"):
                assert now == before, told
        elif before and told not in INERT.get(name, set()) | ALWAYS_INERT:
            assert any(_changes(where, key, other, config, model, before) for other in others(value)), told
        where[key] = value


_GONE = object()


def others(value: Any) -> list[Any]:
    """Other values for a key, one of which must make a difference."""
    if isinstance(value, bool):
        return [_GONE, not value]
    if isinstance(value, int | float):
        return [_GONE, value + 1, value * 4 + 4, 1, 0]
    if isinstance(value, list):
        return [_GONE, [], ["Attention"], ["*"]]
    return [_GONE, {}, "5", "locon", "lokr", "x"]


def _changes(where: Any, key: str, other: Any, config: Any, model: Any, before: Any) -> bool:
    if other is not _GONE:
        where[key] = other
    elif key in ("multiplier", "linear_dim", "linear_alpha"):
        return False
    try:
        return bool(fingerprint(config, model) != before)
    finally:
        where.pop(key, None)


def _without_dropout(made: Any) -> Any:
    return {
        name: (kind, tensors, {key: value for key, value in plain.items() if key != "dropout"}, buffers)
        for name, (kind, tensors, plain, buffers) in made.items()
    }


# What a note counts, and what it says of dropout, on the network


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no preset", r"by LyCORIS's default classes: target_module is left out"),
        ("an empty preset", r"by LyCORIS's default classes: target_module is left out"),
        ("classes and defaults", r"by LyCORIS's default classes and not by your names: target_module is left out"),
        ("names and defaults", r"by LyCORIS's default classes and not by your names: target_module is left out"),
        ("a bare Linear", "by the bare class Linear"),
        ("a bare Linear beside", "by the bare class Linear and not by your names"),
    ],
)
def test_what_only_the_class_of_a_layer_brings_in_is_counted_apart(name, text, model, table):
    config, _ = copy.deepcopy(FORMS[name])
    whole, numbers = size(config, model)
    preset = config.setdefault("apply_preset", {})
    preset["target_module"] = [name for name in preset.get("target_module", ()) if name != "Linear"]
    preset.setdefault("use_fnmatch", False)
    left, left_numbers = size(config, model)
    (note,) = [note for note in check_config(FORMS[name][0], table).notes if " by " in note]
    assert note.startswith(f"{whole - left:,} of {whole:,} modules, {numbers - left_numbers:,} parameters, ")
    assert text in note and whole - left > 0


def size(config: dict[str, Any], model: Any) -> tuple[int, int]:
    made = [[p.numel() for p in lora.parameters()] for lora in network(config, model).loras]
    return sum(map(bool, made)), sum(map(sum, made))


@pytest.mark.parametrize(
    ("algo", "bypass"),
    [(algo, bypass) for algo in ("lokr", "loha", "locon", "glora", "ia3") for bypass in (False, True)]
    + [("full", False), ("diag-oft", False)],  # which cannot bypass
)
def test_dropout_is_there_only_with_bypass_mode(algo, bypass, model, table):
    config = form(algo, names(**{"0__ff": {}}), dropout=0.9, bypass_mode=bypass)
    same = all(map(torch.equal, updates(config, model), updates(config | {"dropout": 0.0}, model)))
    named = any(note.startswith("dropout has no effect") for note in check_config(config, table).notes)
    assert same >= named and (bypass or (named and same))


VALUES = {
    name: FORMS[name]
    for name in (
        *("full", "ia3", "diag-oft", "full_matrix", "full_matrix with names", "large dim", "alpha of full matrices"),
        *("nothing to decompose", "full_matrix decomposed", "dora on the output, of none", "tucker of no convolution"),
        *("dropouts of ia3", "dora on the input", "decompose_both", "lokr", "dim of a name"),
    )
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_without_effect_trains_the_same(name, model):
    config, dead = copy.deepcopy(VALUES[name])
    before = updates(config, model)
    for told, where, key in list(places(config)):
        if told in dead:
            value = where.pop(key)
            where[key] = not value if isinstance(value, bool) else 0.9 if key == "rank_dropout" else 4 * value + 4
            assert all(map(torch.equal, before, updates(config, model))), told
            where[key] = value


def updates(config: dict[str, Any], whole: Any) -> list[torch.Tensor]:
    """The gradients of a step from an adapter that changes something already."""
    model = copy.deepcopy(whole)
    made = network(config, model)
    made.apply_to()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made.train()
    torch.manual_seed(0)
    (model(**INPUTS).sample ** 2).sum().backward()
    return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]


# The file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_the_file_is_read_as_simpletuner_reads_it(encoding, table, tmp_path):
    path = tmp_path / "lycoris.json"
    path.write_bytes(json.dumps(form(apply=BLOCKS) | {"b\u00e9": 1}, ensure_ascii=False).encode(encoding))
    try:
        with open(path, encoding="utf-8") as file:  # as open() does where SimpleTuner runs
            json.load(file)
    except ValueError:
        with fails(f"{path} is not JSON ("):
            check_config(path, table)
    else:
        assert check_config(path, table).notes == ("b\u00e9 has no effect: LyCORIS does not read it",)


def test_a_key_that_is_written_twice_is_told(table, tmp_path):
    path = tmp_path / "lycoris.json"
    text = json.dumps(form(apply=names(**{"0": {"factor": 2}, "1": {"factor": 4}})))
    path.write_text(text.replace("blocks.1*", "blocks.0*"))
    check = check_config(path, table)
    assert check.notes == ("transformer_blocks.0* is written more than once; the last counts",)
    assert {row.intended.factor for row in check.rows} == {4}


@pytest.mark.parametrize(
    ("preset", "note"),
    [
        (
            NAMES | {"name_algo_map": {"transformer_blocks.0": {}, "*.1.ff.*": {}}},
            "transformer_blocks.0 in name_algo_map reaches no layer that gets an adapter",
        ),
        (
            BLOCKS | {"module_algo_map": {"RMSNorm": {"factor": 2}}},
            "RMSNorm in module_algo_map reaches no layer that gets an adapter",
        ),
        (
            names(**{"0": {"factor": 2}, "0__ff": {"factor": 8}}),
            "transformer_blocks.0.ff* in name_algo_map decides nothing: transformer_blocks.0* before it has what it "
            "matches",
        ),
        (names(**{"0": {}}) | {"exclude_name": ["tail*"]}, None),
    ],
)
def test_names_that_reach_nothing_are_told(preset, note, model, table):
    config = form(apply=preset)
    check = check_config(config, table)
    assert check.notes == ((note,) if note else ())
    assert check.unmatched == (() if note else ("tail*",))
    before = fingerprint(config, model)
    for key in ("exclude_name",) if not note else ("name_algo_map", "module_algo_map"):
        entry = note.split()[0] if note else "tail*"
        kept = config["apply_preset"].get(key, ())
        if entry in kept:
            changed = {k: v for k, v in kept.items() if k != entry} if isinstance(kept, dict) else []
            assert fingerprint(form(apply=preset | {key: changed}), model) == before


# What the factor did


@pytest.mark.parametrize("factor", [-1, 1, 3, 5, 8, 16, 1000])
@pytest.mark.parametrize("more", [{}, {"full_matrix": True}, {"unbalanced_factorization": True, "linear_dim": 1}])
def test_the_split_is_what_lycoris_built(factor, more, model, table):
    config = form(apply=BLOCKS, factor=factor, **more)
    real = {}
    for lora in network(config, model).loras:
        shapes = [tuple(p.shape) for key, p in lora.named_parameters()]
        real.setdefault(tuple(lora.org_module[0].weight.shape), []).append(shapes)
    lines = check_config(config, table).splits
    assert len(lines) == len(real)
    for line in lines:
        asked, out, inner, text, numbers, count = re.fullmatch(
            r"factor (\w+) of (\d+) x (\d+): (.*), ([\d,]+) parameters in each of (\d+)", line
        ).groups()
        of_shape = real[int(out), int(inner)]
        assert (asked, int(count)) == ("automatic" if factor == -1 else str(factor), len(of_shape))
        told = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) x (\d+)", text)]
        assert told == of_shape[0] and int(numbers.replace(",", "")) == sum(a * b for a, b in told)


# Whether an adapter file comes from a config


def saved(config: dict[str, Any], model: Any, path: Path) -> Path:
    """The file that SimpleTuner saves."""
    made = network(config, copy.deepcopy(model))
    made.apply_to()
    save_file({key: tensor.contiguous() for key, tensor in made.state_dict().items()}, path)
    return path


SAVED = [
    "lokr",
    "lora",
    "loha",
    "dylora",
    "diag-oft",
    "glora",
    "ia3",
    "full",
    "dora",
    "scalar",
    "unbalanced",
    "a prefix",
]


@pytest.mark.parametrize("name", [*SAVED, "large dim", "the article's form", "a TOML", "names and defaults"])
def test_an_adapter_comes_from_its_config(name, model, table, tmp_path):
    config = copy.deepcopy(FORMS[name][0])
    if config.get("preset") == "TOML":
        config["preset"] = str(tmp_path / "mine.toml")
        (tmp_path / "mine.toml").write_text(TOML)
    made = origin(config, table, saved(config, model, tmp_path / "adapter.safetensors"))
    assert (made.fits, made.missing, made.strange, made.different, made.alphas) == (True, (), (), {}, {})
    assert len(made.same) == sum(bool(row.got) for row in check_config(config, table).rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_alpha_is_compared_where_it_scales(model, table, tmp_path, dtype):
    """In bf16 100.3 is 100.5; whatever the alpha of full matrices is, they train the same."""
    algos = {"0__attn": {"algo": "lora", "dim": 4, "alpha": 100.3}, "0__ff": {"algo": "lokr", "factor": 2}}
    config = form(apply=names(**algos), linear_dim=1_000_000, full_matrix=True)
    path = saved(config, model, tmp_path / "a.safetensors")
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    assert origin(config, table, path).fits
    algos["0__attn"] |= {"alpha": 102}
    made = origin(config | {"linear_dim": 10_000, "linear_alpha": 3, "apply_preset": names(**algos)}, table, path)
    assert not made.fits and {name.split(".")[2] for name in made.same} == {"ff", "ff_context"}
    assert made.alphas["transformer_blocks.0.attn.to_q"] == (102, torch.tensor(100.3).to(dtype).item())
    assert len(made.alphas) == 8 and not (made.different or made.missing or made.strange)


def test_what_an_adapter_has_otherwise_is_told_module_by_module(model, table, tmp_path):
    path = saved(form(apply=names(**{"0": {"factor": 2}, "1__ff": {"factor": 4}})), model, tmp_path / "a.safetensors")
    made = origin(form(apply=names(**{"0": {"factor": 2}, "0__ff": {}, "1__attn": {"factor": 4}})), table, path)
    assert not made.fits and made.same and all(name.startswith("transformer_blocks.0.") for name in made.same)
    assert {name.split(".")[2] for name in made.missing} == {"attn"}
    assert list(made.strange) == ["transformer_blocks_1_ff_net_0_proj", "transformer_blocks_1_ff_net_2"]
    other = origin(form(apply=names(**{"0": {"factor": 4}, "1__ff": {"factor": 4}})), table, path)
    meant, held = other.different["transformer_blocks.0.attn.to_q"]
    assert (meant["lokr_w1"], held["lokr_w1"]) == ((4, 4), (2, 2))
    assert (other.missing, other.strange) == ((), ())
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1, 1)}, path)
    with fails("is an adapter of PEFT's (transformer.transformer_blocks.0"):
        origin(form(apply=BLOCKS), table, path)
