"""Which keys of a LyCORIS config are read, and by what: told by LyCORIS's own code, not by a list.

`create_lycoris` takes any key and looks at some; the network hands the rest to the class of each algorithm, which
takes any key too. So what counts is what their code mentions.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from simpletuner_layerprobe.lokr.network import BY_POSITION, KEPT, fresh_wrapper, wrapper_source

OF_ONE = {"dim": "lora_dim"}
"""Settings of single names and classes that go by another name inside LyCORIS."""
# Where create_single_module puts use_tucker among the arguments of an algorithm; T-LoRA has another there.
_TUCKER = 8


@cache
def global_keys() -> frozenset[str]:
    """The keys at the top of the file that SimpleTuner or `create_lycoris` reads."""
    taken = inspect.signature(fresh_wrapper().create_lycoris).parameters
    named = {name for name, parameter in taken.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return frozenset({*named - {"module"}, *_handed_on(), *BY_POSITION, *KEPT, "apply_preset"})


def inner_names(key: str) -> frozenset[str]:
    """What the network gets a key at the top of the file as: "dora_wd" is its weight_decompose."""
    return _handed_on().get(key, frozenset())


def outer_name(inner: str) -> str | None:
    """The key at the top of the file that the network gets as `inner`."""
    return next((key for key, names in _handed_on().items() if inner in names), None)


def read_by(algo: str, key: str) -> bool:
    """Whether an algorithm looks at a setting of this name, inside LyCORIS; "norm" is train_norm's."""
    if key == "use_tucker":
        key = [*_parameters(_class(algo)), *[""] * _TUCKER][_TUCKER]
    return key in _mentioned(algo)


def acts_on(algo: str, *attributes: str) -> bool:
    """Whether an algorithm looks at one of these of its own in anything but its making."""
    made = [kind for kind in _class(algo).__mro__ if "lycoris" in kind.__module__]
    methods = [member for kind in made for name, member in vars(kind).items() if name != "__init__"]
    return any(
        isinstance(node, ast.Attribute) and node.attr in attributes
        for method in methods
        if inspect.isfunction(method)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
    )


def inside_keys(algo: str) -> frozenset[str]:
    """The settings that an algorithm looks at, as single names and classes give them."""
    return frozenset({"algo", *OF_ONE, *_mentioned(algo)})


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """ "; did you mean factor?", "" where nothing is near."""
    near = get_close_matches(key.lower(), sorted(known), 1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def without_effect(key: str, algorithms: Iterable[str]) -> bool:
    """Whether none of these algorithms looks at a key that is read at the top of the file."""
    own = inspect.signature(fresh_wrapper().LycorisNetwork.__init__).parameters
    inner = inner_names(key)
    for_algorithms = {name for name in inner if name not in own or name == "use_tucker"}
    return bool(inner) and for_algorithms == inner and not any(read_by(a, name) for a in algorithms for name in inner)


@cache
def _handed_on() -> Mapping[str, frozenset[str]]:
    """Key of the file -> the arguments of the network that `create_lycoris` makes of it."""
    wrapper = fresh_wrapper()
    function = _function(wrapper_source(), "create_lycoris")
    keys_of: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for name in map(ast.unparse, node.targets):
                keys_of.setdefault(name, set()).update(_got(node.value))
    handed: dict[str, set[str]] = {key: set() for key in _got(function)}
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        for argument in call.keywords if getattr(call.func, "id", "") == "LycorisNetwork" else ():
            mentioned = {node.id for node in ast.walk(argument.value) if isinstance(node, ast.Name)}
            keys = _got(argument.value).union(*(keys_of.get(name, set()) for name in mentioned))
            for key in keys:
                handed.setdefault(key, set()).add(str(argument.arg))
    for old, new in wrapper.deprecated_arg_dict.items():
        handed[old] = handed.get(old, set()) | handed[new]
    return {key: frozenset(names) for key, names in handed.items()}


def _function(source: str, name: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == name)


def _got(expression: ast.AST) -> set[str]:
    """The keys that an expression takes with kwargs.get("key")."""
    calls = [node for node in ast.walk(expression) if isinstance(node, ast.Call) and node.args]
    return {
        str(call.args[0].value)
        for call in calls
        if ast.unparse(call.func) == "kwargs.get" and isinstance(call.args[0], ast.Constant)
    }


def _class(algo: str) -> Any:
    wrapper = fresh_wrapper()
    return wrapper.NormModule if algo == "norm" else wrapper.network_module_dict[algo]


@cache
def _mentioned(algo: str) -> frozenset[str]:
    """The arguments of an algorithm that the code of its class mentions, and those it hands on without a look."""
    made = [made.__init__ for made in _class(algo).__mro__ if "lycoris" in made.__module__ and "__init__" in vars(made)]
    return frozenset().union(*(set(_parameters(init)) & _loaded(init) for init in made))


def _parameters(called: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(called).parameters


def _loaded(function: Callable[..., Any]) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
