"""The API: what a researcher writes (docs/api.md), and all that the commands call.

    import simpletuner_layerprobe as layerprobe

    run = layerprobe.load("output/sd35/layerprobe")
    run.heatmap("image").values_TL
    layerprobe.plan(run, params=400_000_000).verify().write("lycoris_config.json")

Importing it costs nothing: a name comes from its module when it is used, numpy with the first run, torch only with
`observe`, with a model's name and with a proof. Every error is a ProbeError of one line that says what was met, what
was expected and what to do.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.adapters import adapter
    from simpletuner_layerprobe.api.changes import compare
    from simpletuner_layerprobe.api.plans import check_config, plan
    from simpletuner_layerprobe.api.records import load
    from simpletuner_layerprobe.api.run import Run
    from simpletuner_layerprobe.probe.observe import observe

__all__ = ["Run", "adapter", "check_config", "compare", "load", "observe", "plan"]
_MODULES = {
    "Run": "api.run",
    "adapter": "api.adapters",
    "check_config": "api.plans",
    "compare": "api.changes",
    "load": "api.records",
    "observe": "probe.observe",
    "plan": "api.plans",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"simpletuner_layerprobe.{_MODULES[name]}"), name)
