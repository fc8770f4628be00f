"""SimpleTuner's own denoiser classes, on the meta device: the model that it trains, without weights or a download.

Its inner class names differ from diffusers' in many families, and a LyCORIS config goes by them. Only the module with
the class is imported, not SimpleTuner's trainer.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_type_hints

from simpletuner_layerprobe.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

PACKAGE = "simpletuner.helpers.models"
SWITCH = "SIMPLETUNER_SKIP_TORCH"


def denoiser(source: str, config: Mapping[str, Any], where: str, *, alone: bool = False) -> nn.Module:
    """The denoiser of this class ("folder.module:Class" below PACKAGE) and config, on the meta device.

    Keys that the class does not know are left out, as SimpleTuner leaves them. where: what errors call the config.
    alone: nothing else in this process will use SimpleTuner, so that what the class does not need is not imported.
    Raises ModelError if the class cannot be imported, or not be built.
    """
    import torch

    with _little() if alone else nullcontext():
        known = denoiser_class(source)
    try:
        with torch.device("meta"):
            model: nn.Module = _from_config(known, config)
    except Exception as error:
        raise ModelError(f"SimpleTuner cannot build {known.__name__} from {where}: {_said(error)}") from error
    return model


def denoiser_class(source: str) -> Any:
    """SimpleTuner's class at "folder.module:Class". Raises ModelError if it is not there."""
    module, _, name = source.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of SimpleTuner and of what it imports about themselves
            return getattr(import_module(f"{PACKAGE}.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"SimpleTuner's class {name} cannot be imported ({_said(error)}); its parts decide what a config "
            'matches, so install SimpleTuner 4.10 here: pip install "simpletuner[cpu]"'
        ) from error


@contextmanager
def _little() -> Iterator[None]:
    """In here SimpleTuner is imported as its own command line does it, without its changes to torch and diffusers.

    Its packages of families, which bring in their pipelines, run when something asks them for a name.
    """
    given = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with suppress(ImportError):
            for path in sorted(Path(import_module(PACKAGE).__path__[0]).glob("*/__init__.py")):
                name = f"{PACKAGE}.{path.parent.name}"
                sys.modules.setdefault(name, _Waiting(name, path))
        yield
    finally:
        del os.environ[SWITCH]
        os.environ.update({SWITCH: given} if given else {})


class _Waiting(ModuleType):
    """A package whose own code runs when a name that is not one of its modules is asked of it."""

    def __init__(self, name: str, path: Path):
        super().__init__(name)
        self.__spec__ = PathFinder.find_spec(name, [str(path.parent.parent)])
        self.__file__ = str(path)
        self.__path__ = [str(path.parent)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "__ran__" in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        vars(self)["__ran__"] = True
        SourceFileLoader(self.__name__, str(self.__file__)).exec_module(self)
        return getattr(self, name)


def _from_config(known: Any, config: Mapping[str, Any]) -> Any:
    """A model of diffusers' kind by its own `from_config`; any other takes one dataclass with the settings."""
    if hasattr(known, "from_config"):
        return known.from_config(dict(config))
    (settings,) = [hint for name, hint in get_type_hints(known.__init__).items() if name != "return"]
    names = inspect.signature(settings).parameters
    return known(settings(**{name: value for name, value in config.items() if name in names}))


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
