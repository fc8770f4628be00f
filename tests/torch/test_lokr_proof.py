"""The proof, on the real LyCORIS: it finds nothing wrong where nothing is, and everything where it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from failing import fails
from lokr_models import ARTICLE_FACTORS, SMALL_TARGETS, Model, contribution, sd3_blocks, small_blocks, split
from synthetic_run import SD3_TARGETS

from simpletuner_layerprobe.lokr.adapter import Adapter, planned_adapter
from simpletuner_layerprobe.lokr.config import lycoris_config
from simpletuner_layerprobe.lokr.factors import achieved_factor
from simpletuner_layerprobe.lokr.groups import RATIOS, module_groups
from simpletuner_layerprobe.lokr.plan import Plan, make_plan
from simpletuner_layerprobe.lokr.proof import check_config, verify
from simpletuner_layerprobe.lokr.skeleton import skeleton
from simpletuner_layerprobe.models import Architecture, architecture
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.run.manifest import Module, Target

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


def article(model: Model | Architecture, blocks: tuple[str, ...], factors: list[int]) -> dict[str, Any]:
    """The article's config for these factors."""
    groups = module_groups(model, blocks)
    return lycoris_config("lokr", groups, [factors[g.number] * RATIOS[g.kind] for g in groups], model.targets)


def intended(model: Model, blocks: tuple[str, ...], factors: list[int]) -> dict[str, Adapter]:
    return {
        module.name: planned_adapter("lokr", module.shape, factors[group.number] * RATIOS[group.kind])
        for group in module_groups(model, blocks)
        for module in group.modules
    }


def other(algo: Any = "lokr", apply: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    config = {"algo": algo, "multiplier": 1, "linear_dim": 4, "linear_alpha": 2} | settings
    return config | ({} if apply is None else {"apply_preset": apply})


def with_target_module(config: dict[str, Any], *classes: str) -> dict[str, Any]:
    """The config in the article's form."""
    changed = copy.deepcopy(config)
    changed["apply_preset"]["target_module"] = list(classes)
    return changed


@pytest.fixture(scope="module")
def large() -> Architecture:
    return architecture("sd35-large", alone=True)


@pytest.fixture(scope="module")
def plan(large: Architecture) -> Plan:
    blocks = large.streams[0].blocks
    value_L = [1 - (factor - 1) / 11 for factor in ARTICLE_FACTORS]
    return make_plan(large, contribution(blocks, value_L))


@pytest.fixture(scope="module")
def config(plan: Plan) -> dict[str, Any]:
    return plan.config()


@pytest.fixture
def lycoris_state() -> Iterator[Any]:
    """LyCORIS's own network class; its preset is afterwards as it was."""
    from lycoris import LycorisNetwork

    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    yield LycorisNetwork
    for name, value in before.items():
        setattr(LycorisNetwork, name, value)


# SD3.5 Large


def test_lycoris_gives_every_module_of_sd35_large_what_the_plan_says(plan, large):
    check = plan.verify().check
    assert check is not None and len(check.rows) == 529
    assert (check.wrong, check.missing, check.extra, check.unmatched, check.notes) == ((), (), (), (), ())
    total = 0
    for row in check.rows:
        _, block, part, *_ = row.name.split(".")
        factor = ARTICLE_FACTORS[int(block)] * (2 if part == "attn" else 1)
        assert row.got.factorisation == (split(row.shape[0], factor), split(row.shape[1], factor))
        assert row.intended.factor == factor
        (a, b), (c, d) = row.got.factorisation
        total += a * c + b * d
    assert check.parameters == check.intended_parameters == plan.parameters == total == 765_636_738
    # and its config reads as it was meant
    assert [row.intended for row in check_config(plan.config(), large).rows] == [row.intended for row in check.rows]


def test_the_articles_published_file_leaks_into_the_next_block(large):
    """What is built, predicted from how LyCORIS 4.1.3 walks: each block gets the factor of the one before."""
    settings = {"algo": "lokr", "linear_dim": 1000000, "linear_alpha": 1, "full_matrix": True}
    published: dict[str, Any] = {**settings, "multiplier": 1.0, "factor": 1}
    published["apply_preset"] = {
        "target_module": ["JointTransformerBlock"],
        "name_algo_map": {
            f"transformer_blocks.{number}.{pattern}": {**settings, "factor": factor * level}
            for number, factor in enumerate(ARTICLE_FACTORS)
            for pattern, level in (("norm1*", 1), ("norm1_context*", 1), ("ff*", 1), ("*", 2))
        },
        "use_fnmatch": True,
    }
    check = check_config(published, large)
    for row in check.rows:
        _, block, part, *_ = row.name.split(".")
        written = ARTICLE_FACTORS[int(block)] * (2 if part == "attn" else 1)
        leaked = ARTICLE_FACTORS[int(block) - 1] if block != "0" else 1
        expected = [(split(size, written), split(size, leaked)) for size in row.shape]
        assert row.intended.factorisation == tuple(meant for meant, _ in expected)
        assert row.got.factorisation == tuple(got for _, got in expected)
        assert row.ok == all(meant == got for meant, got in expected)
    assert (len(check.rows), len(check.wrong)) == (529, 351)
    assert (check.intended_parameters, check.parameters) == (765_636_738, 1_123_057_848)
    assert "leak into the next class" in check.notes[0]
    with fails("builds 351 of 529 modules otherwise than meant, first transformer_blocks."):
        check.require()


def test_one_check_leaves_nothing_for_the_next(large, config, plan, lycoris_state, capsys):
    before = {name: value for name, value in vars(lycoris_state).items() if name.isupper()}
    logger = logging.getLogger("LyCORIS")
    level, disabled = logger.level, logger.disabled
    written = copy.deepcopy(config)
    leaking = with_target_module(config, "JointTransformerBlock")
    first = check_config(leaking, large)
    assert not verify(config, plan.intended, large).wrong
    assert check_config(leaking, large) == first
    assert not check_config(config, large).wrong

    assert config == written
    assert {name: value for name, value in vars(lycoris_state).items() if name.isupper()} == before
    assert (logger.level, logger.disabled) == (level, disabled)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    # and a preset that someone else left behind does not count
    lycoris_state.apply_preset({"target_module": ["Nothing"], "name_algo_map": {}, "lora_prefix": "else"})
    assert not verify(config, plan.intended, large).wrong
    assert lycoris_state.TARGET_REPLACE_MODULE == ["Nothing"]


@pytest.mark.parametrize(
    ("name", "algo", "count"),
    [
        ("sd35-medium", "lokr", 385),
        ("flux-dev", "lokr", 494),
        ("sd35-large", "locon", 529),
        ("sd35-large", "loha", 529),
    ],
)
def test_lycoris_gives_every_module_of_the_others_what_the_plan_says(name, algo, count):
    """With groups per stream, a frozen block and a full one."""
    model = architecture(name, alone=True)
    blocks = model.streams[0].blocks
    value_L = np.arange(len(blocks)) % 12 / 11
    options = {"preset": "100M", "freeze": (1,), "critical": (2,) if algo == "lokr" else "auto", "algo": algo}
    streams = {"image": value_L, "text": value_L[::-1]}
    made = make_plan(model, contribution(blocks, value_L), streams=streams, per_stream=True, **options).verify()
    check = made.check
    assert check is not None and check.parameters == made.parameters and check.unmatched == ()
    assert all(row.got is not None and row.got.scale == 1 for row in check.rows)
    every = make_plan(model, contribution(blocks, value_L)).intended
    assert len(every) == count
    assert {row.name for row in check.rows} == {name for name in every if not name.startswith(blocks[1] + ".")}
    again = check_config(made.config(), model)
    assert (again.wrong, again.intended_parameters, again.notes) == ((), made.parameters, ())


@pytest.mark.parametrize("algo", ["lokr", "locon", "loha"])
def test_layers_of_all_shapes(algo):
    layers = {
        "ff": ("Linear", (2432, 9728)),
        "mod": ("Linear", (14592, 2432)),
        "odd": ("Linear", (7, 13)),
        "row": ("Linear", (1, 5)),
        "a": ("Conv1d", (60, 84, 3)),
        "b": ("Conv2d", (64, 96, 1, 1)),
        "c": ("Conv2d", (64, 4, 3, 3)),
        "d": ("Conv3d", (64, 96, 2, 3, 3)),
    }
    modules = [Module("blocks", "ModuleList", ())]
    for block in small_blocks(12):
        modules.append(Module(block, "Block", ()))
        modules += [Module(f"{block}.{name}", *layer) for name, layer in layers.items()]
    model = Model(tuple(modules), SMALL_TARGETS)
    value_L = np.linspace(0, 1, 12)
    check = make_plan(model, contribution(small_blocks(12), value_L), algo=algo).verify().check
    assert check is not None and len(check.rows) == 12 * len(layers) and check.wrong == ()


def test_achieved_factor_is_lycoris_factorization():
    from lycoris.functional.general import factorization

    of_models = (640, 768, 1152, 1280, 1536, 2304, 2432, 3072, 4096, 4864, 9728, 12288, 14592, 15360, 21504)
    for dimension in (*range(1, 301), *of_models):
        for factor in (*range(1, 41), 50, 64, 100, 1216, 2432):
            part = achieved_factor(dimension, factor)
            assert (part, dimension // part) == factorization(dimension, factor), (dimension, factor)


# The skeleton is as good as the model


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    """A small SD3 transformer with weights."""
    from diffusers_models import MODELS

    return MODELS["SD3Transformer2DModel"].make()


def table_of(model: Any) -> tuple[Module, ...]:
    return tuple(Module(*row) for row in module_table(model))


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


CONFIGS: dict[str, Any] = {
    "ours": None,
    "the article's form": None,
    "SimpleTuner's default": other(
        apply={
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"Attention": {"factor": 6}, "FeedForward": {"factor": 4}},
        },
        linear_dim=10000,
        linear_alpha=1,
        factor=16,
    ),
    "without a preset": other(factor=2),
    "LoRA with norms": other("lora", {"target_module": ["Attention"]}, train_norm=True),
    "regular expressions": other(
        "loha",
        {
            "target_module": [],
            "name_algo_map": {
                "transformer_blocks.1": {"algo": "lokr", "factor": 4, "dim": 3},
                r"transformer_blocks\.[02]\.ff": {"algo": "full"},
                ".*to_q": {"dim": 2},
            },
        },
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_skeleton_gets_what_the_real_model_gets(tiny_model, lycoris_state, name):
    model = Model(table_of(tiny_model), SD3_TARGETS, model_class="SD3Transformer2DModel")
    config = CONFIGS[name] or article(model, sd3_blocks(3), [3, 1, 2])
    if name == "the article's form":
        config = with_target_module(config, "JointTransformerBlock")
    check = check_config(config, model)
    real = built_on_the_model(config, tiny_model, lycoris_state)
    assert {row.name: dict(row.got.tensors) for row in check.rows if row.got} == real
    assert real


def test_the_skeleton_is_the_model_without_weights(tiny_model):
    table = table_of(tiny_model)
    made = skeleton(table, "SD3Transformer2DModel")
    assert table_of(made) == table
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


SMALL = Model(small_table(), SMALL_TARGETS)
SMALL_BLOCKS, SMALL_FACTORS = small_blocks(3), [1, 2, 3]
SMALL_MEANT = intended(SMALL, SMALL_BLOCKS, SMALL_FACTORS)


def small_config(**names: dict[str, Any] | None) -> dict[str, Any]:
    """The config of the small table, with patterns added, changed or (None) taken away."""
    config = article(SMALL, SMALL_BLOCKS, SMALL_FACTORS)
    patterns = config["apply_preset"]["name_algo_map"] | names
    config["apply_preset"]["name_algo_map"] = {
        name: settings for name, settings in patterns.items() if settings is not None
    }
    return config


FF_3 = {"blocks.3.ff": planned_adapter("lokr", (96, 24), 1)}


@pytest.mark.parametrize(
    ("names", "more", "text", "kind"),
    [
        (
            {"blocks.1.ff*": {"factor": 4}},
            {},
            "blocks.1.ff: meant lokr factor 2 (2x2 + 48x12), gets lokr (4x4 + 24x6)",
            "",
        ),
        ({"blocks.0.ff*": {"algo": "loha", "dim": 4}}, {}, "blocks.0.ff: meant lokr factor 1", ""),
        ({"blocks.2.*": None}, {}, "gets no adapter", "missing"),
        ({"head": {"factor": 1}}, {}, "head: meant no adapter, gets lokr (1x1 + 12x24)", "extra"),
        ({}, FF_3, "blocks.3.ff: meant lokr factor 1 (1x1 + 96x24), gets no adapter", "missing"),
    ],
)
def test_a_module_that_gets_something_else(names, more, text, kind):
    check = verify(small_config(**names), SMALL_MEANT | more, SMALL)
    (row,) = check.wrong
    assert text in str(row)
    assert check.missing == (check.wrong if kind == "missing" else ())
    assert check.extra == (check.wrong if kind == "extra" else ())
    assert check.parameters - check.intended_parameters == sum(
        (row.got.parameters if row.got else 0) - (row.intended.parameters if row.intended else 0) for row in check.rows
    )
    with fails(f"builds 1 of {len(check.rows)} modules otherwise than meant, first {row.name}"):
        check.require()


def test_a_factor_that_comes_to_the_same_is_right():
    """5 does not divide 24 or 96 and comes to 4."""
    config = small_config(**{"blocks.1.ff*": {"factor": 5}})
    meant = SMALL_MEANT | {"blocks.1.ff": planned_adapter("lokr", (96, 24), 4)}
    check = verify(config, meant, SMALL)
    assert (len(check.rows), check.wrong) == (6, ())


def test_patterns_and_classes_that_match_nothing_are_told():
    config = small_config(**{"blocks.7.*": {"factor": 2}})
    config["apply_preset"] |= {"target_module": ["NoClass"], "target_name": ["tail*"]}
    check = check_config(config, SMALL)
    assert check.unmatched == ("blocks.7.*", "tail*", "NoClass")
    assert check.wrong == ()


def test_special_characters_in_a_block_path_are_taken_as_they_are():
    blocks = ("list[0].1", "list[0].10", "list*.1", "a?b.1")
    targets = tuple(Target(f"{name}.*", ("ff*",), ("*",)) for name in ("list[0]", "list*", "a?b"))
    modules = []
    for name, inside in (("list[0]", (1, 10)), ("list*", (1,)), ("a?b", (1,)), ("list0", (1,)), ("axb", (1,))):
        modules.append(Module(name, "ModuleList", ()))
        for number in inside:
            modules.append(Module(f"{name}.{number}", "Block", ()))
            modules += [Module(f"{name}.{number}.{part}", "Linear", (24, 96)) for part in ("ff", "attn")]
    model = Model(tuple(modules), targets)
    check = verify(article(model, blocks, [1, 2, 3, 4]), intended(model, blocks, [1, 2, 3, 4]), model)
    assert (len(check.rows), check.wrong, check.extra) == (8, (), ())


# Configs that others wrote


ALGORITHMS = ["lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "ia3", "tlora"]


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("more", [{}, {"dora_wd": True}, {"use_tucker": True}, {"full_matrix": True}], ids=str)
def test_every_algorithm_can_be_checked(algo, more):
    preset = {"target_module": ["Block"], "target_name": ["patch"], "name_algo_map": {"head": {"dim": 8}}}
    check = check_config(other(algo, preset, factor=4, dropout=0.1, **more), SMALL)
    assert check.wrong == ()
    assert {row.name for row in check.rows} == SMALL_MEANT.keys() | {"head", "patch"}
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


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (other("LoKr", {"target_module": ["Block"]}), SMALL_MEANT.keys()),
        (other(apply={"target_module": ["Conv2d", "Linear"]}, preset="attn-mlp"), SMALL_MEANT.keys() | {"head"}),
        (
            other(apply={"target_module": ["Block"], "exclude_name": ["blocks.1.*"], "use_fnmatch": True}),
            {name for name in SMALL_MEANT if not name.startswith("blocks.1.")},
        ),
    ],
    ids=["an algorithm in capitals", "a shipped preset", "modules left out"],
)
def test_what_is_meant_to_have_an_adapter(config, names):
    check = check_config(config, SMALL)
    assert {row.name for row in check.rows} == names and check.wrong == ()


def test_enable_conv_false_does_not_hold():
    apply = {"target_module": ["Conv2d"], "enable_conv": False}
    check = check_config(other(apply=apply, linear_dim=10_000, linear_alpha=1), SMALL)
    assert [row.name for row in check.extra] == [row.name for row in check.wrong] == ["patch"]
    assert check.notes == (
        "1 of 1 modules, 56 parameters, by the bare class Conv2d",
        "enable_conv false has no effect: LyCORIS turns it on again when it builds the network",
    )


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (other(apply={"target_module": ["Block"]}, multiplier=2.5), "multiplier 2.5 is read as 2"),
        (other(apply={"target_module": ["Block"]}, linear_alpha=2.5), "linear_alpha 2.5 is read as 2"),
        (other(), "target_module is left out"),
        (other(apply={"unet_target_module": ["Block"]}), "unet_target_module has no effect"),
    ],
)
def test_what_a_reader_should_know(config, note):
    assert any(note in one for one in check_config(config, SMALL).notes)


def test_quantised_layers():
    modules = [Module("block", "Block", ()), Module("block.a", "Linear4bit", (24, 36))]
    modules += [Module("block.b", "Fp8Linear", (24, 36)), Module("block.c", "CPUBouncingLinear", (24, 36))]
    check = check_config(other(apply={"target_module": ["Block"]}, factor=4), Model(tuple(modules)))
    assert [row.name for row in check.rows] == ["block.a", "block.b"]
    assert check.wrong == ()


BAD_CONFIGS = {
    "has no algo": {"multiplier": 1, "linear_dim": 1, "linear_alpha": 1},
    "has no linear_dim": {"algo": "lokr", "multiplier": 1, "linear_alpha": 1},
    "multiplier in mine.json is 'x'; expected a number": other(multiplier="x"),
    "linear_alpha in mine.json is None": other(linear_alpha=None),
    "the algo in mine.json is 'lokrr'; LyCORIS knows: lora": other("lokrr"),
    "the factor in mine.json is 0": other(factor=0),
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
    "cannot build the config: AssertionError: lora_dim must be a multiple of block_size": other(
        "dylora", {"target_module": ["Block"]}, linear_dim=6
    ),
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_a_config_that_is_refused(text):
    with fails(text):
        check_config(BAD_CONFIGS[text], SMALL, where="mine.json")


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
        check_config(other(apply={"target_module": ["Linear"]}), Model(tuple(BAD_TABLES[text])))
