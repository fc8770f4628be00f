"""What LyCORIS makes of the configs that SimpleTuner ships: docs/example-configs.md.

    python tools/example_configs.py      builds every one of them and rewrites the page (a minute, no download)

A model is built by the class that SimpleTuner trains, on the meta device, with the sizes of SIZES or else the class's
own defaults: which modules a config finds depends on the class alone, which factors can be had also on the sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "example-configs.md"

ZOO = ("sd35-large", "sd35-medium", "flux-dev")
# Sizes where the class's defaults are another model's, or cannot be built.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": (
        "SDXL base",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    ),
    "boogu_image": ("class defaults, rotary axes of 32 so that it can be built", {"axes_dim_rope": (32, 32, 32)}),
    "omnigen": (
        "class defaults, plain rotary scaling so that it can be built",
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    ),
}


@dataclass(frozen=True)
class Model:
    """A model without weights. sizes: where its sizes come from."""

    name: str
    sizes: str
    model_class: str
    modules: tuple[Any, ...]
    streams: tuple[Any, ...] = ()
    targets: tuple[Any, ...] = ()

    @property
    def weights(self) -> str:
        """What the weights of its modules come to: "8.1 B"."""
        return f"{sum(prod(module.shape) for module in self.modules if module.shape) / 1e9:.1f} B"


@dataclass(frozen=True)
class Effect:
    """What became of one config on one model. differs: one line for each way in which that is not what it says."""

    adapted: int
    parameters: int
    differs: tuple[str, ...]


def effect(config: Mapping[str, Any], model: Model) -> Effect:
    """Build a config on a model and say how the result differs from what the config says."""
    from simpletuner_layerprobe.errors import ProbeError
    from simpletuner_layerprobe.lokr.proof import check_config

    try:
        check = check_config(config, model)
    except ProbeError as error:
        return Effect(0, 0, (f"refused: {error}",))
    differs = []
    if check.wrong:
        differs.append(f"{len(check.wrong)} modules get other settings than written")
    absent = list(dict.fromkeys(check.unmatched))
    if absent:
        differs.append(f"the model has no {' and no '.join(f'`{name}`' for name in absent)}: nothing there is adapted")
    differs += [note for note in check.notes if "no effect" in note or "nothing would train" in note]
    got: dict[int, Counter[str]] = {}
    for row in check.rows:
        parts = row.got.factorisation if row.got else None
        asked = row.intended.factor if row.intended else None
        if parts and asked is not None and asked > 0:
            factors = sorted({parts[0][0], parts[1][0]})
            got.setdefault(asked, Counter())["/".join(map(str, factors))] += 1
    for asked, counts in sorted(got.items()):
        if set(counts) != {str(asked)}:
            most = ", ".join(f"{name} in {count}" for name, count in counts.most_common(3))
            differs.append(f"factor {asked} becomes {most}{', ...' if len(counts) > 3 else ''} modules")
    return Effect(sum(row.got is not None for row in check.rows), check.parameters, tuple(differs))


def simpletuner_folder() -> Path:
    """Where SimpleTuner is installed; it is not imported."""
    spec = importlib.util.find_spec("simpletuner")
    if spec is None or spec.origin is None:
        raise SystemExit("SimpleTuner is not installed")
    return Path(spec.origin).parent


# The defaults, on the architectures known by name: no SimpleTuner needed, so that a test can rebuild this part


def defaults() -> dict[str, dict[str, Any]]:
    """The configs that SimpleTuner starts from: its lycoris_config.json, and one per algorithm in lycoris_defaults."""
    folder = simpletuner_folder()
    spec = importlib.util.spec_from_file_location("lycoris_defaults", folder / "lycoris_defaults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {"examples/lycoris_config.json": json.loads((folder / "examples" / "lycoris_config.json").read_text())}
    return found | {f"default `{algo}`": config for algo, config in module.lycoris_defaults.items()}


def defaults_section() -> str:
    from simpletuner_layerprobe.models import architecture

    with _quiet():
        architectures = {name: architecture(name) for name in ZOO}
    models = [Model(name, "published", one.model_class, one.modules) for name, one in architectures.items()]
    rows = [(name, model, effect(config, model)) for name, config in defaults().items() for model in models]
    return "## SimpleTuner's defaults\n\n" + _table(rows, "default")


# The examples, on the classes that SimpleTuner trains


def examples_section() -> str:
    from simpletuner.helpers.models.all import ModelRegistry

    from simpletuner_layerprobe.probe.families import FAMILIES

    registry = ModelRegistry.model_families()
    supported = {family.name for family in FAMILIES}
    rows: list[tuple[str, Model, Effect]] = []
    outside = []
    seen: dict[str, int] = {}
    for folder in sorted((simpletuner_folder() / "examples").iterdir()):
        if not (folder / "lycoris_config.json").exists():
            continue
        config = json.loads((folder / "lycoris_config.json").read_text())
        options = json.loads((folder / "config.json").read_text())
        written = options["model_family"]
        family = written.replace("-", "_")
        if family not in registry or family not in supported:
            outside.append(f"`{folder.name}` (model family `{written}`)")
            continue
        key = json.dumps([family, config], sort_keys=True)
        more = []
        if written not in registry:
            more.append(f"`model_family` is `{written}`; SimpleTuner's name is `{family}`")
        if Path(options["lycoris_config"]).parent.name != folder.name:
            more.append(f"`lycoris_config` points to `{options['lycoris_config']}`, which is not this folder")
        if key in seen and not more:
            name, model, found = rows[seen[key]]
            rows[seen[key]] = (f"{name}, `{folder.name}`", model, found)
            continue
        model = _model(family, registry[family])
        found = effect(config, model)
        seen.setdefault(key, len(rows))
        rows.append((f"`{folder.name}`", model, Effect(found.adapted, found.parameters, (*more, *found.differs))))
    text = "## SimpleTuner's examples\n\n" + _table(rows, "example")
    if outside:
        text += f"Not built, as no such family is registered or supported: {', '.join(outside)}.\n"
    return text


def _model(family: str, entry: Any) -> Model:
    import torch

    from simpletuner_layerprobe.probe.modules import module_table
    from simpletuner_layerprobe.run.manifest import Module

    sizes, settings = SIZES.get(family, ("class defaults", {}))
    with _quiet(), torch.device("meta"):
        built = entry.MODEL_CLASS(**settings)
    return Model(family, sizes, type(built).__name__, tuple(Module(*row) for row in module_table(built)))


# The page


def _table(rows: Iterable[tuple[str, Model, Effect]], what: str) -> str:
    """Those that differ as a table, and a sentence about the rest."""
    rows = list(rows)
    differing: dict[tuple[str, tuple[str, ...]], list[tuple[Model, Effect]]] = {}
    for name, model, found in rows:
        if found.differs:
            differing.setdefault((name, found.differs), []).append((model, found))
    lines = [f"| {what} | model | adapted modules | parameters | what differs |", "| --- | --- | --- | --- | --- |"]
    for (name, differs), alike in differing.items():
        cells = (
            name,
            "<br>".join(f"{model.name}, {model.weights} ({model.sizes})" for model, _ in alike),
            "<br>".join(f"{found.adapted:,}" for _, found in alike),
            "<br>".join(f"{found.parameters:,}" for _, found in alike),
            "; ".join(" ".join(one.split()) for one in differs),
        )
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n\n" if differing else ""
    rest = [f"{name} on {model.name} ({found.parameters:,})" for name, model, found in rows if not found.differs]
    if rest:
        text += f"The rest has the effect that it says (parameters in brackets): {'; '.join(rest)}.\n\n"
    return text


@contextlib.contextmanager
def _quiet() -> Any:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def page() -> str:
    head = f"""# What LyCORIS makes of SimpleTuner's own configs

Made by `python tools/example_configs.py` with SimpleTuner {version("simpletuner")} and
LyCORIS {version("lycoris-lora")}; do not edit. Every LyCORIS config that SimpleTuner ships was built with
LyCORIS's own network on the model it is meant for, without weights, as `layerprobe check-config` does it. The column
of differences says where the result is not what the file says. A factor is only ever realised as a divisor of each
dimension of a weight: `8/16` is one dimension at 8 and the other at 16. Where the sizes of a model are those of the
class's defaults, another flavour may have other divisors; which modules are found does not depend on them.

"""
    return head + defaults_section() + examples_section()


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
