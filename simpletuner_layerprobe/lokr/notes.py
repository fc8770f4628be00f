"""What a reader of a LyCORIS config should know: every key and every name in it that does not do what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.lokr.groups import Model, layer_kind
from simpletuner_layerprobe.lokr.keys import (
    did_you_mean,
    global_keys,
    inner_names,
    inside_keys,
    outer_name,
    read_by,
    without_effect,
)
from simpletuner_layerprobe.lokr.meaning import matches_any, rules_of, self_and_parents
from simpletuner_layerprobe.lokr.network import BY_POSITION, KEPT, fresh_wrapper
from simpletuner_layerprobe.lokr.presets import (
    FULL,
    MAPS,
    is_file,
    living_keys,
    named_preset,
    replaced,
    written_preset,
)
from simpletuner_layerprobe.lokr.stops import bypasses
from simpletuner_layerprobe.lokr.values import idle_values

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.check import Row

_PATTERNS = ("name_algo_map", "target_name", "exclude_name")
_CLASSES = ("target_module", "module_algo_map")
_LLM_ADAPTER = "LLMAdapterTransformerBlock"
# Names that other programs have for the rank and for alpha.
_RANK = ("rank", "network_dim", "lora_rank", "r", "linear_rank", "dim", "lora_dim", "linear_dim", "conv_dim")
_ALPHA = ("alpha", "network_alpha", "lora_alpha", "linear_alpha", "conv_alpha")


def notes_of(config: Mapping[str, Any], model: Model, rows: Sequence[Row]) -> tuple[str, ...]:
    """What a reader of the config should know, one line each."""
    notes = [*_cut(config), *_by_layer_class(config, model, rows)]
    by_class = _layer_classes(config, model)
    if by_class and not getattr(model, "precision", "as recorded"):
        notes.append(
            f"layers are reached by their own class ({', '.join(by_class)}), of which a quantised base has fewer: say "
            "its base_model_precision with --precision, such as int8-quanto"
        )
    written = written_preset(config)
    if written.get("target_module") and written.get("name_algo_map") and not all(row.ok for row in rows):
        notes.append(
            "LyCORIS builds the classes in target_module before it looks at name_algo_map, and a name's "
            'settings leak into the next class; write "target_module": [] and let the names decide'
        )
    notes += [*_presets(config), *_unread(config, rows), *_unread_inside(config, rows)]
    notes += idle_values(config, model, rows)
    if any(row.got for row in rows):
        notes += _idle(config, model, rows)
    return tuple(notes)


def unmatched(config: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """The name patterns and classes of the config that no module of the model has."""
    rules, written = rules_of(config), _own(config)
    names = [module.name for module in model.modules]
    present = {module.type for module in model.modules} | {model.model_class}
    patterns = [pattern for key in _PATTERNS for pattern in written.get(key, ())]
    classes = [name for key in _CLASSES for name in written.get(key, ())]
    return tuple(
        dict.fromkeys(
            [pattern for pattern in patterns if not any(matches_any(rules, [pattern], name) for name in names)]
            + [name for name in classes if name not in present]
        )
    )


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the author wrote into both presets: not what LyCORIS ships by name."""
    return written_preset(config) if is_file(config) else dict(config.get("apply_preset") or {})


def _cut(config: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that become others."""
    for key, default in BY_POSITION.items():
        value = config.get(key, default)
        if float(value) != int(value) and (key != "multiplier" or int(value)):
            rank = ", for which LyCORIS takes the rank" if key == "linear_alpha" and not int(value) else ""
            yield f"{key} {value} is read as {int(value)} by SimpleTuner{rank}"
    for key in ("conv_dim", "conv_alpha"):
        if key in config and not config[key]:
            instead = key.replace("conv", "linear")
            yield f"{key} {config[key]} is read as {instead}, {config.get(instead, BY_POSITION[instead])}"


def _layer_classes(config: Mapping[str, Any], model: Model) -> list[str]:
    """The classes of layers that the config's choice of classes has, its default choice too."""
    rules = rules_of(config)
    chosen = {*rules.TARGET_REPLACE_MODULE, *rules.MODULE_ALGO_MAP}
    return sorted(chosen & {module.type for module in model.modules if layer_kind(module) in ("linear", "conv")})


def _by_layer_class(config: Mapping[str, Any], model: Model, rows: Sequence[Row]) -> Iterator[str]:
    """How many modules get an adapter by the class of the layer itself, and by nothing else in the file."""
    rules, written = rules_of(config), written_preset(config)
    targets = {*rules.TARGET_REPLACE_MODULE, *rules.MODULE_ALGO_MAP}
    patterns = [*rules.TARGET_REPLACE_NAME, *rules.NAME_ALGO_MAP]
    classes = {module.name: module.type for module in model.modules} | {"": model.model_class}
    built = [row for row in rows if row.got is not None]
    bare = [
        row
        for row in built
        if row.type in targets
        and not matches_any(rules, patterns, row.name)
        and not targets.intersection(classes.get(path, "") for path in self_and_parents(row.name)[1:])
    ]
    if not bare:
        return
    numbers = sum(row.got.parameters for row in bare if row.got is not None)
    own = {row.type: None for row in bare}
    named = [name for key in (*_PATTERNS[:2], *_CLASSES) for name in written.get(key, ()) if name not in own]
    count = f"{len(bare):,} of {len(built):,} modules, {numbers:,} parameters, by"
    others = " and not by your names" if named else ""
    if "target_module" in written:
        yield f"{count} the bare class {', '.join(own)}{others}"
    else:
        yield (
            f"{count} LyCORIS's default classes{others}: target_module is left out; "
            'write "target_module": [] for the names alone'
        )


def _presets(config: Mapping[str, Any]) -> Iterator[str]:
    """What counts for nothing in the two presets."""
    name, named = config.get("preset", FULL), named_preset(config)
    living = {key: value for key, value in named.items() if key in living_keys()}
    for key in replaced(config):
        if key == "enable_conv" and named == named_preset({}):
            yield "enable_conv false has no effect: LyCORIS turns it on again when it builds the network"
        else:
            yield f'{key} in apply_preset has no effect: "preset": "{name}" sets it again'
    yield from (f"{key} has no effect in apply_preset" for key in config.get("apply_preset") or {} if _is_dead(key))
    if is_file(config):
        yield from (f"{key} has no effect in {name}" for key in named if _is_dead(key))
    elif "preset" in config and name != FULL:
        same = living == {key: named_preset({}).get(key) for key in living}
        yield (
            f'"preset": "{name}" has no effect'
            if same
            else (f'"preset": "{name}" chooses no modules: LyCORIS reads only {" and ".join(living)} of it')
        )


def _is_dead(key: str) -> bool:
    return key not in living_keys()


def _unread(config: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """The keys at the top of the file that nothing reads, or nothing that is built."""
    algorithms = list(dict.fromkeys(row.got.algo for row in rows if row.got is not None))
    for key, value in config.items():
        if key not in global_keys():
            yield f"{key} has no effect: {_instead(key, algorithms)}"
        elif key in KEPT:
            if config["algo"] != "tlora":
                yield f"{key} has no effect with {config['algo']}"
        elif not algorithms or value is False:
            continue
        elif without_effect(key, algorithms):
            yield f"{key} has no effect with {', '.join(algorithms)}"
        elif key == "train_norm" and str(value).lower() != "false" and "norm" not in algorithms:
            yield "train_norm has no effect: no norm that LyCORIS can train is among the modules"
    plain = set(fresh_wrapper().LycorisNetwork.TARGET_REPLACE_MODULE)
    if config.get("dropout") and not bypasses(config) and {row.type for row in rows if row.got} <= plain:
        yield 'dropout has no effect without "bypass_mode": true: LyCORIS takes it only there'
    if config["algo"] != "tlora" and config["algo"].lower() == "tlora":
        yield f'algo {config["algo"]}: SimpleTuner masks no ranks unless it is written "tlora"'
    if _LLM_ADAPTER in written_preset(config).get("target_module", ()) and not config.get("train_llm_adapter"):
        yield f'{_LLM_ADAPTER} has no effect without "train_llm_adapter": true'


def _instead(key: str, algorithms: Sequence[str]) -> str:
    """Where LyCORIS would read what a key at the top of the file seems to say."""
    instead = "linear_dim" if key in _RANK else "linear_alpha" if key in _ALPHA else outer_name(key)
    if instead:
        return f"LyCORIS reads {instead} there"
    if key in living_keys():
        return "LyCORIS reads it inside apply_preset"
    if any(read_by(algo, key) for algo in algorithms):
        return "LyCORIS reads it only inside name_algo_map and module_algo_map"
    return f"LyCORIS does not read it{did_you_mean(key, global_keys())}"


def _unread_inside(config: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """The settings of single names and classes that their algorithm takes and never looks at."""
    everything = {row.got.algo for row in rows if row.got is not None}
    leaks = not all(row.ok for row in rows)  # then another algorithm may look at them
    where: dict[tuple[str, str], list[str]] = {}
    for names in MAPS:
        for name, settings in written_preset(config).get(names, {}).items():
            algo = settings.get("algo", config["algo"].lower())
            for key in settings:
                if key in ("algo", "dim") or any(read_by(each, key) for each in {algo, *(everything if leaks else ())}):
                    continue
                where.setdefault((key, algo), []).append(name)
    for (key, algo), named in where.items():
        more = f" and {len(named) - 1:,} more" if len(named) > 1 else ""
        instead = (
            "dim"
            if key in _RANK
            else "alpha"
            if key in _ALPHA and key != "alpha"
            else min(inner_names(key), default=key)
        )
        hint = (
            f"; LyCORIS reads {instead} there"
            if instead != key and (instead == "dim" or read_by(algo, instead))
            else did_you_mean(key, inside_keys(algo))
        )
        yield f"{key} has no effect with {algo} (given for {named[0]}{more}){hint}"


def _idle(config: Mapping[str, Any], model: Model, rows: Sequence[Row]) -> Iterator[str]:
    """The names and classes that match something, but no module that gets an adapter, or none that is left to them."""
    rules, replaced_keys = rules_of(config), replaced(config)
    written = {key: value for key, value in _own(config).items() if key not in replaced_keys}
    classes = {module.name: module.type for module in model.modules} | {"": model.model_class}
    built = [row.name for row in rows if row.got is not None]
    around = {classes.get(path, "") for name in built for path in self_and_parents(name)}
    missing = set(unmatched(config, model))
    for key in (*_PATTERNS[:2], *_CLASSES):
        for entry in written.get(key, ()):
            reached = entry in around if key in _CLASSES else any(matches_any(rules, [entry], name) for name in built)
            if not reached and entry not in missing and entry != _LLM_ADAPTER:
                yield f"{entry} in {key} reaches no layer that gets an adapter"
    deciding: dict[str, set[str]] = {}
    patterns = written.get("name_algo_map", {})
    for name in built:
        matching = [pattern for pattern in patterns if matches_any(rules, [pattern], name)]
        first = name if name in patterns else next(iter(matching), None)
        for pattern in matching:
            deciding.setdefault(pattern, set()).add(str(first))
    for pattern, first_ones in deciding.items():
        if pattern not in first_ones and any(patterns[first] != patterns[pattern] for first in first_ones):
            yield f"{pattern} in name_algo_map decides nothing: {sorted(first_ones)[0]} before it has what it matches"
