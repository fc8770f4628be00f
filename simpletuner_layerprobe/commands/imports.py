"""What the commands import before they prove or build something, and what they leave out for speed.

LyCORIS and diffusers import whatever they could ever work with: other packages' quantised layers and adapters, and
through these the models of transformers. Nothing of it can be in a model without weights, but it takes seconds. A
process of the `layerprobe` command that trains nothing goes without; any other process gets them whole.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext


def lycoris_for_proofs(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Around a call that imports LyCORIS: without what no skeleton holds, if this process is the command's own."""
    from simpletuner_layerprobe.lokr.proof import NOT_IN_A_SKELETON

    return first_import("lycoris", NOT_IN_A_SKELETON) if arguments.own_process else nullcontext()


def peft_for_proofs(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """The same for PEFT."""
    from simpletuner_layerprobe.lokr.lora import NOT_IN_A_SKELETON

    return first_import("peft", NOT_IN_A_SKELETON) if arguments.own_process else nullcontext()


def diffusers_for_tables(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Around a call that imports diffusers for the module table of `--model`: light for the models known by name.

    A class that a config.json names may need any of it.
    """
    from simpletuner_layerprobe.models import NAMED, NOT_IN_THE_NAMED

    light = arguments.own_process and arguments.model in NAMED
    return first_import("diffusers", NOT_IN_THE_NAMED) if light else nullcontext()


@contextmanager
def first_import(package: str, without: Sequence[str]) -> Iterator[None]:
    """The first import of `package` in here goes as if the packages in `without` were not installed.

    Nothing is left out if it has been imported before; of `without` what has been imported stays. Afterwards none of
    them is hidden, but `package` keeps to what it found. For packages that `package` tries to import, and can do
    without.
    """
    if package in sys.modules:
        yield
        return
    hidden = [name for name in without if name not in sys.modules]
    collects = gc.isenabled()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: "not there", to the import system
    gc.disable()  # thousands of modules, none of them garbage
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name in hidden:
            if sys.modules.get(name, package) is None:
                del sys.modules[name]
