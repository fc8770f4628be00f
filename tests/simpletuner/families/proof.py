"""That the LoKr configs of a family apply as written: LyCORIS builds what was counted, and no pattern misses."""

from __future__ import annotations

import functools

import numpy as np

from simpletuner_layerprobe.analyse.contribution import Contribution
from simpletuner_layerprobe.lokr.plan import Plan, make_plan
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.models import Architecture
from simpletuner_layerprobe.probe.families import Family
from simpletuner_layerprobe.run.manifest import Module, Stream, Target

Streams = tuple[tuple[str, tuple[str, ...]], ...]  # the blocks of each
Modules = tuple[tuple[str, str, tuple[int, ...]], ...]  # name, type, shape


@functools.cache
def prove(model_class: str, entry: Family, streams: Streams, modules: Modules) -> dict[str, int]:
    """The article's config for these blocks, built by LyCORIS: adapted modules, wrong ones, unmatched patterns.

    So are the plans for half of its parameters and for more and less than there can be, and those by ranks for LoHa,
    LoCon (LyCORIS) and LoRA (PEFT); each must be exactly what was counted. The results are those of every run of a
    family that has the same modules.
    """
    model = Architecture(
        family=entry.name,
        flavour="",
        model_class=model_class,
        streams=tuple(Stream(*stream) for stream in streams),
        targets=tuple(Target(target.blocks, target.at_factor, target.at_double) for target in entry.targets),
        modules=tuple(Module(*module) for module in modules),
    )
    blocks = tuple(dict.fromkeys(path for _, paths in streams for path in paths))
    contribution = Contribution(blocks, np.linspace(1, 0, len(blocks)), np.ones(len(blocks), bool), {})
    article = verified(make_plan(model, contribution))
    assert article.check is not None
    half = verified(make_plan(model, contribution, preset=article.parameters // 2))
    assert half.check is not None and len(half.check.rows) == len(article.check.rows)
    for preset in (1, 10**12):
        end = verified(make_plan(model, contribution, preset=preset))
        assert end.parameters == (end.least if preset == 1 else end.most)
    for algo in ("loha", "locon", "lora"):
        smallest = make_plan(model, contribution, preset=1, algo=algo)
        assert smallest.least is not None and smallest.most is not None
        preset = (smallest.least + smallest.most) // 2
        assert smallest.least < verified(make_plan(model, contribution, preset=preset, algo=algo)).parameters
    # Nor does anybody who reads the config take it otherwise.
    check = check_config(article.config(), model)
    assert not check.missing and len(check.rows) == len(article.check.rows)
    return {"adapted": len(check.rows), "wrong": len(check.wrong), "unmatched": len(check.unmatched)}


def verified(plan: Plan) -> Plan:
    """The plan, of which every module is built as meant and counted."""
    plan = plan.verify()
    assert plan.check is not None and plan.check.parameters == plan.parameters and not plan.check.unmatched
    return plan
