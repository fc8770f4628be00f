"""Probe-only epochs for SimpleTuner: which transformer blocks change the hidden states, and by how much.

    import simpletuner_layerprobe as layerprobe

    run = layerprobe.load("output/sd35/layerprobe")

docs/api.md shows all of it. Importing this package imports nothing heavy: no torch, no numpy, no SimpleTuner; the names
of the API come when they are used.
"""

__version__ = "0.2.0"

TYPE_CHECKING = False  # typing has it too, but takes longer to import than every Python process should wait for us

if TYPE_CHECKING:
    from simpletuner_layerprobe.api import Run, adapter, check_config, compare, load, observe, plan
    from simpletuner_layerprobe.errors import ConfigError, ModelError, ProbeError, RunError, SeamError

__all__ = [
    "ConfigError",
    "ModelError",
    "ProbeError",
    "Run",
    "RunError",
    "SeamError",
    "adapter",
    "check_config",
    "compare",
    "load",
    "observe",
    "plan",
]


def __getattr__(name: str) -> object:
    """The names of the API, each from the module that has it."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'errors' if name.endswith('Error') else 'api'}"), name)
