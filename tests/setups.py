"""Changes to SimpleTuner that a test makes inside the forked training process before it starts."""

from __future__ import annotations

import sys
from typing import Any


def another_trainer() -> None:
    """A SimpleTuner whose Trainer lacks one of the methods that the probe wraps."""
    from simpletuner.helpers.training import trainer

    from simpletuner_layerprobe.record import trainer as probe

    probe.uninstall(trainer)
    del trainer.Trainer._any_rank_reached_epoch_end
    probe.install(trainer)
    assert sys.excepthook is not sys.__excepthook__


def skipped_block() -> None:
    """A forward that leaves out block 3, as SD3's own `skip_layers` does."""
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    forward = SD3Transformer2DModel.forward

    def skipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "skip_layers": [3]})

    SD3Transformer2DModel.forward = skipping


def webui_job() -> None:
    """What the WebUI does with a job: the options as a mapping, no train.py."""
    import json
    from pathlib import Path

    from simpletuner.helpers.training.trainer import run_trainer_job

    options = json.loads(Path("config/tiny-probe/config.json").read_text())
    run_trainer_job({f"--{name}": value for name, value in options.items()})
    sys.exit(0)


def webui_fields() -> None:
    """The probe's fields as SimpleTuner's server reads them for its training tab."""
    import json
    from pathlib import Path

    from simpletuner.simpletuner_sdk.server.services.field_registry.registry import field_registry

    fields = {
        field.name: {
            "label": field.ui_label,
            "help": field.help_text,
            "section": field.section,
            "choices": [choice["value"] for choice in field.choices or []],
        }
        for field in field_registry.get_fields_for_tab("training")
        if field.name.startswith("layerprobe")
    }
    Path("fields.json").write_text(json.dumps(fields))
    sys.exit(0)


def unknown_family() -> None:
    """A probe whose table does not have Flux."""
    from simpletuner_layerprobe import families

    families.FAMILIES = tuple(entry for entry in families.FAMILIES if entry.name != "flux")


def unknown_family_with_taps() -> None:
    import taps

    unknown_family()
    taps.tap_flux()
