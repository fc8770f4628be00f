"""`trial report`: a trial's losses, judged, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

from simpletuner_layerprobe.analyse.trial import Judgement, TrialFacts, judge
from simpletuner_layerprobe.files import write_files
from simpletuner_layerprobe.show.trial_page import trial_page
from simpletuner_layerprobe.targets import PAGE, require_file
from simpletuner_layerprobe.trial.arms import LARGER, PLAN, REFERENCE
from simpletuner_layerprobe.trial.results import best_rates, held_out_losses, shuffles, tuning_losses
from simpletuner_layerprobe.trial.settings import Trial

PAGE_NAME = "report.html"


def judged(trial: Trial) -> tuple[Judgement, TrialFacts]:
    """The seeds that every arm has, judged. Raises RunError if there is none, ProbeError for too few images."""
    losses = held_out_losses(trial)
    judgement = judge(
        losses.loss,
        losses.image_P,
        losses.sigma_P,
        reference=REFERENCE,
        larger=LARGER,
        plan=PLAN,
        shuffles=shuffles(trial),
    )
    facts = TrialFacts(
        parameters=trial.parameters_of(),
        rate=best_rates(trial),
        tuning=tuning_losses(trial),
        steps=trial.steps,
        seeds=losses.seeds,
        held_out=f"backend{'s' * (len(trial.held_out) > 1)} {', '.join(trial.held_out)}",
        model=trial.model,
    )
    return judgement, facts


def page_path(trial: Trial, out: str | None, *, force: bool = False) -> Path:
    """Where the page goes, by default into the trial's folder. Raises ConfigError if it may not be written there."""
    return require_file(trial.folder / PAGE_NAME if out is None else out, PAGE, force=force)


def write_page(path: Path, judgement: Judgement, facts: TrialFacts, *, force: bool = False) -> None:
    write_files({path: trial_page(facts, judgement).encode()}, force=force)
