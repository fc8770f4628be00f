from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from real import EXAMPLES, TESTS, SimpleTuner

# Examples may take long on a busy machine; that says nothing about the code.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

for folder in (TESTS, *(TESTS / name for name in ("unit", "torch", "simpletuner", "statistics", "robustness"))):
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def simpletuner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleTuner]:
    """The real SimpleTuner, imported once for all tests that ask for it."""
    server = SimpleTuner(tmp_path_factory.mktemp("server") / "stderr.txt")
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_sd3(simpletuner: SimpleTuner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD3 pipeline with its photographs and the environment `tiny-probe`."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    simpletuner.pipeline(folder, EXAMPLES / "tiny_sd3.py", "--out", folder, "--images", 6)
    # Its captions are encoded once for all runs.
    copy = Path(shutil.copytree(folder, folder.with_name("encoded")))
    result = simpletuner.run(copy, "tiny-probe", argv=["--layerprobe_samples=1"])
    assert result.code == 0, result.log[-4000:]
    shutil.copytree(copy / "cache" / "text", folder / "cache" / "text")
    return folder


@pytest.fixture(scope="session")
def tiny_flux(simpletuner: SimpleTuner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Flux pipeline."""
    folder = tmp_path_factory.mktemp("flux") / "tiny"
    return simpletuner.pipeline(folder, TESTS / "tiny_flux.py", folder)


@pytest.fixture
def tiny(tiny_sd3: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the tiny pipeline and changes its probe config: `tiny(max_train_steps=4)`.

    Without options the run is one epoch long.
    """

    def copy(source: Path = tiny_sd3, **options: object) -> Path:
        folder = tmp_path / "tiny"
        shutil.copytree(source, folder)
        path = folder / "config" / "tiny-probe" / "config.json"
        config = json.loads(path.read_text())
        config |= {
            "layerprobe_samples": 0,
            "max_train_steps": 0,
            "num_train_epochs": 0 if options.get("max_train_steps") else 1,
        }
        config |= options
        path.write_text(json.dumps(config))
        return folder

    return copy
