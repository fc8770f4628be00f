"""What the commands import before they prove or build something, and what they leave out for speed.

LyCORIS, PEFT and diffusers import whatever they could ever work with: other packages' quantised layers and adapters,
and through these the models of transformers. Nothing of it can be in a model without weights, but it takes seconds. A
process of the `layerprobe` command that trains nothing goes without; any other process gets them whole.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.output import quiet
from simpletuner_layerprobe.errors import ModelError

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.plans import Architecture

WITHOUT = {
    "lycoris": ("bitsandbytes", "quanto", "optimum.quanto", "peft"),
    "peft": ("bitsandbytes", "torchao", "torchvision", "sklearn"),
    "diffusers": ("transformers", "peft", "torchao", "torchvision", "bitsandbytes", "scipy"),
}
"""Packages that each imports if they are there, and that no proof and no model known by name needs."""


@contextmanager
def light(package: str, arguments: argparse.Namespace) -> Iterator[None]:
    """Around a call that imports `package`: quiet, and without what is not needed if the process is the command's."""
    with quiet(), first_import(package, WITHOUT[package]) if arguments.own_process else nullcontext():
        yield


def named_model(arguments: argparse.Namespace) -> Architecture:
    """The architecture that --model names. A few of SimpleTuner's classes need what is left out first."""
    from simpletuner_layerprobe.api.plans import architecture

    precision = getattr(arguments, "precision", None) or ""
    alone = arguments.own_process and not precision  # to quantise takes what is left out
    if alone:
        with suppress(ModelError), light("diffusers", arguments):
            return architecture(arguments.model, alone=True)
    with quiet():
        return architecture(arguments.model, precision=precision, alone=alone)


@contextmanager
def first_import(package: str, without: Sequence[str]) -> Iterator[None]:
    """The first import of `package` in here goes as if the packages in `without` were not installed.

    Nothing is left out if it has been imported before; of `without` what has been imported stays. Afterwards none of
    them is hidden, but `package` keeps to what it got. For packages that `package` tries to import, and can do
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
