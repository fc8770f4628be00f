"""--model has what SimpleTuner trains: its own classes, family by family, and what LyCORIS builds on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import in_a_process
from real import SimpleTuner

from simpletuner_layerprobe.probe.families import FAMILIES

FOLDER = Path(__file__).parent / "families"
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 3,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "sample_size": 16,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}
LOKR = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "factor": 8}
NAMES = sorted({family.name for family in FAMILIES})


@pytest.fixture(scope="module")
def cases(simpletuner) -> dict[str, list[dict]]:
    """What tables.py says of each family's cases."""
    said: dict[str, list[dict]] = {}
    for line in lines_of("tables.py", simpletuner):
        said.setdefault(line["family"], []).append(line)
    return said


def lines_of(script: str, simpletuner: SimpleTuner) -> list[dict]:
    done = simpletuner.script(FOLDER / script)
    assert done.stdout, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_and_the_networks_are_those_of_simpletuners_class(cases, name):
    for case in cases[name]:
        assert "error" not in case, case["error"]
        assert case["tables"] == [] and case["light"], case
        assert case["planned"][0] == case["planned"][1] > 0
        assert not any(case["networks"].values()), case["networks"]


def test_every_entry_of_the_table_was_built(cases):
    classes = {(name, case["class"]) for name, known in cases.items() for case in known}
    assert classes == {(family.name, family.source.partition(":")[2]) for family in FAMILIES}


def test_the_layers_of_a_quantised_base_are_those_of_simpletuners_function(simpletuner):
    lines = lines_of("precisions.py", simpletuner)
    assert len(lines) >= 15
    assert [line for line in lines if line["different"]] == []
    replaced = {kind for line in lines for kind in line["layers"]}
    assert {"Linear", "QLinear", "SDNQLinear", "Fp8NativeLinear"} <= replaced
    # And the networks that LyCORIS builds on them are those that check-config says.
    assert [line for line in lines if line["disagree"]] == []
    assert all(sum(map(bool, line["forms"].values())) >= 3 for line in lines)


@pytest.fixture
def check(tmp_path, simpletuner):
    """Runs check-config, with own_process as users do: in a process that has imported nothing yet."""
    config, model = tmp_path / "lycoris_config.json", tmp_path / "config.json"
    model.write_text(json.dumps(SD3))

    def run(
        settings: dict, *options: str, on: str = str(model), own_process: bool = False
    ) -> subprocess.CompletedProcess[str]:
        config.write_text(json.dumps(LOKR | settings))
        arguments = ("check-config", str(config), "--model", on, *options)
        if own_process:
            return in_a_process(*arguments, stdout=subprocess.PIPE)
        return simpletuner.script(Path(sys.executable).with_name("layerprobe"), *arguments)

    return run


def test_a_config_that_depends_on_the_precision(check):
    plain, quantised = (check({}, *options, own_process=True) for options in ((), ("--precision", "int8-quanto")))
    assert (plain.returncode, quantised.returncode, plain.stderr, quantised.stderr) == (0, 0, "", "")
    assert ": 0 of 51 modules wrong" in plain.stdout and ": 0 of 14 modules wrong" in quantised.stdout
    note = "note layers are reached by their own class (Conv2d, Linear), of which a quantised base has fewer: say its"
    assert note in " ".join(plain.stdout.split()) and "of which a quantised base" not in quantised.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--precision", "nf4-bnb"),
            "SimpleTuner cannot replace the layers for nf4-bnb here: it does so while it loads",
        ),
        (("--precision", "int9"), "SimpleTuner has no base_model_precision 'int9'; it has: no_change, int8-quanto"),
    ],
)
def test_a_precision_that_cannot_be_told(check, options, text):
    done = check({}, *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"layerprobe: error: {text}")


def test_what_cannot_train_exits_with_1(check):
    nothing = check({"apply_preset": {"target_module": ["WanAttention"]}}, on="wan21-1.3b")
    assert (nothing.returncode, nothing.stdout.splitlines()[0]) == (
        1,
        "note   nothing in the model matches WanAttention",
    )
    assert nothing.stderr.endswith("gives no module of this model an adapter: nothing would train\n")
    norms = check({"train_norm": True, "apply_preset": {"target_module": ["JointTransformerBlock"]}}, "--differences")
    assert norms.returncode == 1 and "STOPS  train_norm: LyCORIS takes 11 norms without a weight" in norms.stdout
    assert "0 of 54 modules wrong" in norms.stdout and norms.stderr.count("\n") == 1
