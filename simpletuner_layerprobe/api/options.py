"""What a plan can be asked for, in the words of the API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.amounts import preset_parameters

WEIGHED = "more-change-more-capacity"
EQUAL = "uniform"
WEIGHS = ("direction", "per_stream", "contrast")
"""Options that only a weighted plan has."""


class PlanOptions(TypedDict, total=False):
    """What a plan can be asked for; lokr/plan.py says all of it.

    params: a budget of trainable parameters. preset: in its place "article" (the recipe), or "400M", "800MB" (in bf16);
    by default as many parameters as the probe run's own config trains (`Run.plan_size`). critical: numbers of the
    blocks that get factor 1, or "auto": those that stick out far, with a budget in the streams in which they do; by
    default "auto" by the recipe and none with a budget. direction: with a budget "more-change-more-capacity",
    "more-change-less-capacity" or "uniform", which is equal factors; by default these, unless per_stream, contrast or a
    reading say that it is to be weighted (docs/study-weighting.md). per_stream: with a budget, whether image and text
    modules go by their own streams. contrast: how much larger the factor of the least
    block is than that of the most; 12. freeze: numbers of the blocks that get nothing, such as
    run.contribution("ablation").least(6). algo: "lokr", "loha", "locon" or "lora". rank: the largest, by the recipe.
    weighting: clip_percentile, text_weight and image_weight where they are not the article's.
    """

    params: int | None
    preset: str | int | None
    critical: str | tuple[int, ...]
    direction: str
    per_stream: bool
    contrast: float
    freeze: tuple[int, ...]
    algo: str
    rank: int | None
    weighting: Mapping[str, float]


def sized(options: PlanOptions, size: Callable[[], int]) -> PlanOptions:
    """The options with `size` parameters if they name none. Raises ConfigError for a rank without the recipe."""
    if options.get("params") is not None or options.get("preset") is not None:
        return options
    if options.get("rank") is not None:
        raise ConfigError("a rank is the largest by the article's recipe; ask for that too, with the preset article")
    return {**options, "params": size()}


def asked_of(options: PlanOptions, preset: str, *, weighed: bool = False) -> dict[str, Any]:
    """The options as lokr/plan.py takes them: a budget is a preset there. preset: the usual one.

    A budget is split equally, unless the options weigh the blocks, or `weighed`.
    """
    asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "params" in asked and "preset" in asked:
        raise ConfigError(f"params is {asked['params']} and preset {asked['preset']!r}; give one of them")
    made = {"preset": asked.pop("params", preset), **asked}
    if preset_parameters(made["preset"]) is not None and not (weighed or any(map(asked.get, WEIGHS))):
        made["direction"] = EQUAL
    return made
