"""docs/models.md: the models that --model knows by name, from simpletuner_layerprobe/published.py.

python tools/models_page.py       rewrites the table
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- models: made by tools/models_page.py -->", "<!-- /models -->"
HEAD = "| name | SimpleTuner's family and flavour | published at | parameters |\n| --- | --- | --- | --- |\n"


def table() -> str:
    """The Markdown table, between its two marks."""
    from simpletuner_layerprobe.published import NAMED

    rows = [
        f"| `{name}` | {known.family}, {known.flavour} | {known.source} | {known.parameters} |\n"
        for name, known in NAMED.items()
    ]
    return f"{START}\n{HEAD}{''.join(rows)}{END}"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(START, 1)
    PAGE.write_text(before + table() + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
