"""`layerprobe adapter`: where a finished adapter put its change."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.arguments import Add, add_wide
from simpletuner_layerprobe.commands.imports import light, named_model
from simpletuner_layerprobe.commands.output import LEFT, OK, RIGHT, print_json, print_table, print_text, quiet, say
from simpletuner_layerprobe.errors import ModelError
from simpletuner_layerprobe.show.words import counted, listed

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.adapters import AdapterUpdates, Part

HEADS = ("update", "share", "weight", "relative", "parameters", "share")
PLANNED = "planned"
LABEL = 9
"""The width of the label that a line below the table begins with."""
SPARE = ("weight", "update", PLANNED)


def add_parser(add: Add) -> None:
    added = add(
        "adapter",
        command,
        "say where a finished adapter put its change, by block, kind and stream",
        "The Frobenius norm of what is added to each weight, and of the weight: lokr, loha and locon as LyCORIS saves\n"
        "them, lora as PEFT does. Without the base's weights the updates are shown alone. docs/adapter.md says what\n"
        "the numbers are.",
        "layerprobe adapter output/sd35-weighted/pytorch_lora_weights.safetensors --model models/sd35-large\n"
        "layerprobe adapter pytorch_lora_weights.safetensors --run output/sd35-probe/layerprobe --json",
    )
    added.add_argument("file", metavar="FILE", help="the adapter, pytorch_lora_weights.safetensors")
    added.add_argument(
        "--model",
        metavar="FOLDER",
        help="the base, a pipeline or a transformer in diffusers' folders, or a transformer config.json (no weights); "
        "default the base of --run",
    )
    added.add_argument("--run", metavar="RUN", help="a probe run of the base: its modules, and where its base lies")
    added.add_argument(
        "--config",
        metavar="LYCORIS_CONFIG",
        help="the LyCORIS config that the adapter was made from; default the lycoris_config.json beside FILE",
    )
    added.add_argument("--json", action="store_true", help="print one JSON object, with every module")
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import adapter

    modules, imports = None, light("lycoris", arguments)
    if arguments.model is not None:
        try:
            modules = named_model(arguments)
        except ModelError:  # its weights alone may do; what the class lacks is told of an import with nothing left out
            imports = quiet()
    with imports:
        made = adapter(
            arguments.file, model=arguments.model, run=arguments.run, config=arguments.config, modules=modules
        )
    if arguments.json:
        print_json(as_json(made))
        return OK
    _print(made, arguments.wide)
    return OK


def _print(made: AdapterUpdates, wide: bool) -> None:
    """The table of blocks, kinds and streams, and the notes."""
    whole = made.whole
    of_weight = "" if whole.relative is None else f", {percent(whole.relative)} of the weights' norm"
    algorithms = listed(list(dict.fromkeys(made.algorithms)))
    say(f"{algorithms}, {counted(whole.modules, 'module')}: an update of norm {digits(whole.update, 4)}{of_weight}")
    differs = made.planned_M is not None and bool((made.planned_M != made.parameters_M).any())
    heads = ["block", *HEADS, *([PLANNED] if differs else [])]
    rows = [_row(part, whole, differs) for part in (*made.by_block, whole)]
    for title, parts in (("kind", made.by_kind), ("stream", made.by_stream)):
        if len(parts) > 1:
            rows += [[""] * len(heads), [title, *heads[1:]], *(_row(part, whole, differs) for part in parts)]
    print_table(heads, rows, LEFT + RIGHT * (len(heads) - 1), spare=SPARE, wide=wide)
    for line in _lines(made, differs):
        print_text(line[:LABEL], line[LABEL:], wide=wide)


def _row(part: Part, whole: Part, differs: bool) -> list[str]:
    cells = [
        part.name,
        digits(part.update, 4),
        f"{part.share:.1%}",
        "-" if part.weight is None else digits(part.weight, 4),
        "-" if part.relative is None else percent(part.relative),
        f"{part.parameters:,}",
        f"{part.parameters / whole.parameters:.1%}",
    ]
    return [*cells, f"{part.planned:,}"] if differs else cells


def _lines(made: AdapterUpdates, differs: bool) -> Iterator[str]:
    """What stands below the table."""
    if made.base is not None:
        yield f"base     {made.base}"
    if made.config is not None:
        planned = "the file has otherwise than planned" if differs else "the file has the planned parameters everywhere"
        yield f"plan     {made.config}: {planned}"
    if made.left_out:
        yield f"note     {counted(len(made.left_out), 'planned module')} not in the file, first {made.left_out[0]}"
    for note in made.notes:
        yield f"note     {note}"


def percent(share: float) -> str:
    """Three digits: "0.512%", "12.3%"."""
    return f"{digits(100 * share, 3)}%"


def digits(value: float, count: int) -> str:
    """So many digits, with the zeros at the end."""
    return f"{value:#.{count}g}".rstrip(".")


def as_json(made: AdapterUpdates) -> dict[str, Any]:
    """What `adapter --json` prints. Numbers that are not known are null."""
    relative_M = made.relative_M
    return {
        "file": str(made.path),
        "base": None if made.base is None else str(made.base),
        "config": None if made.config is None else str(made.config),
        "all": _part_json(made.whole),
        "blocks": _parts_json(made.by_block),
        "kinds": _parts_json(made.by_kind),
        "streams": _parts_json(made.by_stream),
        "modules": [
            {
                "name": name,
                "algo": made.algorithms[place],
                "block": made.blocks[place],
                "kind": made.kinds[place] if made.kinds else None,
                "stream": made.streams[place] if made.streams else None,
                "update": float(made.update_M[place]),
                "weight": _number(made.weight_M[place]),
                "relative": _number(relative_M[place]),
                "parameters": int(made.parameters_M[place]),
                "planned": None if made.planned_M is None else int(made.planned_M[place]),
            }
            for place, name in enumerate(made.names)
        ],
        "left_out": list(made.left_out),
        "notes": list(made.notes),
    }


def _parts_json(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [_part_json(part) for part in parts]


def _part_json(part: Part) -> dict[str, Any]:
    return {**vars(part), "relative": part.relative}


def _number(value: float) -> float | None:
    """A number, None for NaN."""
    return float(value) if value == value else None
