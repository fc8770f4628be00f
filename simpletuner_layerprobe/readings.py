"""The readings: what one number of a recorded sample means, and how it is called in a run folder.

Every run has the angle of "last" or "mean" or both. A run may have further ones:

    update_norm_last, update_norm_mean      |after - before| / |before| of a block
    update_cosine_last, update_cosine_mean  cosine of the angle between after - before and before
    pair2_last, pair2_mean, pair3_last ...  angular distance over 2, 3 ... blocks in a row

and, of those samples that it was taken of, what leaving a block out does:

    ablation, ablation_change               of the whole block, with all its streams: one number a block, not a stream
    ablation_text, ablation_text_change     of what the block does to the text stream alone

The first of each is the loss increase (the sample's loss with the block left out, minus without), the second the
relative change of the prediction, |with - without| / |with|.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner_layerprobe.errors import ConfigError

TOKENS = ("last", "mean")  # of the last token, or the mean over the valid ones
ANGLE, UPDATE_NORM, UPDATE_COSINE = "angle", "update_norm", "update_cosine"
ABLATION, ABLATION_CHANGE = "ablation", "ablation_change"
WHOLE = "block"  # in place of a stream's name, for what a whole block has
_ABLATIONS = {
    "ablation": (ABLATION, WHOLE),
    "ablation_change": (ABLATION_CHANGE, WHOLE),
    "ablation_text": (ABLATION, "text"),
    "ablation_text_change": (ABLATION_CHANGE, "text"),
}

_EXTRA = re.compile(r"(?:(update_norm|update_cosine)|pair([1-9]\d{0,3}))_(last|mean)")


@dataclass(frozen=True)
class Reading:
    """One reading by its name in a run folder.

    kind: ANGLE (a fraction of pi in [0, 1]), UPDATE_NORM (a ratio, 0 or more), UPDATE_COSINE (in [-1, 1]), ABLATION
    (a loss) or ABLATION_CHANGE (a ratio, 0 or more). tokens: one of TOKENS, "" for an ablation. span: over how many
    blocks in a row; 1 but for pairs. stream: the only one that has it, WHOLE for what blocks have and not streams; ""
    if every stream has it.
    """

    name: str
    kind: str
    tokens: str
    span: int = 1
    stream: str = ""

    @property
    def ablation(self) -> bool:
        """Whether it is of the samples with ablation alone; the others have NaN in all its columns."""
        return self.kind in (ABLATION, ABLATION_CHANGE)

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
    if name in _ABLATIONS:
        kind, stream = _ABLATIONS[name]
        return Reading(name, kind, "", stream=stream)
    match = _EXTRA.fullmatch(name)
    if match is None or match[2] == "1":
        raise ConfigError(
            f"there is no reading {name!r:.80}; expected {', '.join(TOKENS)}, update_norm_last, update_cosine_mean, "
            f"pair2_mean, ablation, ablation_text or the like"
        )
    kind, span, tokens = match.groups()
    return Reading(name, kind or ANGLE, tokens, int(span or 1))


def extra_readings(residual: bool, pairs: int) -> tuple[str, ...]:
    """The names of the readings beside the angle. pairs: the longest span, below 2 for none."""
    kinds = [UPDATE_NORM, UPDATE_COSINE] if residual else []
    kinds += [f"pair{span}" for span in range(2, pairs + 1)]
    return tuple(f"{kind}_{tokens}" for kind in kinds for tokens in TOKENS)


def ablation_readings(blocks: bool, text: bool) -> tuple[str, ...]:
    """The names of the readings that leaving out whole blocks, and text updates alone, gives."""
    return tuple(name for name, (_, stream) in _ABLATIONS.items() if (blocks if stream == WHOLE else text))


def all_blocks(streams: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Every block of the streams once: the first stream's in order, then what only later streams have.

    A block that only a later stream has stands right after the block before it in its own stream (at the
    front if there is none), so that the list keeps the model's order. Block numbers are positions in it.
    """
    merged = list(streams[0])
    for stream in streams[1:]:
        position = 0
        for block in stream:
            if block not in merged:
                merged.insert(position, block)
            position = merged.index(block) + 1
    return tuple(merged)
