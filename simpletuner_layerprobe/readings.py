"""The readings: what one number of a recorded sample means, and how it is called in a run folder.

Every run has the angle of "last" or "mean" or both. A run may have further ones:

    update_norm_last, update_norm_mean      |after - before| / |before| of a block
    update_cosine_last, update_cosine_mean  cosine of the angle between after - before and before
    pair2_last, pair2_mean, pair3_last ...  angular distance over 2, 3 ... blocks in a row
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner_layerprobe.errors import ConfigError

TOKENS = ("last", "mean")  # of the last token, or the mean over the valid ones
ANGLE, UPDATE_NORM, UPDATE_COSINE = "angle", "update_norm", "update_cosine"

_EXTRA = re.compile(r"(?:(update_norm|update_cosine)|pair([1-9]\d{0,3}))_(last|mean)")


@dataclass(frozen=True)
class Reading:
    """One reading by its name in a run folder.

    kind: ANGLE (a fraction of pi in [0, 1]), UPDATE_NORM (a ratio, 0 or more) or UPDATE_COSINE (in [-1, 1]).
    tokens: one of TOKENS. span: over how many blocks in a row; 1 but for pairs.
    """

    name: str
    kind: str
    tokens: str
    span: int = 1

    @property
    def complete(self) -> bool:
        """Whether every block gives a number unless a state is zero or not finite.

        A pair may not exist in a model, and an update of zero has no cosine.
        """
        return self.span == 1 and self.kind != UPDATE_COSINE

    def columns(self, blocks: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The (first block, last block) that each column of a stream with these L blocks is over: L - span + 1."""
        return tuple(zip(blocks, blocks[self.span - 1 :], strict=False))


def parse_reading(name: str) -> Reading:
    """The reading called `name`. Raises ConfigError if there is no such one."""
    if name in TOKENS:
        return Reading(name, ANGLE, name)
    match = _EXTRA.fullmatch(name)
    if match is None or match[2] == "1":
        raise ConfigError(
            f"there is no reading {name!r:.80}; expected {', '.join(TOKENS)}, update_norm_last, update_cosine_mean, "
            f"pair2_mean or the like"
        )
    kind, span, tokens = match.groups()
    return Reading(name, kind or ANGLE, tokens, int(span or 1))


def extra_readings(residual: bool, pairs: int) -> tuple[str, ...]:
    """The names of the readings beside the angle. pairs: the longest span, below 2 for none."""
    kinds = [UPDATE_NORM, UPDATE_COSINE] if residual else []
    kinds += [f"pair{span}" for span in range(2, pairs + 1)]
    return tuple(f"{kind}_{tokens}" for kind in kinds for tokens in TOKENS)
