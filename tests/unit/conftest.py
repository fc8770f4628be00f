from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chromium
import pytest
from command_line import TINY, Result
from synthetic_run import sd3_modules, write_run

from simpletuner_layerprobe.cli import main


@pytest.fixture
def layerprobe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A function that runs a command line in this process, in so wide a terminal that no line wraps, unless it shall
    keep the one that it has."""

    def run(*arguments: object, keep_columns: bool = False) -> Result:
        if not keep_columns:
            monkeypatch.setenv("COLUMNS", "1000")
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def diffusers_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """--model builds diffusers' classes, which for SD3 have the layers of SimpleTuner's: it is not imported here."""

    def denoiser(source: str, config: Mapping[str, Any], where: str, *, alone: bool = False) -> Any:
        import diffusers
        import torch

        with torch.device("meta"):
            return getattr(diffusers, source.partition(":")[2]).from_config(dict(config))

    monkeypatch.setattr("simpletuner_layerprobe.models.denoiser", denoiser)


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """A probe run of a small SD3-shaped model, 400 samples of 40 images, with its SimpleTuner options beside it."""
    folder = tmp_path / "output" / "probe" / "layerprobe"
    write_run(folder, TINY, 400, flavour="medium", modules=sd3_modules(6), images=40, seed=1)
    options = {"model_family": "sd3", "output_dir": "output/probe", "layerprobe": True, "seed": 7}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """A tab of a browser of its own."""
    with chromium.Page(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
