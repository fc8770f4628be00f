"""Pages: what the figures, the table of blocks and the reports of a run are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Unpack

from simpletuner_layerprobe.api.options import EQUAL, WEIGHED, PlanOptions
from simpletuner_layerprobe.api.plans import Architecture, alike, plan
from simpletuner_layerprobe.api.run import Run
from simpletuner_layerprobe.api.verdict import judged_for, verdict
from simpletuner_layerprobe.errors import ProbeError, RunError
from simpletuner_layerprobe.readings import ABLATION, TOKENS, WHOLE, parse_reading
from simpletuner_layerprobe.show.blocks import BlockRow

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.compare import Comparison
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.settled import Confidence
    from simpletuner_layerprobe.lokr.plan import Plan
    from simpletuner_layerprobe.show.page import Ablated, View


def block_rows(
    run: Run | Architecture,
    plan: Plan | None,
    sure: Confidence | None,
    *,
    reading: str | None = None,
    bins: int = 10,
    **options: Unpack[PlanOptions],
) -> tuple[BlockRow, ...]:
    """A row per block: what it contributes, what a plan gives it, and how sure that is.

    plan: None for the article's factors of a run without a module table. sure: None without a run. options: those that
    both were made with.
    """
    if isinstance(run, Run):
        contribution = run.plan_contribution(reading, bins, **options)
        decided = run.decided(reading=reading, bins=bins, **options)
    else:
        contribution, decided = alike(run), ()
    return tuple(
        _block_row(number, contribution, plan, sure, decided, options.get("critical"))
        for number in range(len(contribution.blocks))
    )


def _block_row(
    number: int,
    contribution: Contribution,
    plan: Plan | None,
    sure: Confidence | None,
    decided: Sequence[tuple[int, str]],
    critical: str | tuple[int, ...] | None,
) -> BlockRow:
    numbers, groups = _numbers(number, plan, sure)
    agreement, unsettled = {}, []
    for place, (of, kind) in enumerate(decided):
        if sure and of == number:
            name = kind or next(iter(numbers))
            agreement[name] = float(sure.agreement_K[place])
            unsettled += [] if sure.settled_K[place] else [name]
    if isinstance(critical, tuple):
        where = [""] if number in critical else []
    else:
        looked_for = critical is not None or plan is None or plan.budget is None
        where = [name for name, those in contribution.critical.items() if looked_for and number in those]
    return BlockRow(
        number=number,
        block=contribution.blocks[number],
        contribution=float(contribution.value_L[number]) if sure else None,
        interval=(float(sure.low_L[number]), float(sure.high_L[number])) if sure else None,
        measured=bool(contribution.covered_L[number]),
        critical=tuple(where),
        numbers=numbers,
        groups=groups,
        agreement=agreement,
        unsettled=tuple(unsettled),
        parameters=None if plan is None else plan.block_parameters(number),
    )


def _numbers(number: int, plan: Plan | None, sure: Confidence | None) -> tuple[dict[str, int], dict[str, int]]:
    """The factors or ranks of a block as the table has them, and those of its groups of modules."""
    if plan is None:
        assert sure is not None
        factor = int(sure.factor_K[number])
        return {"factor": factor}, {"at_factor": factor, "at_double": 2 * factor}
    those = [(group, own) for group, own in zip(plan.groups, plan.numbers, strict=True) if group.number == number]
    if plan.budget is not None:
        streams = len({group.stream for group in plan.groups}) > 1
        groups = {f"{group.stream} {group.kind}" if streams else group.kind: own for group, own in those}
        return groups, groups
    # By the recipe attention has twice the factor (half the rank) of the rest of the block.
    groups = {"at_double" if group.kind == "attention" else "at_factor": own for group, own in those}
    if plan.word == "factor" and those:
        return {"factor": plan.block_factors[number]}, groups
    return {plan.word: groups.get("at_factor", groups.get("at_double", 0))} if those else {}, groups


def figures(
    run: Run, reading: str | None = None, bins: int = 10, file_format: str = "png"
) -> tuple[dict[str, bytes], str]:
    """The article's figures and heatmap.npz: name -> bytes; and why a figure cannot be drawn, else ""."""
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.show.files import article_files

    def factors(contribution: Contribution) -> list[int]:
        factor_L: list[int] = article_factors(contribution.value_L, critical=contribution.critical_union()).tolist()
        return factor_L

    parameters = None
    with suppress(ProbeError):
        made = plan(run, reading=reading, bins=bins, preset="article")
        parameters = [made.block_parameters(number) for number in range(len(made.blocks))]
    return article_files(run.heatmaps(reading, bins), factors, parameters, **_look(run, file_format))


def figure_names(kind: str = "", file_format: str = "png") -> list[str]:
    """The names of what `figures` can give, or with a kind ("update_norm", "pairs", "ablation") `reading_figure`."""
    from simpletuner_layerprobe.show.files import article_names, reading_names

    return reading_names(kind, file_format) if kind else article_names(file_format)


def reading_figure(run: Run, reading: str, bins: int = 10, file_format: str = "png") -> dict[str, bytes]:
    """The figure and the .npz of a further reading: "update_norm_mean", "pairs_last", "ablation_text" or the like."""
    from simpletuner_layerprobe.show import files

    kind, _, tokens = reading.rpartition("_")
    look = _look(run, file_format)
    if kind == "pairs":
        return files.pairs_files(run.pair_heatmaps(tokens, bins), **look)
    if parse_reading(reading).ablation:
        heatmaps = run.heatmaps(reading, bins)
        return files.reading_files(reading, heatmaps, **look | {"samples": f"ablation of {run.ablated}"})
    if reading not in run.readings:
        raise RunError(f"{run.path} has no reading {reading!r}; a probe run records it with layerprobe_residual")
    return files.reading_files(kind, run.heatmaps(reading, bins), **look)


def _look(run: Run, file_format: str) -> dict[str, str]:
    return {"samples": run.counted, "model": run.model, "file_format": file_format}


def report(run: Run, reading: str | None = None, bins: int = 10, preset: str | None = None) -> str:
    """The run on one HTML page that needs no network. bins: of the maps and findings; the recipe has ten, as elsewhere.

    reading: that the verdict and the findings are of, and that is shown until the other is chosen. preset: what the
    factors are made for. Raises ProbeError if the run has no samples.
    """
    from simpletuner_layerprobe.show.page import page

    goal, named = judged_for(run, preset)
    first = run.plan_reading(reading, **goal)
    readings = (first, *(name for name in TOKENS if name in run.readings and name != first))
    views = {name: _view(run, name, bins, goal, named) for name in readings}
    return page(run.data, verdict(run, reading, preset), views, run.findings(first, bins), _ablated(run, first, bins))


def _view(run: Run, reading: str, bins: int, goal: PlanOptions, named: str) -> View:
    """What the report shows of one reading. goal: what its factors are made for, and named so."""
    from simpletuner_layerprobe.show.page import View, Weights

    options: Any = {"reading": reading, "direction": WEIGHED, **goal}
    heatmaps = run.heatmaps(reading, bins)
    try:
        made = plan(run, **options) if run.manifest.modules else None
        sure = run.confidence(**options)
        equal: tuple[int, ...] = ()
        if made is not None:
            even = plan(run, reading=reading, params=made.budget or made.parameters, direction=EQUAL)
            equal = tuple(map(even.block_parameters, range(len(even.blocks))))
        rows = block_rows(run, made, sure, **options)
        return View(heatmaps, Weights(rows, named, sure.text(), equal))
    except ProbeError as error:
        return View(heatmaps, None, str(error))


def _ablated(run: Run, reading: str | None, bins: int) -> Ablated | None:
    from simpletuner_layerprobe.show.page import Ablated

    if ABLATION not in run.readings:
        return None
    try:
        return Ablated(run.ablation(bins, reading), run.heatmap(WHOLE, ABLATION, bins), run.ablated)
    except ProbeError as error:
        return Ablated(None, None, run.ablated, str(error))


def comparison_page(a: Run, b: Run, comparison: Comparison, decided: Sequence[tuple[int, str]]) -> str:
    """A comparison on one HTML page. decided: what its factors are of, as `Run.decided` gives it."""
    from simpletuner_layerprobe.show.compare_page import compare_page

    return compare_page(a.data, b.data, comparison, decided)
