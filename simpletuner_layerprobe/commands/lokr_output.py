"""The table and the JSON of `layerprobe lokr`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.output import LEFT, RIGHT, print_table, size_text
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES
from simpletuner_layerprobe.show.words import share_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.pages import BlockRow, Confidence, Plan, Run

SHORT = {"feed-forward": "ff", "attention": "attn", "modulation": "mod"}


def print_plan(plan: Plan, sure: Confidence | None, rows: Sequence[BlockRow]) -> None:
    """The table of blocks, what was asked for, reached and proved, and how sure it is."""
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
        table.append([*cells, f"{row.parameters:,}", ", ".join(row.notes)])
    blank = [""] * (len(heads) - 4)
    table.append(["", "total", *blank, f"{plan.parameters:,}", f"{_size(plan.parameters)} in bf16"])
    print_table(heads, table, "".join(sides))
    if plan.budget:
        gap = f"{abs(plan.gap):,} ({abs(plan.gap) / plan.budget:.3%}) {'above' if plan.gap > 0 else 'below'}"
        print(f"budget   {plan.budget:,} parameters, {_size(plan.budget)} in bf16; gap {gap if plan.gap else 'none'}")
        print(f"bound    {plan.bound}")
    else:
        half = "attention twice the factor" if plan.word == "factor" else "attention half of it; alpha is the rank"
        print(f"feed-forward and modulation get the {plan.word}, {half}")
    if sure:
        print(sure.text(plan.word))
    check = plan.check
    assert check is not None, "a plan is verified before it is shown"
    print(f"verified: {check.builder} {check.version} gives all {len(check.rows):,} modules the {plan.word} meant")


def as_json(
    arguments: argparse.Namespace,
    run: Run | None,
    plan: Plan,
    sure: Confidence | None,
    rows: Sequence[BlockRow],
    written: Sequence[str],
) -> dict[str, Any]:
    """What `lokr --json` prints. Numbers that are not known are null."""
    return {
        "run": arguments.run,
        "model": arguments.model,
        "samples": run.samples if run else None,
        "images": run.images if run else None,
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
        }
        if plan.budget
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


def _size(parameters: int) -> str:
    return size_text(BF16_BYTES * parameters)
