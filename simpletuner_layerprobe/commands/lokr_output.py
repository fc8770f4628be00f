"""The tables and the JSON of `layerprobe lokr`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.lokr_options import BF16_BYTES
from simpletuner_layerprobe.commands.output import size_text
from simpletuner_layerprobe.commands.settled import settled_text, share_text

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.confidence import Confidence
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.lokr.planner import Plan
    from simpletuner_layerprobe.lokr.verify import Check
    from simpletuner_layerprobe.run.manifest import Manifest

KIND_HEADS = {"feed-forward": "ff", "attention": "attn", "modulation": "mod"}


def print_factors(
    contribution: Contribution,
    factors: Sequence[int],
    sure: Confidence,
    critical: Sequence[int],
    found: bool,
    check: Check | None,
) -> None:
    """The table of blocks. `found`: the critical blocks were found in the run, so their streams are known."""
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    unsettled = sure.unsettled()
    heads = f"{'factor':>6}  {'parameters':>14}  {'95% interval':>15}  {'agree':>5}"
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {heads}")
    for number, block in enumerate(contribution.blocks):
        notes = ["NOT settled"] if number in unsettled else []
        if number in critical:
            where = [name for name, numbers in contribution.critical.items() if number in numbers]
            notes.append(f"critical ({', '.join(where)})" if found else "critical")
        if not contribution.covered_L[number]:
            notes.append("contribution of the nearest block")
        parameters = f"{check.block_parameters(block):,}" if check else "unknown"
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {factors[number]:>6}"
        line += f"  {parameters:>14}  {sure.low_L[number]:.4f} - {sure.high_L[number]:.4f}"
        print(f"{line}  {share_text(sure.agreement_L[number])}  {', '.join(notes)}".rstrip())
    if check:
        size = size_text(BF16_BYTES * check.parameters)
        print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>6}  {check.parameters:>14,}  {size} in bf16")
    print(f"feed-forward and modulation get the factor, attention twice the factor; {settled_text(sure)}")


def _group_label(kind: str, stream: str) -> str:
    """ "attention", or "text attention" where streams have groups of their own."""
    return kind if stream == "joint" else f"{stream} {kind}"


def print_plan(contribution: Contribution, plan: Plan, check: Check) -> None:
    """The table of blocks with a column per kind of modules, and what was asked for, reached and proved."""
    labels = list(dict.fromkeys(_group_label(KIND_HEADS[group.kind], group.stream) for group in plan.groups))
    factor_of = {
        (group.number, _group_label(KIND_HEADS[group.kind], group.stream)): factor
        for group, factor in zip(plan.groups, plan.factors, strict=True)
    }
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    heads = "  ".join(f"{label:>4}" for label in labels)
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {heads}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        cells = "  ".join(f"{factor_of.get((number, label), '-'):>{max(4, len(label))}}" for label in labels)
        notes = [] if contribution.covered_L[number] else ["contribution of the nearest block"]
        if all((number, label) not in factor_of for label in labels):
            notes.append("frozen")
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {cells}"
        print(f"{line}  {check.block_parameters(block):>14,}  {', '.join(notes)}".rstrip())
    print(f"{', '.join(f'{head} {kind}' for kind, head in KIND_HEADS.items())}; '-' no such modules")
    gap = f"{abs(plan.gap):,} ({abs(plan.gap) / plan.budget:.3%}) {'above' if plan.gap > 0 else 'below'}"
    print(f"budget   {plan.budget:,} parameters, {size_text(BF16_BYTES * plan.budget)} in bf16")
    print(f"reached  {check.parameters:,} parameters, {size_text(BF16_BYTES * check.parameters)} in bf16")
    print(f"gap      {gap if plan.gap else 'none'}")
    print(f"bound    {plan.bound()}")


def as_result(
    arguments: argparse.Namespace,
    manifest: Manifest,
    contribution: Contribution,
    factors: Sequence[int],
    sure: Confidence | None,
    plan: Plan | None,
    check: Check | None,
    config: Mapping[str, Any],
    written: Sequence[str],
) -> dict[str, Any]:
    """What `lokr --json` prints. Numbers that are not known are null."""
    blocks: list[dict[str, Any]] = []
    for number, block in enumerate(contribution.blocks):
        if plan:
            of_block = {
                _group_label(group.kind, group.stream): factor
                for group, factor in zip(plan.groups, plan.factors, strict=True)
                if group.number == number
            }
        else:
            of_block = {"at_factor": factors[number], "at_double": 2 * factors[number]}
        blocks.append(
            {
                "number": number,
                "block": block,
                "contribution": float(contribution.value_L[number]),
                "measured": bool(contribution.covered_L[number]),
                "interval": [float(sure.low_L[number]), float(sure.high_L[number])] if sure else None,
                "agreement": float(sure.agreement_L[number]) if sure else None,
                "settled": number not in sure.unsettled() if sure else None,
                "factors": of_block,
                "parameters": check.block_parameters(block) if check else None,
            }
        )
    budget = None
    if plan:
        budget = {
            "parameters": plan.budget,
            "reached": plan.reached,
            "gap": plan.gap,
            "least": plan.least,
            "most": plan.most,
            "nearest": plan.nearest,
            "slack": plan.slack,
            "bound": plan.bound(),
        }
    return {
        "run": arguments.run,
        "family": manifest.family,
        "flavour": manifest.flavour,
        "preset": None if plan else "article",
        "budget": budget,
        "blocks": blocks,
        "parameters": check.parameters if check else None,
        "size_bytes": BF16_BYTES * check.parameters if check else None,
        "lycoris": check.lycoris if check else None,
        "config": config,
        "written": list(written),
    }


def print_written(verified: str, written: Sequence[str], following: str) -> None:
    print(f"verified: {verified}")
    for path in written:
        print(f"written: {path}")
    print(following)
