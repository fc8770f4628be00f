"""The table and the JSON of `layerprobe lokr`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.output import LEFT, RIGHT, print_line, print_table, print_text, say
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES
from simpletuner_layerprobe.show.words import blocks_text, counted, samples_text, share_text, size_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.pages import BlockRow, Confidence, Plan, Run

SHORT = {"feed-forward": "ff", "attention": "attn", "modulation": "mod"}
READINGS = {
    "last": "angle of the last token",
    "mean": "angle, mean over the tokens",
    "ablation": "ablation, the loss increase with a block left out (a negative one counts as 0)",
}

EQUAL_SPLIT = (
    "equal factors, as nearly as whole factors reach the size; no weighting of blocks was seen to beat them; "
    "--direction and --contrast weigh"
)
WEIGHTED_SPLIT = "weighted; no such split was seen to beat equal factors: layerprobe trial compares them on your data"


@dataclass(frozen=True)
class Frozen:
    """What --freeze left out of a plan.

    numbers: of the blocks; least: those that least:N named, and the share of the replicates that name the same.
    modules: without an adapter therefore. whole: the parameters of the same plan without freezing. Both None where that
    cannot be planned.
    """

    numbers: tuple[int, ...]
    least: tuple[int, ...]
    agreement: float | None
    modules: int | None
    whole: int | None


def print_plan(
    plan: Plan, sure: Confidence | None, rows: Sequence[BlockRow], reading: str, frozen: Frozen | None, *, wide: bool
) -> None:
    """The table of blocks, what was asked for, reached and proved, and how sure it is. reading: that it goes by."""
    from simpletuner_layerprobe.api.options import EQUAL

    if plan.direction == EQUAL:
        sure = None  # of what no measurement decides there is nothing to be sure of
    heads, sides, table = _table(rows, sure)
    blank = [""] * (len(heads) - 4)
    table.append(["", "total", *blank, f"{plan.parameters:,}", f"{_size(plan.parameters)} in bf16"])
    print_table(heads, table, "".join(sides), spare=_spare(heads), wide=wide)
    if sure:
        print_line(f"by       {READINGS[reading]}; {samples_text(sure.samples, sure.images)}", wide=wide)
    if frozen:
        print_line(f"frozen   {_frozen_text(plan, frozen)}; what it saves in time is not measured", wide=wide)
    if frozen and frozen.agreement is not None:
        print_line(
            f"least    {blocks_text(frozen.least)} contribute{'s' * (len(frozen.least) == 1)} least; "
            f"{share_text(frozen.agreement)} of the replicates name the same",
            wide=wide,
        )
    if plan.budget:
        gap = f"{abs(plan.gap):,} ({abs(plan.gap) / plan.budget:.3%}) {'above' if plan.gap > 0 else 'below'}"
        print_line(
            f"budget   {plan.budget:,} parameters, {_size(plan.budget)} in bf16; gap {gap if plan.gap else 'none'}",
            wide=wide,
        )
        print_line(f"bound    {plan.bound}", wide=wide)
        print_line(f"split    {EQUAL_SPLIT if plan.direction == EQUAL else WEIGHTED_SPLIT}", wide=wide)
    else:
        half = "attention twice the factor" if plan.word == "factor" else "attention half of it; alpha is the rank"
        print_text("", f"feed-forward and modulation get the {plan.word}, {half}", wide=wide)
    if sure:
        print_text("", sure.text(plan.word), wide=wide)
    check = plan.check
    assert check is not None, "a plan is verified before it is shown"
    say(f"verified: {check.builder} {check.version} gives all {len(check.rows):,} modules the {plan.word} meant")


def print_factors(sure: Confidence, rows: Sequence[BlockRow], reading: str, *, wide: bool) -> None:
    """The table of a run without a module table: the article's factors, without a plan and a proof."""
    heads, sides, table = _table(rows, sure)
    print_table(heads, table, "".join(sides), spare=_spare(heads), wide=wide)
    print_line(f"by       {READINGS[reading]}; {samples_text(sure.samples, sure.images)}", wide=wide)
    print_text("", sure.text(), wide=wide)
    say("not verified, parameters unknown: the run has no module table; name its model in layerprobe import --model")


def _spare(heads: Sequence[str]) -> tuple[str, ...]:
    """The columns that are left out first where there is no room."""
    return ("agree", "95% interval", "contribution", *reversed(heads[3:-2]))


def _table(rows: Sequence[BlockRow], sure: Confidence | None) -> tuple[list[str], list[str], list[list[str]]]:
    """Heads, sides and a row per block."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.numbers))
    heads, sides = ["", "block", "contribution"], [RIGHT, LEFT, RIGHT]
    if sure:
        heads.append("95% interval")
    for kind in kinds:
        heads += [" ".join(SHORT.get(word, word) for word in kind.split()), *(["agree"] if sure else [])]
    heads += ["parameters", ""]
    sides += [RIGHT] * (len(heads) - len(sides) - 1) + [LEFT]
    table = []
    for row in rows:
        cells = [str(row.number), row.block, f"{row.contribution:.4f}" if row.contribution is not None else "-"]
        if sure:
            cells.append("{:.4f} - {:.4f}".format(*row.interval) if row.interval else "-")
        for kind in kinds:
            cells.append(str(row.numbers.get(kind, "-")))
            if sure:
                cells.append(share_text(row.agreement[kind]) if kind in row.agreement else "-")
        table.append([*cells, "-" if row.parameters is None else f"{row.parameters:,}", ", ".join(row.notes)])
    return heads, sides, table


def as_json(
    arguments: argparse.Namespace,
    run: Run | None,
    plan: Plan,
    sure: Confidence | None,
    rows: Sequence[BlockRow],
    frozen: Frozen | None,
    written: Sequence[str],
) -> dict[str, Any]:
    """What `lokr --json` prints. Numbers that are not known are null."""
    return {
        "run": arguments.run,
        "model": arguments.model,
        "by": arguments.by if run else None,
        "samples": sure.samples if sure else None,
        "images": sure.images if sure else None,
        "algo": plan.algo,
        "preset": None if plan.budget else "article",
        "replicates": sure.replicates if sure else None,
        "settled": sure.text(plan.word) if sure else None,
        "budget": {
            "parameters": plan.budget,
            "reached": plan.parameters,
            "gap": plan.gap,
            "least": plan.least,
            "most": plan.most,
            "bound": plan.bound,
            "direction": plan.direction,
        }
        if plan.budget
        else None,
        "frozen": {
            "blocks": list(frozen.numbers),
            "least": list(frozen.least),
            "least_agreement": frozen.agreement,
            "modules": frozen.modules,
            "parameters_without_freezing": frozen.whole,
        }
        if frozen
        else None,
        "blocks": [
            {
                "number": row.number,
                "block": row.block,
                "contribution": row.contribution,
                "measured": row.measured,
                "interval": list(row.interval) if row.interval else None,
                "critical": bool(row.critical),
                "agreement": dict(row.agreement),
                "settled": row.settled,
                f"{plan.word}s": dict(row.groups),
                "parameters": row.parameters,
            }
            for row in rows
        ],
        "parameters": plan.parameters,
        "size_bytes": BF16_BYTES * plan.parameters,
        "builder": f"{plan.check.builder} {plan.check.version}" if plan.check else None,
        "config": None if plan.algo == "lora" else plan.config(),  # which PEFT's has none of
        "written": list(written),
    }


def _frozen_text(plan: Plan, frozen: Frozen) -> str:
    """What freezing saves."""
    text = blocks_text(frozen.numbers)
    if frozen.whole is None or frozen.modules is None:
        return text
    saved = frozen.whole - plan.parameters
    text += f": {counted(frozen.modules, 'module')} without an adapter"
    if plan.budget:
        text += ", and the budget goes to the other blocks"
    return f"{text}; {abs(saved):,} parameters {'fewer' if saved >= 0 else 'more'} than without ({frozen.whole:,})"


def _size(parameters: int) -> str:
    return size_text(BF16_BYTES * parameters)
