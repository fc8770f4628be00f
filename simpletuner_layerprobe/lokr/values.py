"""Values of a LyCORIS config that change nothing in what is built, though its algorithms read their keys.

Of the numbers that SimpleTuner wants in every config those are left out that are written for nothing by custom: an
alpha of 1, and a linear_dim of 1 or of 10,000 and more, which stands for full matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.lokr.adapter import LOKR
from simpletuner_layerprobe.lokr.groups import Model
from simpletuner_layerprobe.lokr.keys import acts_on, inner_names, read_by
from simpletuner_layerprobe.lokr.meaning import reading
from simpletuner_layerprobe.lokr.presets import MAPS, written_preset

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.check import Row

FULL_DIM = 10_000
_FULL = {"lokr_w1", "lokr_w2"}


def idle_values(config: Mapping[str, Any], model: Model, rows: Sequence[Row]) -> Iterator[str]:
    """One line for each, in the words of the file."""
    built = [row for row in rows if row.got is not None]
    if not built:
        return
    algorithms = list(dict.fromkeys(row.got.algo for row in built if row.got))
    yield from _convolutions(config, built, algorithms)
    firsts = [name for row in built if row.got and row.got.algo == LOKR for name, _ in row.got.tensors]
    if config.get("decompose_both") and firsts and "lokr_w1_a" not in firsts:
        yield "decompose_both has no effect: no first matrix has a side of more than twice the rank"
    inside = [settings for key in MAPS for settings in written_preset(config).get(key, {}).values()]
    dora = config.get("dora_wd") or any(settings.get("weight_decompose") for settings in inside)
    if "wd_on_output" in config and not dora and any(read_by(algo, "wd_on_out") for algo in algorithms):
        yield "wd_on_output has no effect without dora_wd"
    if config.get("rank_dropout") and not any(acts_on(algo, "rank_dropout", "rank_drop") for algo in algorithms):
        yield f"rank_dropout has no effect with {', '.join(algorithms)}"
    yield from _ranks(config, model, rows, built)


def _convolutions(config: Mapping[str, Any], built: Sequence[Row], algorithms: Sequence[str]) -> Iterator[str]:
    kernels = [row.shape[2:] for row in built if len(row.shape) > 2]
    why = "no convolution with a kernel above 1 gets an adapter"
    if not any(kernel[0] > 1 for kernel in kernels):  # LyCORIS looks at the first side
        yield from (f"{key} has no effect: {why}" for key in ("conv_dim", "conv_alpha") if config.get(key))
    if not any(max(kernel) > 1 for kernel in kernels) and any(read_by(algo, "use_tucker") for algo in algorithms):
        for key, value in config.items():
            if value and inner_names(key) == {"use_tucker"}:
                yield f"{key} has no effect: {why}"


def _ranks(config: Mapping[str, Any], model: Model, rows: Sequence[Row], built: Sequence[Row]) -> Iterator[str]:
    """Ranks and alphas that nothing goes by, and ranks so large that LoKr makes full matrices."""
    # Where something leaks from a name to another class, what a module has got it from is not known.
    names = {row.name for row in built} if all(row.ok for row in rows) else set()
    settings = {module.name: own for module, own in reading(config, model) if module.name in names}
    full = {row.name for row in built if row.got and {name for name, _ in row.got.tensors} >= _FULL}
    asked = {name for name in full if settings.get(name, {}).get("full_matrix", config.get("full_matrix"))}
    no_alpha = full | {row.name for row in built if row.got and not read_by(row.got.algo, "alpha")}
    no_rank = asked | {row.name for row in built if row.got and not read_by(row.got.algo, "lora_dim")}
    others = list(dict.fromkeys(row.got.algo for row in built if row.got and row.name not in full))
    dim, alpha = (int(config.get(key, 1)) for key in ("linear_dim", "linear_alpha"))
    if alpha != 1 and len(no_alpha) == len(built):
        places = [f"with {', '.join(others)}"] * bool(others) + ["on full matrices, whose scale is 1"] * bool(full)
        yield f"linear_alpha {alpha} has no effect {' and '.join(places)}"
    if 1 < dim < FULL_DIM and len(no_rank) == len(built):
        yield f"linear_dim {dim} has no effect with {', '.join([*others, *['full_matrix'] * bool(asked)])}"
    elif dim < FULL_DIM:
        small = [name for name in full - asked if not settings.get(name, {}).get("dim")]
        if small:
            yield (
                f"linear_dim {dim} is no rank in {len(small):,} of {len(built):,} modules: where it is half of the "
                "second part's longer side or more LyCORIS makes full matrices, of scale 1"
            )
    for key, none, where in (("alpha", no_alpha, "full matrices, whose scale is 1"), ("dim", no_rank, "full_matrix")):
        given = [name for name, own in settings.items() if own.get(key, 1) != 1]
        if given and full.issuperset(given) and none.issuperset(given):
            which = "on" if key == "alpha" else "with"
            yield f"{key} has no effect {which} {where} (given for {len(given):,} modules, first {given[0]})"
