"""How samples are counted in words, wherever they are: while a run is recorded, and in all that is made of it."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """ "1 block", "1,455 blocks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def samples_text(samples: int, images: int | None) -> str:
    """ "2,000 samples of 60 images"; without the images where they are not known."""
    return counted(samples, "sample") + (f" of {counted(images, 'image')}" if images is not None else "")
