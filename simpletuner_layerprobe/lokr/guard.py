"""What the guard says of an adapter that SimpleTuner has made: one line if it is as written, a few if it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.lokr.proof import check_network

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.groups import Model

SHOWN = 3
"""The most lines of one kind."""


@dataclass(frozen=True)
class Verdict:
    """lines: for the user. wrong: what is otherwise than written, "" if nothing is."""

    lines: tuple[str, ...]
    wrong: str = ""


def lycoris_verdict(config: Mapping[str, Any], where: str, model: Model, loras: Mapping[str, Any]) -> Verdict:
    """LyCORIS's network beside its config, the JSON object of the file `where`.

    loras: name of a module of the model -> LyCORIS's own module on it. Wrong is what `layerprobe check-config` exits
    with 1 for. Raises ConfigError for a config that it refuses.
    """
    check = check_network(config, model, loras, where=where)
    trained = sum(row.got is not None for row in check.rows)
    total = f"LyCORIS {check.version}: {trained:,} modules, {check.parameters:,} trainable parameters"
    lines = [f"nothing in the model matches {pattern}" for pattern in check.unmatched]
    lines = _shortened(lines)
    if not check.wrong and not check.stops:
        return Verdict((f"{total}, as {where} says", *lines))
    wrong = check.stops[0] if check.stops else f"{len(check.wrong):,} of {len(check.rows):,} modules"
    return Verdict(
        (
            f"{total}; {where} means {check.intended_parameters:,}",
            *check.stops,
            *_shortened([str(row) for row in check.wrong]),
            *lines,
            *check.notes[:SHOWN],
            f"layerprobe check-config {where} --model MODEL shows all",
        ),
        wrong,
    )


def lora_verdict(
    ranks: Mapping[str, int], parameters: int, asked: int | None, held: Mapping[str, int], idle: Sequence[str]
) -> Verdict:
    """PEFT's LoRA beside the options that it was made by.

    ranks: name of a module -> its rank; parameters: that train. held: the same as `ranks` by the file of init_lora, {}
    without one. asked: lora_rank, None where a file decides that cannot be read here. idle: entries of
    peft_lora_target_modules that no module of the model is called by.
    """
    told = ", ".join(f"{count:,} of rank {rank}" for rank, count in sorted(Counter(ranks.values()).items())[:8])
    lines = [
        f"PEFT LoRA: {len(ranks):,} modules ({told or 'none'}), {parameters:,} trainable parameters",
        *_shortened([f"nothing in the model is called {name} (peft_lora_target_modules)" for name in idle]),
    ]
    if not ranks:
        return Verdict(tuple(lines), "no module of this model gets an adapter: nothing would train")
    if held and asked not in held.values():
        lines.append(f"lora_rank {asked} has no effect: the ranks are those of init_lora")
    meant = {name: held.get(name, rank if held else asked) for name, rank in ranks.items()}
    other = [
        f"{name}: rank {rank}, meant {meant[name]}" for name, rank in ranks.items() if meant[name] not in (None, rank)
    ]
    lost = [f"{name}: in the file of init_lora, and no adapter here" for name in held if name not in ranks]
    wrong = f"{len(other) + len(lost):,} modules" if other or lost else ""
    return Verdict((*lines, *_shortened(other), *_shortened(lost)), wrong)


def _shortened(lines: Sequence[str]) -> list[str]:
    rest = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"... and {rest:,} more like this"] if rest > 0 else [])]
