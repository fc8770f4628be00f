"""The presets that a run can be judged by: the article's recipe, or a plan for an amount of parameters or bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from simpletuner_layerprobe.errors import ProbeError

ARTICLE = "article"
BF16_BYTES = 2
PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
SIZES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_AMOUNT = 10**15
_DIGITS = 30


def whole_amount(text: str, units: Mapping[str, int]) -> int:
    """The amount that a text such as "400M" stands for, rounded down; 0 if it is none from 1 to MAX_AMOUNT.

    units: what each unit stands for, keys in lower case.
    """
    found = re.fullmatch(r"(\d[\d_]*)(\.\d+)?\s*([a-z]*)", text.strip().lower(), re.ASCII)
    unit = units.get(found[3]) if found else None
    if not found or not unit:
        return 0
    whole, fraction = found[1].replace("_", ""), (found[2] or ".")[1:]
    if len(whole + fraction) > _DIGITS:
        return 0
    amount = int(whole + fraction) * unit // 10 ** len(fraction)
    return amount if amount <= MAX_AMOUNT else 0


def preset_parameters(text: str) -> int | None:
    """The trainable parameters of a preset such as "400M" or "800MB" (in bf16); None for "article".

    "1B" is a billion parameters. Raises ProbeError for anything else.
    """
    if text.strip().lower() == ARTICLE:
        return None
    found = whole_amount(text, PARAMETERS) or whole_amount(text, SIZES) // BF16_BYTES
    if not found:
        raise ProbeError(
            f"the preset is {text!r}; expected article, a number of parameters such as 400M, or a size such as 800MB"
        )
    return found
