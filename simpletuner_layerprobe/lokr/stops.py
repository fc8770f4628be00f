"""Why a training with a LyCORIS config stops at once, or learns nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.lokr.presets import MAPS, written_preset

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.check import Row


def stops_of(config: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, ...]:
    """Why a training with these adapters stops at its first step or learns nothing, one line each."""
    stops = []
    if not any(row.got for row in rows):
        stops.append("the config gives no module of this model an adapter: nothing would train")
    multiplier = config.get("multiplier", 1)
    if int(multiplier) == 0:
        stops.append(f"multiplier {multiplier} is cut to 0 by SimpleTuner, so nothing learns; write 1")
    algorithms = {row.got.algo for row in rows if row.got is not None}
    for key in ("module_dropout", "rank_dropout"):
        if float(config.get(key) or 0) >= 1 and (key == "module_dropout" or _drop_all(algorithms)):
            stops.append(f"{key} {config[key]} leaves every change out, so nothing learns")
    # LyCORIS 4.1.3's forwards fail there over wrong shapes: DyLoRA's at a part of its blocks.
    blocks = any(row.got is not None and row.got.algo == "dylora" and len(row.got.tensors) > 2 for row in rows)
    unable = [*(["dylora"] if blocks else []), *({"diag-oft"} & algorithms if config.get("dropout") else [])]
    if unable and bypasses(config):
        stops.append(f"bypass_mode with {', '.join(unable)} stops at one of the first steps; leave it out")
    weightless = [row.name for row in rows if row.got is not None and row.got.algo == "norm" and not row.shape]
    if weightless:
        stops.append(
            f"train_norm: LyCORIS takes {len(weightless):,} norms without a weight, first {weightless[0]}, and the "
            "training stops at its first step; leave train_norm out"
        )
    return tuple(stops)


def _drop_all(algorithms: set[str]) -> bool:
    """Whether all of these drop the whole update at a rank_dropout of 1."""
    return bool(algorithms) and algorithms <= {"lora", "loha", "lokr", "full", "diag-oft"}


def bypasses(config: Mapping[str, Any]) -> bool:
    inside = [settings for names in MAPS for settings in written_preset(config).get(names, {}).values()]
    return any(str(settings.get("bypass_mode", False)).lower() != "false" for settings in (config, *inside))
