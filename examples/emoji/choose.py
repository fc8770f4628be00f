"""Choose the pictures that lie in the repository: a few hundred of emoji.npz, into pictures.npz.

    python choose.py --data emoji.npz --out pictures.npz

The choice is random and the same every time: 200 fluent emoji to learn that style from, 120 fluent ones to judge it on
(of the emoji that were held out everywhere), and 100 emoji in each style that the base has seen.
"""

import argparse
import random
import sys
from pathlib import Path

from emoji_set import EmojiSet

TO_LEARN, TO_JUDGE, SEEN = 200, 120, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("emoji.npz"), help="made by make_data.py")
    parser.add_argument("--out", type=Path, default=Path("pictures.npz"))
    options = parser.parse_args()
    everything = EmojiSet.load(options.data)
    choice = random.Random(2)

    def some(style: str, count: int, held_out: bool) -> list[int]:
        numbers = [
            number
            for number, emoji in enumerate(everything.emojis)
            if emoji.style == style and everything.is_held_out(number) == held_out
        ]
        return choice.sample(numbers, count)

    numbers = some("fluent", TO_LEARN, held_out=False) + some("fluent", TO_JUDGE, held_out=True)
    numbers += some("noto", SEEN, held_out=False) + some("twemoji", SEEN, held_out=False)
    everything.take(sorted(numbers)).save(options.out)
    print(f"{options.out}: {len(numbers)} pictures, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
