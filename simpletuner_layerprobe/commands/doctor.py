"""`layerprobe doctor`: is the probe active, and does it fit this SimpleTuner?"""

from __future__ import annotations

import argparse

from simpletuner_layerprobe.commands.arguments import Add
from simpletuner_layerprobe.commands.output import OK, say
from simpletuner_layerprobe.errors import SeamError


def add_parser(add: Add) -> None:
    add(
        "doctor",
        command,
        "say whether the probe is active and every part of SimpleTuner it needs is there",
        "Exits with 1, and says what to do, if something is missing.",
        "layerprobe doctor",
    )


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api.doctor import checks

    made = checks()
    width = max((len(check.name) for check in made), default=0)
    for check in made:
        say(f"{'ok' if check.ok else 'MISSING':<9}{check.name:<{width}}  {check.detail}")
        if not check.ok:
            say(f"{'':<9}{'':<{width}}  -> {check.remedy}")
    missing = sum(not check.ok for check in made)
    if missing:
        raise SeamError(f"{missing} of {len(made)} checks failed; what to do stands beside each (->)")
    return OK
