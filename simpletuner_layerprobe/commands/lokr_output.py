"""The tables and the JSON of `layerprobe lokr`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.output import size_text
from simpletuner_layerprobe.commands.settled import settled_text, share_text
from simpletuner_layerprobe.lokr.amounts import BF16_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simpletuner_layerprobe.analyse.bootstrap import Confidence
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.lokr.plan import Plan
    from simpletuner_layerprobe.lokr.proof import Check
    from simpletuner_layerprobe.run.manifest import Manifest

# stream -> the interval of each block's contribution in that stream alone, low and high.
Intervals = dict[str, "tuple[NDArray[np.float64], NDArray[np.float64]]"]
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
        print(f"{line}  {share_text(sure.agreement_K[number])}  {', '.join(notes)}".rstrip())
    if check:
        size = size_text(BF16_BYTES * check.parameters)
        print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>6}  {check.parameters:>14,}  {size} in bf16")
    print(f"feed-forward and modulation get the factor, attention twice the factor; {settled_text(sure)}")
    if not check:
        print("factors agree by name here; what LyCORIS would make of them is not known without a module table")


def _group_label(kind: str, stream: str) -> str:
    """ "attention", or "text attention" where streams have groups of their own."""
    return kind if stream == "joint" else f"{stream} {kind}"


def print_plan(
    contribution: Contribution, plan: Plan, check: Check, sure: Confidence | None, streams: Intervals
) -> None:
    """The table of blocks with a column per kind of modules, and what was asked for, reached and proved.

    sure: None without a run; else each factor has its share beside it. streams: with --per-stream the intervals of the
    streams' own contributions, which have columns of their own.
    """
    labels = list(dict.fromkeys(_group_label(KIND_HEADS[group.kind], group.stream) for group in plan.groups))
    place_of = {
        (group.number, _group_label(KIND_HEADS[group.kind], group.stream)): place
        for place, group in enumerate(plan.groups)
    }
    unsettled = sure.unsettled() if sure else ()
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    heads = f"{'contribution':>12}"
    if sure:
        heads += "".join(f"  {name:>15}" for name in ("95% interval", *(f"{stream} alone" for stream in streams)))
    heads += "".join(f"  {label:>4}" + ("  agree" if sure else "") for label in labels)
    print(f"{'':>4}  {'block':<{width}}  {heads}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        places = [place_of.get((number, label)) for label in labels]
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}"
        if sure:
            for low_L, high_L in ((sure.low_L, sure.high_L), *streams.values()):
                line += f"  {low_L[number]:.4f} - {high_L[number]:.4f}"
        for label, place in zip(labels, places, strict=True):
            line += f"  {'-' if place is None else plan.factors[place]:>{max(4, len(label))}}"
            if sure:
                line += f"  {'-' if place is None else share_text(sure.agreement_K[place]):>5}"
        notes = []
        found = [label for label, place in zip(labels, places, strict=True) if place in unsettled]
        if found:
            notes.append("NOT settled" if len(found) == sum(place is not None for place in places) else "")
            notes[-1] = notes[-1] or f"NOT settled: {', '.join(found)}"
        if not contribution.covered_L[number]:
            notes.append("contribution of the nearest block")
        if all(place is None for place in places):
            notes.append("frozen")
        print(f"{line}  {check.block_parameters(block):>14,}  {', '.join(notes)}".rstrip())
    print(f"{', '.join(f'{head} {kind}' for kind, head in KIND_HEADS.items())}; '-' no such modules")
    gap = f"{abs(plan.gap):,} ({abs(plan.gap) / plan.budget:.3%}) {'above' if plan.gap > 0 else 'below'}"
    print(f"budget   {plan.budget:,} parameters, {size_text(BF16_BYTES * plan.budget)} in bf16")
    print(f"reached  {check.parameters:,} parameters, {size_text(BF16_BYTES * check.parameters)} in bf16")
    print(f"gap      {gap if plan.gap else 'none'}")
    print(f"bound    {plan.bound()}")
    if sure:
        print(settled_text(sure))


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
    streams: Intervals,
) -> dict[str, Any]:
    """What `lokr --json` prints. Numbers that are not known are null. streams: as `print_plan` takes it."""
    blocks: list[dict[str, Any]] = []
    unsettled = sure.unsettled() if sure else ()
    for number, block in enumerate(contribution.blocks):
        agreement: Any = None
        settled = None
        if plan:
            places = {
                _group_label(group.kind, group.stream): place
                for place, group in enumerate(plan.groups)
                if group.number == number
            }
            of_block = {label: plan.factors[place] for label, place in places.items()}
            if sure:
                agreement = {label: float(sure.agreement_K[place]) for label, place in places.items()}
                settled = not set(places.values()) & set(unsettled)
        else:
            of_block = {"at_factor": factors[number], "at_double": 2 * factors[number]}
            if sure:
                agreement, settled = float(sure.agreement_K[number]), number not in unsettled
        blocks.append(
            {
                "number": number,
                "block": block,
                "contribution": float(contribution.value_L[number]),
                "measured": bool(contribution.covered_L[number]),
                "interval": [float(sure.low_L[number]), float(sure.high_L[number])] if sure else None,
                "streams": {
                    name: [float(low_L[number]), float(high_L[number])] for name, (low_L, high_L) in streams.items()
                },
                "agreement": agreement,
                "settled": settled,
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
        "replicates": sure.replicates if sure else None,
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
