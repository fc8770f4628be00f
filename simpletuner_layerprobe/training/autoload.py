"""Hooks the probe into SimpleTuner's processes, started by the `.pth` file at interpreter start.

It imports nothing and touches nothing until one of SimpleTuner's own modules is imported; then the matching
function of this package runs right after that module's code. Processes that never import SimpleTuner see no
effect. `SIMPLETUNER_LAYERPROBE=0` in the environment switches it off.
"""

import sys

# Every interpreter of the environment runs this module at its start: `typing` would cost more than all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# SimpleTuner's module -> (module of this package, function called with the imported module).
HOOKS = {
    "simpletuner.simpletuner_sdk.server.services.field_registry.registry": ("training.options", "register_options"),
    "simpletuner.helpers.configuration.loader": ("training.given", "install"),
    "simpletuner.helpers.training.trainer": ("plugin", "install"),
    "simpletuner.cli.train": ("training.signals", "install_cli"),
    "accelerate.commands.launch": ("training.signals", "install_accelerate"),
}


class PostImportFinder:
    """A `sys.meta_path` entry that runs a function of this package after a module of SimpleTuner was executed."""

    @staticmethod
    def find_spec(name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        hook = HOOKS.get(name)
        if hook is None:
            return None
        for finder in sys.meta_path:
            if finder is PostImportFinder:
                continue
            spec: Any = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: "Any") -> None:
            execute(module)
            _run(hook, module)

        spec.loader.exec_module = exec_module
        return spec


def _run(hook: tuple[str, str], module: "Any") -> None:
    import importlib

    part, function = hook
    getattr(importlib.import_module(f"simpletuner_layerprobe.{part}"), function)(module)


def is_installed() -> bool:
    """Whether this process hooks SimpleTuner's modules."""
    return PostImportFinder in sys.meta_path


def install() -> None:
    """Put the finder in front; for modules imported already, run their hooks now. Safe to call twice."""
    if is_installed():
        return
    sys.meta_path.insert(0, PostImportFinder)
    for name, hook in HOOKS.items():
        module = sys.modules.get(name)
        if module is not None:
            _run(hook, module)


install()
