"""Where each stream goes through a denoiser's blocks: which tokens of which state, as the case states it.

The builders are for the common ways; those at the end are for families that are not like another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from batches import BATCH, IMAGE, TEXT, WORDS, mask_of

Places = Sequence[int]  # of tokens in a state


@dataclass(frozen=True)
class Part:
    """A stream in some blocks: which tokens of which state it is.

    blocks: their paths: "layers.0-2" is layers.0, layers.1 and layers.2. argument, result: where the state goes into
    the block, and its position in what comes out (None: that is the state). of: how many tokens the whole state has.
    at: the places of the stream's tokens, for all samples or a tuple of those of each; None: all. valid: which of them
    count for the mean, (B, S); None: all. layout: BSD, SBD (tokens first) or BDHW (channels first). With one row for
    all samples (packed), `of` and `at` are places in it.
    """

    blocks: str
    argument: str
    result: int | None = None
    of: int = IMAGE
    at: Places | tuple[Places, ...] | None = None
    valid: np.ndarray | None = None
    layout: str = "BSD"

    @property
    def paths(self) -> tuple[str, ...]:
        names = []
        for name in self.blocks.split("."):
            first, _, last = name.partition("-")
            names.append([str(number) for number in range(int(first), int(last) + 1)] if last else [name])
        return tuple(".".join(path) for path in product(*names))


Streams = dict[str, tuple[Part, ...]]  # the parts of each stream in the order of its blocks


def captions(start: int | Sequence[int] = 0, words: Sequence[int] = WORDS) -> tuple[Places, ...]:
    """The places of the words of each sample's caption, which begins at `start`."""
    starts = [start] * BATCH if isinstance(start, int) else start
    return tuple(range(begin, begin + count) for begin, count in zip(starts, words, strict=True))


CAPTIONS = captions()
VALID = mask_of(WORDS, TEXT).numpy()


def image_alone(blocks: str, argument: str = "hidden_states", result: int | None = None, **rest: Any) -> Streams:
    """Blocks that update the image alone; the text, if there is one, only conditions it."""
    return {"image": (Part(blocks, argument, result, **rest),)}


def joint(
    blocks: str,
    argument: str,
    *,
    image: Places | tuple[Places, ...] = range(TEXT, TEXT + IMAGE),
    text: Places | tuple[Places, ...] = CAPTIONS,
    of: int = TEXT + IMAGE,
    valid: np.ndarray | None = None,
    layout: str = "BSD",
) -> Streams:
    """Blocks over one sequence, by default [text | image], where the text's padding is no part of the stream."""
    return {
        "image": (Part(blocks, argument, of=of, at=image, layout=layout),),
        "text": (Part(blocks, argument, of=of, at=text, valid=valid, layout=layout),),
    }


def apart(
    blocks: str,
    image: str = "hidden_states",
    text: str = "encoder_hidden_states",
    *,
    image_first: bool = False,
    references: int = 0,
    words: Places | tuple[Places, ...] = CAPTIONS,
    text_of: int = TEXT,
    valid: np.ndarray | None = None,
) -> Streams:
    """Blocks with an argument for each stream, which return (text, image), or (image, text) with `image_first`.

    references: tokens after the noised ones in the image stream. words: the places of the text in `text_of` tokens.
    """
    return {
        "image": (Part(blocks, image, 0 if image_first else 1, of=IMAGE + references, at=range(IMAGE)),),
        "text": (Part(blocks, text, 1 if image_first else 0, of=text_of, at=words, valid=valid),),
    }


def apart_then_joint(double: str, single: str, *, registers: int = 0, references: int = 0) -> Streams:
    """As Flux: double-stream blocks, then single-stream blocks over [registers | text | image | references].

    The text's padding is in the stream, but does not count for the mean.
    """
    text = range(registers, registers + TEXT)
    image = range(text.stop, text.stop + IMAGE)
    return then(
        apart(double, references=references, words=text, text_of=text.stop, valid=VALID),
        joint(single, "hidden_states", image=image, text=text, of=image.stop + references, valid=VALID),
    )


def then(*stages: Streams) -> Streams:
    """The streams through several lists of blocks, one list after the other."""
    names = dict.fromkeys(stream for stage in stages for stream in stage)
    return {name: tuple(part for stage in stages for part in stage.get(name, ())) for name in names}


DOUBLE_SINGLE = ("transformer_blocks.0-1", "single_transformer_blocks.0-2")
BLOCKS = "transformer_blocks.0-2"

# --- The streams of families that are not like another. ---


def boogu(references: tuple[int, int]) -> Streams:
    """References are before the image, and each sample is padded after its own."""
    image = tuple(range(before, before + IMAGE) for before in references)
    after_text = tuple(range(w + before, w + before + IMAGE) for w, before in zip(WORDS, references, strict=True))
    double = "double_stream_layers.0-1"
    return then(
        {
            "image": (Part(double, "img_hidden_states", 0, of=max(references) + IMAGE, at=image),),
            "text": (Part(double, "instruct_hidden_states", 1, of=TEXT, at=captions()),),
        },
        joint("single_stream_layers.0-2", "hidden_states", image=after_text, of=max(at.stop for at in after_text)),
    )


def flux3(references: int = 0) -> Streams:
    """The streams meet in the single blocks only."""
    length = TEXT + IMAGE + references
    return then(
        image_alone("mode_blocks.image.0-1"),
        {"text": (Part("txt_mode_blocks.0-1", "hidden_states", of=TEXT, valid=VALID),)},
        joint("single_transformer_blocks.0-2", "hidden_states", text=range(TEXT), of=length, valid=VALID),
    )


def hidream(image: int, padded: int) -> Streams:
    """The image is padded; each block gets 5 Llama tokens of its own behind the text of 7 + 5, for itself alone."""
    text, own = 7 + 5, 5
    double = "double_stream_blocks.0-1"
    after_image = range(padded, padded + text)
    return then(
        {
            "image": (Part(double, "image_tokens", 0, of=padded, at=range(image)),),
            "text": (Part(double, "text_tokens", 1, of=text + own, at=range(text)),),
        },
        joint(
            "single_stream_blocks.0-2", "image_tokens", image=range(image), text=after_image, of=after_image.stop + own
        ),
    )


def hunyuan(vision: int = 0) -> Streams:
    """Both texts of a caption, 7 + 3 and 4 + 1 tokens, after the tokens of a given image."""
    blocks, text = "transformer_blocks.0-2", captions(vision, (10, 5))
    return {
        "image": (Part(blocks, "hidden_states", 0, of=2 * IMAGE),),
        "text": (Part(blocks, "encoder_hidden_states", 1, of=vision + 10, at=text),),
    }


def mageflow(references: int = 0) -> Streams:
    """All samples lie in one row, [image | references] of each, and their texts in another."""
    blocks, second = "transformer_blocks.0-2", IMAGE + references
    image = (range(IMAGE), range(second, second + IMAGE))
    return {
        "image": (Part(blocks, "hidden_states", 1, of=2 * second, at=image),),
        "text": (Part(blocks, "encoder_hidden_states", 0, of=sum(WORDS), at=captions((0, WORDS[0]))),),
    }


def longcat(references: int = 0) -> Streams:
    """The tape joins the streams of all blocks (bypassed.py); there is no mask."""
    length = TEXT + IMAGE + references
    return then(*(joint(blocks, "hidden_states", text=range(TEXT), of=length) for blocks in DOUBLE_SINGLE))


def omni(vision: int = 0) -> Streams:
    """Three texts, each padded to 32: 2, 3 and 32 or 2 tokens; the reference image, padded to 64; the noised image."""
    start = 3 * 32 + 64
    text = tuple((*range(2), *range(32, 35), *range(64, 64 + count - 5)) for count in (37, 7))
    return joint("layers.0-2", "x", image=range(start, start + IMAGE), text=text, of=start + 32 + vision)


def ltx2(video: range, audio: int = 17) -> Streams:
    """video: the noised tokens. audio: latents in (3 - 1) * 8 + 1 video frames at 25 a second."""
    blocks = "transformer_blocks.0-2"
    return {
        "image": (Part(blocks, "hidden_states", 0, of=video.stop, at=video),),
        "audio": (Part(blocks, "audio_hidden_states", 1, of=audio),),
    }


def minimax_h3(frames: int, *, given: int = 0, sound: int = 0, pictures: int = 0) -> Streams:
    """[text | the given frame | both channels of the sound | video]."""
    start = TEXT + given * IMAGE + 2 * sound
    image = range(start, start + frames * IMAGE)
    text = tuple(range(pictures, words) for words in WORDS)
    return joint("transformer_blocks.0-2", "hidden_states", image=image, text=text, of=image.stop)


def unet_levels(*levels: tuple[int, str], argument: str = "hidden_states", layout: str = "BSD") -> Streams:
    """The attention of a U-Net, in order, with the number of places at each level."""
    return {"image": tuple(Part(blocks, argument, of=places, layout=layout) for places, blocks in levels)}
