"""The LyCORIS config of a plan, in a form that takes effect as written.

The config names modules only. With `target_module` LyCORIS 4.1.3 builds whole blocks before it looks at the
names, and a name's factor then leaks into the next block; left out, a default list of classes comes back. An
empty list leaves the names alone to decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr.adapter import LOKR, LORA, rank_limit, settings
from simpletuner_layerprobe.lokr.groups import Group, target_of

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Target

LYCORIS_CONFIG_NAME = "lycoris_config.json"


def lycoris_config(
    algo: str, groups: Sequence[Group], numbers: Sequence[int], targets: Sequence[Target]
) -> dict[str, Any]:
    """The config that gives every module of a group the group's number, and nothing else an adapter.

    numbers: a factor per group, or a rank, which no module gets more of than it can use. Patterns are fnmatch patterns
    over the whole module name; the first in the order of the file decides. Where all modules that one of the family's
    patterns decides for share a number, the pattern is written, as in the article's config; else module by module. The
    same input gives the same file, byte for byte. Raises ConfigError for PEFT's lora.
    """
    if algo == LORA:
        raise ConfigError(
            "PEFT's lora has no LyCORIS config: SimpleTuner takes its ranks from files; write an environment"
        )
    by_block: dict[str, dict[str, int]] = {}
    for group, number in zip(groups, numbers, strict=True):
        for module in group.modules:
            own = number if algo == LOKR else min(number, rank_limit(algo, module.shape))
            by_block.setdefault(group.block, {})[module.name[len(group.block) + 1 :]] = own
    names: dict[str, dict[str, int]] = {}
    for block, number_of in by_block.items():
        left = dict(number_of)
        target = target_of(block, targets)
        for pattern in (*target.at_factor, *target.at_double):
            matched = [name for name in number_of if fnmatchcase(name, pattern)]
            decided = [name for name in matched if name in left]
            if len({number_of[name] for name in decided or matched}) == 1:
                names[f"{escape(block)}.{pattern}"] = settings(algo, number_of[(decided or matched)[0]])
            else:
                names |= {escape(f"{block}.{name}"): settings(algo, number_of[name]) for name in decided}
            for name in decided:
                del left[name]
    whole: dict[str, Any] = {"linear_dim": 1000000, "linear_alpha": 1, "full_matrix": True, "factor": 1}
    if algo != LOKR:
        whole = {"linear_dim": max(numbers), "linear_alpha": max(numbers)}
    preset = {"use_fnmatch": True, "target_module": [], "name_algo_map": names}
    return {"algo": algo, "multiplier": 1.0, **whole, "apply_preset": preset}
