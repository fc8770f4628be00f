from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
from failing import fails

from simpletuner_layerprobe.training import given as config
from simpletuner_layerprobe.training.own import lora_targets


@pytest.fixture
def parse(monkeypatch):
    """SimpleTuner's parser after `install`; it returns the arguments that it got."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    loader = SimpleNamespace(
        cmd_args=SimpleNamespace(get_argument_parser=lambda: parser),
        helpers={"cmd": lambda input_args=None, exit_on_error=False: input_args},
    )
    config.install(loader)

    def call(input_args, argv=()):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        return loader.helpers["cmd"](input_args=input_args)

    return call


def test_probe_options_of_the_command_line_count_beside_a_file(parse):
    got = parse(["--seed=4"], ["--layerprobe", "--num=3", "--layerprobe_samples", "7", "--layerprobe_dir=x"])
    assert got == ["--seed=4", "--layerprobe", "--layerprobe_samples=7", "--layerprobe_dir=x"]


def test_options_as_the_user_gave_them(parse):
    parse(["--seed=4", "--ema", "--lr=1e-4", "--name=04", "--item=a", "--item=b", "--off=false", "--x=1.50"])
    assert config.given_options() == {
        "seed": 4,
        "ema": True,
        "lr": "1e-4",
        "name": "04",
        "item": ["a", "b"],
        "off": False,
        "x": "1.50",
    }
    parse(None, ["--seed", "4", "--ema", "--layerprobe=true", "--layerprobe=false"])
    assert config.given_options() == {"seed": 4, "ema": True, "layerprobe": False}


def test_a_wrong_flag_reaches_the_parser_as_true_and_is_refused(parse):
    assert parse(["--layerprobe=maybe"]) == ["--layerprobe=true"]
    with fails("layerprobe is 'maybe'; it must be true or false"):
        config.check_flag()
    for good in ("true", "no", "1", "off"):
        parse([f"--layerprobe={good}"])
        config.check_flag()


def test_the_parser_takes_any_value_of_the_probes_choices_and_no_other():
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("layerprobe_sigmas", "optimizer"):
        parser.add_argument(f"--{name}", choices=["uniform", "adamw"])
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--layerprobe_sigmas=even"])
    config.take_any_value(parser)
    assert parser.parse_args(["--layerprobe_sigmas=even"]).layerprobe_sigmas == "even"
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--optimizer=even"])


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, ValueError])
def test_the_modules_of_a_lora_are_kept_if_simpletuner_names_them(error):
    def targets(names: object) -> object:
        def get_lora_target_layers() -> object:
            if isinstance(names, type):
                raise names()
            return names

        return SimpleNamespace(get_lora_target_layers=get_lora_target_layers)

    standard = SimpleNamespace(model_type="lora", lora_type="Standard")
    assert lora_targets(standard, targets(["to_q", "to_k"])) == ["to_q", "to_k"]
    assert lora_targets(standard, targets("all-linear")) is None
    assert lora_targets(standard, targets(error)) is None
    for other in ({"model_type": "full"}, {"lora_type": "lycoris"}):
        assert lora_targets(SimpleNamespace(**vars(standard) | other), targets(["to_q"])) is None
