"""The recorded sigma is the noise that is in the latents: SimpleTuner's own batches, and some that are not so."""

from __future__ import annotations

import pytest
from test_real_run import assert_one_line_error, contents, run_of

from simpletuner_layerprobe.training.noise_check import U


def test_every_batch_says_how_far_its_noise_is_from_its_sigma(simpletuner, tiny):
    folder = tiny(max_train_steps=12, train_batch_size=2, layerprobe_flush_seconds=1e-6, input_perturbation=0.1)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    differences = [float(notes["noise_difference"]) for file in run.files for notes in file.notes]
    assert len(differences) == 12 and 0 < max(differences) < U
    assert "least squares" in run.manifest.settings["noise_check"]


def test_mixflow_is_off(simpletuner, tiny):
    folder = tiny(max_train_steps=6, mixflow_enabled=True)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert "one noise level per sample: mixflow_enabled (was True)" in result.log
    assert run_of(folder).samples == 6


@pytest.mark.parametrize("sigmas", ["training", "uniform"])
def test_latents_that_are_mixed_at_another_sigma_end_the_run_at_its_first_step(simpletuner, tiny, sigmas):
    folder = tiny(max_train_steps=6, layerprobe_sigmas=sigmas)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:mixflow_after_all")
    assert_one_line_error(result, "are mixed with noise at sigma 0.", "and its batch says sigma 0.")
    assert run_of(folder).samples == 0


def test_what_was_written_before_is_kept_and_the_wrong_samples_are_not(simpletuner, tiny):
    folder = tiny(max_train_steps=9, layerprobe_flush_seconds=1e-6)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:another_noise_in_the_fifth_step")
    assert_one_line_error(result, "are mixed with noise at sigma 0.", "and its batch says sigma 0.")
    assert "ended by an error; what was written is kept" in result.log
    run = run_of(folder)
    assert run.samples == 4 and len(contents(run)) == 1


def test_a_sigma_outside_its_range_names_the_rule(simpletuner, tiny):
    folder = tiny(max_train_steps=2)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:sigmas_of_another_convention")
    assert_one_line_error(result, "a batch has sigma", "by the rule 'flow', expected 0 to 1")
    assert run_of(folder).samples == 0
