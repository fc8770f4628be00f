"""A probe-only run inside the real SimpleTuner that ends by itself when its factors are settled."""

from __future__ import annotations

from test_real_run import run_of

from simpletuner_layerprobe.analyse.confidence import article_decision, confidence, tally
from simpletuner_layerprobe.lokr.factors import article_factors

SHARE = 0.6


def test_a_run_ends_when_its_factors_are_settled(simpletuner, tiny):
    folder = tiny(
        max_train_steps=5000,
        train_batch_size=4,
        layerprobe_sigmas="stratified",
        layerprobe_flush_seconds=0.2,
        layerprobe_stop_when_stable=SHARE,
    )
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert "ends by itself when every factor of the preset article is agreed by 60.0%" in result.log
    run = run_of(folder)
    assert 100 <= run.sample_count() < 5000
    assert "agree with every factor: stopping after this step" in result.log
    assert f"layerprobe: {run.sample_count()} samples in" in result.line("layerprobe: ")
    # The offline judgement of the same samples, give or take the last step's, says so too.
    bootstrap = tally(run).bootstrap()
    found = confidence(bootstrap, article_decision(bootstrap.blocks, bootstrap.count_T, article_factors))
    assert found.enough and found.agreement_L.min() > SHARE - 0.1
