"""A trial judged: what its arms' losses on held-out images show, in numbers, in words and as a page."""

from __future__ import annotations

from simpletuner_layerprobe.analyse.sections import plain
from simpletuner_layerprobe.analyse.trial import DIVERGED, Judgement, TrialFacts, judge
from simpletuner_layerprobe.analyse.trial_words import best_rate, change_text, decimals, rate_text, sentences
from simpletuner_layerprobe.show.trial_page import trial_page

__all__ = ["DIVERGED", "Judgement", "TrialFacts", "judge", "trial_page"]
__all__ += ["best_rate", "change_text", "decimals", "plain", "rate_text", "sentences"]
