"""The proof, on the real LyCORIS: it finds nothing wrong where nothing is, and everything where it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from failing import fails

from simpletuner_layerprobe.lokr.config import Planned, article_config, article_plan
from simpletuner_layerprobe.lokr.proof import check_config, skeleton, verify
from simpletuner_layerprobe.models import Architecture, architecture
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.families import Target
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.run.manifest import Module

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

SD3 = families.family("sd3").targets
# Made up: most blocks contribute little, the article's three critical blocks have factor 1.
FACTORS = [1, 12, 11, 9, 12, 10, 7, 12, 11, 10, 8, 6, 5, 9, 11, 12, 10, 9, 8]
FACTORS += [6, 5, 4, 3, 4, 5, 6, 4, 3, 3, 2, 4, 1, 7, 5, 4, 1, 6, 6]


def split(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS's split, by trying: the larger the small part, the better, up to the factor and the middle."""
    if dimension % factor == 0:
        return tuple(sorted((factor, dimension // factor)))
    small = max(d for d in range(1, factor + 1) if dimension % d == 0 and d * d <= dimension)
    return small, dimension // small


def numbers(shape: tuple[int, ...], factor: int) -> int:
    (a, b), (c, d) = split(shape[0], factor), split(shape[1], factor)
    return a * c + b * d


def with_target_module(config: dict[str, Any], *classes: str) -> dict[str, Any]:
    """The config in the article's form."""
    changed = copy.deepcopy(config)
    changed["apply_preset"]["target_module"] = list(classes)
    return changed


@pytest.fixture(scope="module")
def large() -> Architecture:
    return architecture("sd35-large")


@pytest.fixture(scope="module")
def config(large: Architecture) -> dict[str, Any]:
    return article_config(large.streams[0].blocks, FACTORS, SD3)


@pytest.fixture(scope="module")
def plan(large: Architecture) -> tuple[Planned, ...]:
    return article_plan(large.streams[0].blocks, FACTORS, SD3, large.modules)


@pytest.fixture
def lycoris_state() -> Iterator[Any]:
    """LyCORIS's own network class; its preset is afterwards as it was."""
    from lycoris import LycorisNetwork

    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    yield LycorisNetwork
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


# SD3.5 Large


def test_lycoris_gives_every_module_of_sd35_large_what_the_plan_says(large, config, plan):
    check = verify(config, plan, large.modules, model_class=large.model_class)
    assert len(check.rows) == 529
    assert (check.wrong, check.missing, check.extra, check.unmatched, check.notes) == ((), (), (), (), ())
    check.require()

    total = 0
    for row in check.rows:
        _, block, part, *_ = row.name.split(".")
        factor = FACTORS[int(block)] * (2 if part == "attn" else 1)
        assert row.got.factorisation == (split(row.shape[0], factor), split(row.shape[1], factor))
        assert row.intended.factor == factor
        total += numbers(row.shape, factor)
    assert check.parameters == check.intended_parameters == total
    assert sum(check.block_parameters(f"transformer_blocks.{n}") for n in range(38)) == total
    assert check.block_parameters("transformer_blocks.1") == sum(
        row.got.parameters for row in check.rows if row.name.split(".")[1] == "1"
    )


def test_the_reading_of_the_config_is_the_plan(large, config, plan):
    check = check_config(config, large.modules)
    assert not check.wrong
    assert {row.name: row.intended.factor for row in check.rows} == {one.name: one.factor for one in plan}


def test_the_articles_form_leaks_into_the_next_block(large, config):
    """What is built, predicted from how LyCORIS 4.1.3 walks: each block gets the factor of the one before."""
    check = check_config(with_target_module(config, "JointTransformerBlock"), large.modules)
    assert len(check.rows) == 529
    wrong = intended = effective = 0
    for row in check.rows:
        _, block, part, *_ = row.name.split(".")
        written = FACTORS[int(block)] * (2 if part == "attn" else 1)
        leaked = FACTORS[int(block) - 1] if block != "0" else config["factor"]
        expected = [(split(size, written), split(size, leaked)) for size in row.shape]
        assert row.intended.factorisation == tuple(one for one, _ in expected)
        assert row.got.factorisation == tuple(other for _, other in expected)
        assert row.ok == all(one == other for one, other in expected)
        wrong += not row.ok
        intended += numbers(row.shape, written)
        effective += numbers(row.shape, leaked)
    assert len(check.wrong) == wrong > 300
    assert (check.intended_parameters, check.parameters) == (intended, effective)
    assert effective > intended
    assert "leak into the next class" in check.notes[0]
    with fails(f"builds {wrong} of 529 modules otherwise than meant, first transformer_blocks."):
        check.require()


def test_one_check_leaves_nothing_for_the_next(large, config, plan, lycoris_state, capsys):
    before = {name: value for name, value in vars(lycoris_state).items() if name.isupper()}
    logger = logging.getLogger("LyCORIS")
    level, disabled = logger.level, logger.disabled
    article = with_target_module(config, "JointTransformerBlock")
    first = check_config(article, large.modules)
    assert not verify(config, plan, large.modules).wrong
    assert check_config(article, large.modules) == first
    assert not check_config(config, large.modules).wrong

    assert {name: value for name, value in vars(lycoris_state).items() if name.isupper()} == before
    assert (logger.level, logger.disabled) == (level, disabled)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    # and a preset that someone else left behind does not count
    lycoris_state.apply_preset({"target_module": ["Nothing"], "name_algo_map": {}, "lora_prefix": "else"})
    assert not verify(config, plan, large.modules).wrong
    assert lycoris_state.TARGET_REPLACE_MODULE == ["Nothing"]


def test_the_config_is_not_changed(large, config, plan):
    before = copy.deepcopy(config)
    verify(config, plan, large.modules)
    check_config(config, large.modules)
    assert config == before


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev"])
def test_lycoris_gives_every_module_of_the_others_what_the_plan_says(name):
    model = architecture(name)
    blocks = model.streams[0].blocks
    factors = [1 + number % 12 for number in range(len(blocks))]
    targets = families.family(model.family).targets
    plan = article_plan(blocks, factors, targets, model.modules)
    check = verify(article_config(blocks, factors, targets), plan, model.modules)
    assert (check.wrong, check.unmatched) == ((), ())
    assert len(check.rows) == len(plan) == {"sd35-medium": 385, "flux-dev": 494}[name]


# The skeleton is as good as the model


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    """A small SD3 transformer with weights."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=6,
        joint_attention_dim=32,
        caption_projection_dim=48,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


TINY_FACTORS = [3, 1, 8, 5]
TINY_BLOCKS = [f"transformer_blocks.{number}" for number in range(4)]
SIMPLETUNER_DEFAULT = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 6}, "FeedForward": {"factor": 4}},
    },
}


def built_on_the_model(config: dict[str, Any], model: Any, network_class: Any) -> dict[str, dict]:
    """What SimpleTuner 4.10.1 does with a LyCORIS config, on a real model: module name -> tensor shapes."""
    from lycoris import create_lycoris

    config = copy.deepcopy(config)
    multiplier = int(config.pop("multiplier"))
    linear_dim = int(config.pop("linear_dim"))
    linear_alpha = int(config.pop("linear_alpha"))
    if config.get("apply_preset"):
        network_class.apply_preset(config["apply_preset"])
    network = create_lycoris(model, multiplier, linear_dim, linear_alpha, **config)
    names = {f"lycoris_{name}".replace(".", "_"): name for name, _ in model.named_modules()}
    built = {
        names[lora.lora_name]: {name: tuple(one.shape) for name, one in lora.named_parameters()}
        for lora in network.loras
    }
    return {name: shapes for name, shapes in built.items() if shapes}


OURS = article_config(TINY_BLOCKS, TINY_FACTORS, SD3)
CONFIGS = {
    "ours": OURS,
    "the article's form": with_target_module(OURS, "JointTransformerBlock"),
    "SimpleTuner's default": SIMPLETUNER_DEFAULT,
    "without a preset": {"algo": "lokr", "multiplier": 1, "linear_dim": 4, "linear_alpha": 2, "factor": 2},
    "LoRA with norms": {
        "algo": "lora",
        "multiplier": 1,
        "linear_dim": 4,
        "linear_alpha": 2,
        "train_norm": True,
        "apply_preset": {"target_module": ["Attention"]},
    },
    "regular expressions": {
        "algo": "loha",
        "multiplier": 1,
        "linear_dim": 4,
        "linear_alpha": 2,
        "apply_preset": {
            "target_module": [],
            "name_algo_map": {
                "transformer_blocks.1": {"algo": "lokr", "factor": 4, "dim": 3},
                r"transformer_blocks\.[23]\.ff": {"algo": "full"},
                ".*to_q": {"dim": 2},
            },
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_skeleton_gets_what_the_real_model_gets(tiny_model, lycoris_state, name):
    check = check_config(CONFIGS[name], module_table(tiny_model), model_class="SD3Transformer2DModel")
    real = built_on_the_model(CONFIGS[name], tiny_model, lycoris_state)
    assert {row.name: dict(row.got.tensors) for row in check.rows if row.got} == real
    assert real


def test_the_skeleton_is_the_model_without_weights(tiny_model):
    table = module_table(tiny_model)
    made = skeleton(table, "SD3Transformer2DModel")
    assert module_table(made) == table
    assert type(made).__name__ == "SD3Transformer2DModel"
    assert all(parameter.is_meta for parameter in made.parameters())


# Whatever differs is found


def small_table() -> tuple[Module, ...]:
    modules = [Module("blocks", "ModuleList", ())]
    for number in range(3):
        modules += [
            Module(f"blocks.{number}", "Block", ()),
            Module(f"blocks.{number}.norm", "LayerNorm", (24,)),
            Module(f"blocks.{number}.attn", "Linear", (24, 36)),
            Module(f"blocks.{number}.ff", "Linear", (96, 24)),
        ]
    return (*modules, Module("head", "Linear", (12, 24)), Module("patch", "Conv2d", (24, 4, 2, 2)))


SMALL = small_table()
SMALL_TARGETS = [Target("blocks.*", ("ff*",), ("*",))]
SMALL_BLOCKS, SMALL_FACTORS = ["blocks.0", "blocks.1", "blocks.2"], [1, 2, 3]
SMALL_PLAN = article_plan(SMALL_BLOCKS, SMALL_FACTORS, SMALL_TARGETS, SMALL)


def small_config(**names: dict[str, Any] | None) -> dict[str, Any]:
    """The config of the small table, with patterns added, changed or (None) taken away."""
    config = article_config(SMALL_BLOCKS, SMALL_FACTORS, SMALL_TARGETS)
    patterns = config["apply_preset"]["name_algo_map"] | names
    config["apply_preset"]["name_algo_map"] = {
        name: settings for name, settings in patterns.items() if settings is not None
    }
    return config


def other(algo: Any = "lokr", apply: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    config = {"algo": algo, "multiplier": 1, "linear_dim": 4, "linear_alpha": 2} | settings
    return config | ({} if apply is None else {"apply_preset": apply})


def test_the_small_config_is_right():
    check = verify(small_config(), SMALL_PLAN, SMALL)
    assert (len(check.rows), check.wrong) == (6, ())


def test_another_factor_is_found():
    check = verify(small_config(**{"blocks.1.ff*": {"factor": 4}}), SMALL_PLAN, SMALL)
    (row,) = check.wrong
    assert str(row) == "blocks.1.ff: meant lokr factor 2 (2x2 + 48x12), gets lokr (4x4 + 24x6)"
    assert row.got.factorisation == ((4, 24), (4, 6))
    with fails("builds 1 of 6 modules otherwise than meant, first blocks.1.ff"):
        check.require()


def test_a_factor_that_comes_to_the_same_is_right():
    # 5 does not divide 24 or 96 and comes to 4
    config = small_config(**{"blocks.1.ff*": {"factor": 5}})
    plan = [Planned(one.name, one.shape, 4 if one.name == "blocks.1.ff" else one.factor) for one in SMALL_PLAN]
    assert verify(config, plan, SMALL).wrong == ()


def test_a_missing_module_is_found():
    check = verify(small_config(**{"blocks.2.*": None}), SMALL_PLAN, SMALL)
    assert [row.name for row in check.wrong] == [row.name for row in check.missing] == ["blocks.2.attn"]
    assert str(check.wrong[0]).endswith("gets no adapter")
    assert check.extra == ()


def test_an_extra_module_is_found():
    check = verify(small_config(head={"factor": 1}), SMALL_PLAN, SMALL)
    assert [row.name for row in check.wrong] == [row.name for row in check.extra] == ["head"]
    assert str(check.wrong[0]) == "head: meant no adapter, gets lokr (1x1 + 12x24)"
    assert check.intended_parameters == check.parameters - check.extra[0].got.parameters


def test_a_planned_module_that_the_model_does_not_have_is_found():
    check = verify(small_config(), [*SMALL_PLAN, Planned("blocks.3.ff", (96, 24), 1)], SMALL)
    assert [row.name for row in check.wrong] == [row.name for row in check.missing] == ["blocks.3.ff"]


def test_another_algorithm_is_found():
    check = verify(small_config(**{"blocks.0.ff*": {"algo": "loha", "dim": 4}}), SMALL_PLAN, SMALL)
    assert [(row.name, row.got.algo) for row in check.wrong] == [("blocks.0.ff", "loha")]


def test_patterns_and_classes_that_match_nothing_are_told():
    config = small_config(**{"blocks.7.*": {"factor": 2}})
    config["apply_preset"] |= {"target_module": ["NoClass"], "target_name": ["tail*"]}
    check = check_config(config, SMALL)
    assert check.unmatched == ("blocks.7.*", "tail*", "NoClass")
    assert check.wrong == ()


def test_special_characters_in_a_block_path_are_taken_as_they_are():
    blocks = ["list[0].1", "list[0].10", "list*.1", "a?b.1"]
    targets = [Target(f"{name}.*", ("ff*",), ("*",)) for name in ("list[0]", "list*", "a?b")]
    modules = []
    for name, numbers_in in (
        ("list[0]", (1, 10)),
        ("list*", (1,)),
        ("a?b", (1,)),
        ("list0", (1,)),
        ("axb", (1,)),
    ):
        modules.append(Module(name, "ModuleList", ()))
        for number in numbers_in:
            modules.append(Module(f"{name}.{number}", "Block", ()))
            modules += [Module(f"{name}.{number}.{part}", "Linear", (24, 96)) for part in ("ff", "attn")]
    plan = article_plan(blocks, [1, 2, 3, 4], targets, modules)
    check = verify(article_config(blocks, [1, 2, 3, 4], targets), plan, modules)
    assert (len(check.rows), check.wrong, check.extra) == (8, (), ())


def test_blocks_1_and_10_are_two_blocks():
    modules = [Module("blocks", "ModuleList", ())]
    for number in range(12):
        modules += [
            Module(f"blocks.{number}", "Block", ()),
            Module(f"blocks.{number}.ff", "Linear", (24, 96)),
        ]
    blocks = [f"blocks.{number}" for number in range(12)]
    factors = [1 + number for number in range(12)]
    plan = article_plan(blocks, factors, SMALL_TARGETS, modules)
    assert verify(article_config(blocks, factors, SMALL_TARGETS), plan, modules).wrong == ()


# Configs that others wrote


ALGORITHMS = ["lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "ia3", "tlora"]


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("more", [{}, {"dora_wd": True}, {"use_tucker": True}, {"full_matrix": True}], ids=str)
def test_every_algorithm_can_be_checked(algo, more):
    preset = {"target_module": ["Block"], "target_name": ["patch"], "name_algo_map": {"head": {"dim": 8}}}
    check = check_config(other(algo, preset, factor=4, dropout=0.1, **more), SMALL)
    assert check.wrong == ()
    assert {row.name for row in check.rows} == {one.name for one in SMALL_PLAN} | {"head", "patch"}
    assert check.parameters > 0


def test_another_dim_and_another_alpha_are_differences():
    """Here the settings for block 1 leak into block 2."""
    names = {r"blocks\.1\.": {"dim": 8, "alpha": 8}, r"blocks\.2\.": {"alpha": 1}}
    check = check_config(other("locon", {"target_module": ["Block"], "name_algo_map": names}), SMALL)
    assert [row.name for row in check.wrong] == [f"blocks.{n}.{part}" for n in (1, 2) for part in ("attn", "ff")]
    assert [str(row) for row in check.wrong[::2]] == [
        "blocks.1.attn: meant lora (8x36 + 24x8), gets lora (4x36 + 24x4) scale 0.5",
        "blocks.2.attn: meant lora (4x36 + 24x4) scale 0.25, gets lora (8x36 + 24x8)",
    ]


def test_the_innermost_class_decides():
    preset = {
        "target_module": ["Block"],
        "module_algo_map": {"Linear": {"factor": 3}, "Block": {"factor": 2}},
    }
    check = check_config(other(apply=preset, full_matrix=True), SMALL)
    assert {row.intended.factor for row in check.rows} == {3}
    assert check.wrong == ()


def test_left_out_modules_are_meant_to_have_nothing():
    preset = {"target_module": ["Block"], "exclude_name": ["blocks.1.*"], "use_fnmatch": True}
    check = check_config(other(apply=preset), SMALL)
    assert {row.name for row in check.rows} == {f"blocks.{n}.{part}" for n in (0, 2) for part in ("attn", "ff")}
    assert check.wrong == ()


def test_enable_conv_false_does_not_hold():
    check = check_config(other(apply={"target_module": ["Conv2d"], "enable_conv": False}), SMALL)
    assert [row.name for row in check.extra] == [row.name for row in check.wrong] == ["patch"]
    assert check.notes == ("enable_conv false has no effect: LyCORIS turns it on again when it builds the network",)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (other(apply={"target_module": ["Block"]}, multiplier=0.5), "multiplier 0.5 is read as 0"),
        (other(apply={"target_module": ["Block"]}, linear_alpha=2.5), "linear_alpha 2.5 is read as 2"),
        (other(), "target_module is left out"),
        (other(apply={"target_module": []}), "no module of the model gets an adapter"),
        (other(apply={"unet_target_module": ["Block"]}), "unet_target_module has no effect"),
    ],
)
def test_what_a_reader_should_know(config, note):
    assert any(note in one for one in check_config(config, SMALL).notes)


def test_train_norm_on_norms_without_weights():
    modules = (*SMALL, Module("blocks.0.norm2", "LayerNorm", ()))
    check = check_config(other(apply={"target_module": ["Block"]}, train_norm=True), modules)
    assert [(row.name, row.got.algo) for row in check.rows if "norm" in row.name] == [
        (f"blocks.{number}.norm", "norm") for number in range(3)
    ]
    assert check.wrong == ()
    assert "the model has 1 LayerNorms without a weight" in check.notes[0]


def test_quantised_layers():
    modules = [Module("block", "Block", ()), Module("block.a", "Linear4bit", (24, 36))]
    modules += [Module("block.b", "Fp8Linear", (24, 36)), Module("block.c", "CPUBouncingLinear", (24, 36))]
    check = check_config(other(apply={"target_module": ["Block"]}, factor=4), modules)
    assert [row.name for row in check.rows] == ["block.a", "block.b"]
    assert check.wrong == ()


def test_a_shipped_preset():
    check = check_config(other(apply={"target_module": ["Conv2d", "Linear"]}, preset="attn-mlp"), SMALL)
    assert check.rows


BAD_CONFIGS = {
    "has no algo": {"multiplier": 1, "linear_dim": 1, "linear_alpha": 1},
    "has no multiplier": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 1},
    "has no linear_alpha": {"algo": "lokr", "multiplier": 1, "linear_dim": 1},
    "has no linear_dim": {"algo": "lokr", "multiplier": 1, "linear_alpha": 1},
    "multiplier in mine.json is 'x'; expected a number": other(multiplier="x"),
    "linear_dim in mine.json is None": other(linear_dim=None),
    "linear_alpha in mine.json is True": other(linear_alpha=True),
    "the algo in mine.json is 'lokrr'; LyCORIS knows: lora": other("lokrr"),
    "the algo in mine.json is 3": other(algo=3),
    "the factor in mine.json is 0": other(factor=0),
    "the factor in mine.json is -2": other(factor=-2),
    "the factor in mine.json is 'big'": other(factor="big"),
    "the factor in mine.json is 2.5": other(factor=2.5),
    "the factor in mine.json is inf": other(factor=float("inf")),
    "apply_preset in mine.json is a list": other(apply_preset=[]),
    "has the unknown key 'target_modules'": other(apply={"target_modules": []}),
    "target_module in mine.json is 'Block'; expected a list": other(apply={"target_module": "Block"}),
    "exclude_name in mine.json is [1]": other(apply={"exclude_name": [1]}),
    "name_algo_map in mine.json is a list": other(apply={"name_algo_map": []}),
    "name_algo_map['head'] in mine.json is 4; expected an object": other(apply={"name_algo_map": {"head": 4}}),
    "the factor in name_algo_map['head'] in mine.json is None": other(
        apply={"name_algo_map": {"head": {"factor": None}}}
    ),
    "the algo in module_algo_map['Linear'] in mine.json is 'LoKr'": other(
        apply={"module_algo_map": {"Linear": {"algo": "LoKr"}}}
    ),
    "'*.ff' in name_algo_map in mine.json is not a regular expression": other(apply={"name_algo_map": {"*.ff": {}}}),
    "preset 'mine.toml' is neither one of LyCORIS's": other(preset="mine.toml"),
    "preset in mine.json is ['full']; expected the name": other(preset=["full"]),
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_a_config_that_is_refused(text):
    with fails(text):
        check_config(BAD_CONFIGS[text], SMALL, where="mine.json")


def test_a_config_that_lycoris_refuses():
    with fails("cannot build the config: AssertionError: lora_dim must be a multiple of block_size"):
        check_config(other("dylora", {"target_module": ["Block"]}, linear_dim=6), SMALL)


@pytest.mark.parametrize("algo", ["LOKR", "LoKr"])
def test_the_global_algorithm_in_capitals(algo):
    assert check_config(other(algo, {"target_module": ["Block"]}), SMALL).wrong == ()


BAD_TABLES = {
    "'a' comes twice": [Module("a", "Linear", (4, 4)), Module("a", "Linear", (4, 4))],
    "'a.b' comes twice, before its parent": [Module("a.b", "Linear", (4, 4))],
    "'forward' comes twice, before its parent, or under a name": [Module("forward", "Linear", (4, 4))],
    "the class name 'a b'": [Module("a", "a b", ())],
    "the class name ''": [Module("a", "", ())],
    "has the shape (0, 4)": [Module("a", "Linear", (0, 4))],
    "has the shape (4, 1099511627775)": [Module("a", "Linear", (4, 2**40 - 1))],
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_table_that_is_no_models(text):
    with fails(text):
        check_config(other(apply={"target_module": ["Linear"]}), BAD_TABLES[text])
