"""Amounts: a number of parameters such as "400M", or a size in bf16 such as "800MB"."""

from __future__ import annotations

import re

from simpletuner_layerprobe.errors import ConfigError

ARTICLE = "article"
BF16_BYTES = 2
MAX_AMOUNT = 10**15
_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DIGITS = 30


def amount(text: str) -> int:
    """The trainable parameters that "400M", "1.2B" or, in bf16, "800MB" stand for, rounded down; 0 if it is none.

    "1B" is a billion parameters. The largest is MAX_AMOUNT.
    """
    parts = re.fullmatch(r"(\d[\d_]*)(\.\d+)?\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if not parts:
        return 0
    whole, fraction, unit = parts[1].replace("_", ""), (parts[2] or ".")[1:], parts[3]
    times = _PARAMETERS.get(unit) or _SIZES.get(unit, 0)
    if len(whole + fraction) > _DIGITS:
        return 0
    count = int(whole + fraction) * times // 10 ** len(fraction) // (BF16_BYTES if unit in _SIZES else 1)
    return count if count <= MAX_AMOUNT else 0


def preset_parameters(preset: str | int) -> int | None:
    """The trainable parameters of a preset such as "400M", "800MB" or a number; None for "article".

    Raises ConfigError for anything else.
    """
    if isinstance(preset, str) and preset.strip().lower() == ARTICLE:
        return None
    count = amount(preset) if isinstance(preset, str) else preset
    if isinstance(count, bool) or not 1 <= count <= MAX_AMOUNT:
        raise ConfigError(
            f"the preset is {preset!r}; expected article, a number of parameters such as 400M, or a size such as 800MB"
        )
    return count
