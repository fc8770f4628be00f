from __future__ import annotations

from types import SimpleNamespace

import pytest
from failing import fails

from simpletuner_layerprobe.training.options import OPTIONS, ProbeSettings


def config(**options: object) -> SimpleNamespace:
    defaults = {option.name: option.default for option in OPTIONS}
    return SimpleNamespace(**(defaults | {"output_dir": "out", "layerprobe": True} | options))


def test_defaults():
    settings = ProbeSettings.from_config(config())
    assert settings == ProbeSettings(directory="out/layerprobe", sigmas="stratified", samples=600, flush_seconds=30.0)
    assert ProbeSettings.from_config(config(layerprobe=False)) is None


def test_values_as_the_command_line_gives_them():
    settings = ProbeSettings.from_config(
        config(
            layerprobe_dir="~/x",
            layerprobe_samples="1e3",
            layerprobe_flush_seconds="0.5",
            layerprobe_stop_when_stable="0.95",
            layerprobe_preset="1.5GB",
            layerprobe_residual=True,
            layerprobe_block_pairs="4",
        )
    )
    assert settings is not None
    assert settings.stop_when_stable == 0.95 and settings.preset == "1.5GB"
    assert settings.residual and settings.block_pairs == 4
    assert settings.samples == 1000 and settings.flush_seconds == 0.5
    assert settings.directory.endswith("/x") and not settings.directory.startswith("~")


@pytest.mark.parametrize(
    ("value", "stable", "samples"),
    [
        ("auto", 0, 600),
        ("auto", 0.95, 2000),
        ("", 0, 600),
        (0, 0.95, 0),
        ("0", 0, 0),
        (40, 0.95, 40),
        (" Auto ", 0, 600),
    ],
)
def test_samples_are_a_recommendation_unless_they_are_given(value, stable, samples):
    settings = ProbeSettings.from_config(config(layerprobe_samples=value, layerprobe_stop_when_stable=stable))
    assert settings is not None and settings.samples == samples


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layerprobe_sigmas", "gauss"),
        ("layerprobe_samples", "-1"),
        ("layerprobe_samples", "2.5"),
        ("layerprobe_samples", "nan"),
        ("layerprobe_samples", "inf"),
        ("layerprobe_samples", None),
        ("layerprobe_samples", "automatic"),
        ("layerprobe_block_pairs", "-2"),
        ("layerprobe_block_pairs", "2.5"),
        ("layerprobe_block_pairs", "all"),
        ("layerprobe_noise_seed", "-1"),
        ("layerprobe_noise_seed", "1.5"),
        ("layerprobe_noise_seed", str(2**63)),
        ("layerprobe_noise_seed", "9" * 5000),
        ("layerprobe_noise_seed", "some"),
        ("layerprobe_flush_seconds", "0"),
        ("layerprobe_flush_seconds", "inf"),
        ("layerprobe_flush_seconds", "soon"),
        ("layerprobe_stop_when_stable", "1"),
        ("layerprobe_stop_when_stable", "0.2"),
        ("layerprobe_stop_when_stable", "-0.95"),
        ("layerprobe_stop_when_stable", "nan"),
        ("layerprobe_stop_when_stable", "always"),
        ("layerprobe_stop_when_stable", None),
    ],
)
def test_wrong_values_name_the_option(name, value):
    with fails(f"{name} is"):
        ProbeSettings.from_config(config(**{name: value}))


@pytest.mark.parametrize(
    ("value", "seed"), [("none", None), (None, None), ("", None), ("7", 7), (0, 0), (str(2**63 - 1), 2**63 - 1)]
)
def test_a_noise_seed_is_a_whole_number_or_none(value, seed):
    settings = ProbeSettings.from_config(config(layerprobe_noise_seed=value))
    assert settings is not None and settings.noise_seed == seed


def test_a_noise_seed_and_the_sigmas_of_a_training_do_not_go_together():
    with fails("layerprobe_noise_seed fixes the noise levels, and layerprobe_sigmas is 'training'"):
        ProbeSettings.from_config(config(layerprobe_noise_seed=1, layerprobe_sigmas="training"))


def test_every_option_has_a_label_and_help():
    for option in OPTIONS:
        assert option.name.startswith("layerprobe") and option.label and option.help.endswith(".")
