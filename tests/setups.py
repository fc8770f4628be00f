"""Changes to SimpleTuner that a test makes inside the forked training process before it starts."""

from __future__ import annotations

import sys
from typing import Any


def another_trainer() -> None:
    """A SimpleTuner whose Trainer lacks one of the methods that the probe wraps."""
    from simpletuner.helpers.training import trainer

    from simpletuner_layerprobe import plugin
    from simpletuner_layerprobe.training import trainer as probe

    probe.uninstall(trainer)
    del trainer.Trainer._any_rank_reached_epoch_end
    plugin.install(trainer)
    assert sys.excepthook is not sys.__excepthook__


def skipped_block() -> None:
    """A forward that leaves out block 3, as SD3's own `skip_layers` does."""
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    forward = SD3Transformer2DModel.forward

    def skipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "skip_layers": [3]})

    SD3Transformer2DModel.forward = skipping


def compared_with_plain() -> None:
    """Before each step with blocks left out, the same step without: all that both have must be equal, bit for bit."""
    import torch

    from simpletuner_layerprobe.training.ablation import StepAblation

    run = StepAblation.run

    def compared(self: Any, model: Any, batch: Any, predict: Any, seen: Any) -> Any:
        draws, copy = torch.get_rng_state(), dict(batch)
        plain = predict(copy)["model_prediction"]
        expected, drawn = self._observer.distances(), torch.get_rng_state()
        torch.set_rng_state(draws)
        output, loss_B, values = run(self, model, batch, predict, seen)
        assert torch.equal(output["model_prediction"], plain) and torch.equal(torch.get_rng_state(), drawn)
        assert batch.keys() == copy.keys()
        assert all(torch.equal(value, values[key]) for key, value in expected.items())
        print("equal to the plain step", flush=True)
        return output, loss_B, values

    StepAblation.run = compared


def slow_forwards() -> None:
    """Forwards that take a while, so that a step with blocks left out is rarely over when the process is killed."""
    import time

    from simpletuner.helpers.models.sd3.model import SD3

    predict = SD3.model_predict

    def slow(self: Any, prepared_batch: Any) -> Any:
        time.sleep(0.03)
        return predict(self, prepared_batch)

    SD3.model_predict = slow


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
    from simpletuner_layerprobe.probe import families

    families.FAMILIES = tuple(entry for entry in families.FAMILIES if entry.name != "flux")


def unknown_family_with_taps() -> None:
    import taps

    unknown_family()
    taps.tap_flux()


def mixflow_after_all() -> None:
    """A SimpleTuner that mixes at noisier sigmas than the batch's, whatever its option says."""
    from simpletuner.helpers.models.common import ModelFoundation

    ModelFoundation._mixflow_enabled = lambda self: True


def another_noise_in_the_fifth_step() -> None:
    """The fifth batch has latents that are mixed with noise at half of its sigmas."""
    from simpletuner.helpers.models.sd3.model import SD3

    prepare = SD3.prepare_batch
    batches = 0

    def prepare_batch(self: Any, batch: dict, state: dict) -> dict:
        nonlocal batches
        batches += 1
        prepared = prepare(self, batch, state)
        if batches == 5:
            sigmas = prepared["sigmas"] / 2
            prepared["noisy_latents"] = (1 - sigmas) * prepared["latents"] + sigmas * prepared["noise"]
        return prepared

    SD3.prepare_batch = prepare_batch


def sigmas_of_another_convention() -> None:
    """A SimpleTuner whose batches count sigma from 0 to 1000."""
    from simpletuner.helpers.models.sd3.model import SD3

    prepare = SD3.prepare_batch

    def prepare_batch(self: Any, batch: dict, state: dict) -> dict:
        prepared = prepare(self, batch, state)
        prepared["sigmas"] = prepared["sigmas"] * 1000
        return prepared

    SD3.prepare_batch = prepare_batch
    from simpletuner_layerprobe.training import noise_check

    noise_check.UNCHECKED["sd3"] = "left out, so that the range of sigma is what is looked at"


def adapters_in_use() -> None:
    """What PEFT's adapters add in the first forward of Flux: module -> adapter -> scale, in adapters.json."""
    import json
    from pathlib import Path

    from peft.tuners.tuners_utils import BaseTunerLayer
    from simpletuner.helpers.models.flux.transformer import FluxTransformer2DModel

    forward = FluxTransformer2DModel.forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path("adapters.json")
        if not path.exists():
            layers = [(name, module) for name, module in self.named_modules() if isinstance(module, BaseTunerLayer)]
            scales = {
                name: {
                    adapter: module.scaling[adapter]
                    for adapter in module.active_adapters
                    if module.scaling.get(adapter)
                }
                for name, module in layers
                if not module.disable_adapters
            }
            path.write_text(json.dumps(scales))
        return forward(self, *args, **kwargs)

    FluxTransformer2DModel.forward = noting


def a_step_without_end() -> None:
    """The third training step lasts until there is a file `go`."""
    import time
    from pathlib import Path

    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    forward = SD3Transformer2DModel.forward
    steps = 0

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            print("\nthird step begins", flush=True)
            while not Path("go").exists():
                time.sleep(0.05)
        return forward(self, *args, **kwargs)

    SD3Transformer2DModel.forward = slow


def sometimes_no_number() -> None:
    """Block 2's feed-forward gives NaN in every third step, infinity in the one after it."""
    import torch
    from diffusers.models.attention import FeedForward
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    inner, outer = FeedForward.forward, SD3Transformer2DModel.forward
    steps, calls = -1, 0

    def feed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = inner(self, *args, **kwargs)
        if calls == 5 and steps % 3:  # two in each of the blocks 0 and 1
            result = torch.full_like(result, float("nan") if steps % 3 == 1 else float("inf"))
        return result

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps, calls
        steps, calls = steps + 1, 0
        return outer(self, *args, **kwargs)

    FeedForward.forward, SD3Transformer2DModel.forward = feed_forward, forward


def jumping_clock() -> None:
    """The time of day is a day later or earlier at every look; what only counts up is left alone."""
    import time

    now, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return now() + (86400 if looks % 2 else -86400)

    time.time = jumping


def eager_trackers() -> None:
    """Trackers that see every flush instead of one a minute, and factors that are judged as often."""
    from simpletuner_layerprobe import plugin
    from simpletuner_layerprobe.training import live

    plugin.LIVE_SECONDS = 0.0
    live.COST = float("inf")


def failing_tracker() -> None:
    """A TensorBoard whose disk is full from the second value on."""
    from accelerate.tracking import TensorBoardTracker

    eager_trackers()
    log = TensorBoardTracker.log
    probe_values: list[dict] = []

    def full(self: Any, values: dict, step: int | None = None, **kwargs: Any) -> None:
        if "layerprobe/samples" in values:
            probe_values.append(values)
            if len(probe_values) > 1:
                raise OSError(28, "No space left on device")
        log(self, values, step=step, **kwargs)

    TensorBoardTracker.log = full


def parsed_examples() -> None:
    """What SimpleTuner and the probe make of the environments in examples.json: a list of folder and name."""
    import json
    import os
    from pathlib import Path
    from types import SimpleNamespace

    from accelerate.utils import TorchDynamoPlugin
    from simpletuner.helpers.configuration.loader import load_config
    from simpletuner.helpers.data_backend.config import create_backend_config
    from simpletuner.helpers.data_backend.factory import FactoryRegistry, init_backend_config

    from simpletuner_layerprobe import plugin
    from simpletuner_layerprobe.training import trainer as probe
    from simpletuner_layerprobe.training.options import ProbeSettings

    accelerator = SimpleNamespace(is_main_process=True, is_local_main_process=True, num_processes=1, process_index=0)
    start = Path.cwd()
    found = {}
    for folder, name in json.loads(Path("examples.json").read_text()):
        os.chdir(start / folder)
        os.environ["ENV"] = name
        try:
            config = load_config(None, exit_on_error=True)
        except BaseException as error:
            found[name] = {"error": str(error)}
            continue
        options = json.loads(Path("config", name, "config.json").read_text())
        parsed = {option: getattr(config, option) for option in options}
        factory = FactoryRegistry(config, accelerator, None, None, None)
        backends = {}
        for backend in factory.load_configuration():
            factory._handle_resolution_conversion(backend)
            create_backend_config(backend, vars(config)).validate(vars(config))
            backends[backend["id"]] = init_backend_config(backend, config, accelerator)["config"].get("resolution")
        settings = ProbeSettings.from_config(config)
        compiler = SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend="no"))
        trainer = SimpleNamespace(
            config=config,
            accelerator=SimpleNamespace(state=compiler),
            layerprobe_watchers_of=plugin.watchers,
            layerprobe_own_parameters=plugin.own_parameters,
        )
        changed = probe.start_session(trainer, settings).changed if settings else []
        found[name] = {"parsed": parsed, "backends": backends, "changed": changed, "probe": settings is not None}
    os.chdir(start)
    Path("found.json").write_text(json.dumps(found, default=str))
    sys.exit(0)


def optimizer_states() -> None:
    """What SimpleTuner's optimizers keep for a matrix, in bytes for each number: [in bf16, in float32], or null."""
    import json
    from pathlib import Path

    import torch
    from simpletuner.helpers.training import optimizer_param

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):  # quantised
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    def tensors(kept: Any) -> Any:
        values = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ()
        yield from (inner for value in values for inner in tensors(value))
        if isinstance(kept, torch.Tensor):
            yield kept

    def measured(choice: Any, dtype: torch.dtype) -> float | None:
        parameter = torch.nn.Parameter(torch.randn(256, 512, dtype=dtype))
        try:
            optimizer = choice["class"]([parameter], **{**choice["default_settings"], "lr": 1e-4})
            for _ in range(2):
                parameter.grad = torch.randn_like(parameter) / 100
                optimizer.step()
        except Exception:
            return None
        return sum(map(size, tensors(dict(optimizer.state)))) / parameter.numel()

    torch.compiler.set_stance("force_eager")  # what is kept does not depend on how a step is computed
    choices = optimizer_param.optimizer_choices
    kept = {
        name: [measured(each, dtype) for dtype in (torch.bfloat16, torch.float32)] for name, each in choices.items()
    }
    Path("states.json").write_text(json.dumps({name: both for name, both in kept.items() if any(both)}))
    sys.exit(0)


def eager_wandb() -> None:
    """The same, with wandb's folder for pictures made anew: an earlier forked run took it along when it ended."""
    from pathlib import Path

    from wandb.sdk.data_types._private import MEDIA_TMP

    eager_trackers()
    Path(MEDIA_TMP.name).mkdir(exist_ok=True)
