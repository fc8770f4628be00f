"""The environments in examples/: accepted by SimpleTuner and the probe, and what their READMEs say of the cost."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import FLUX_DEV, SD35_LARGE, write_run

from simpletuner_layerprobe.api.plans import alike
from simpletuner_layerprobe.lokr.plan import Plan, make_plan
from simpletuner_layerprobe.models import Architecture, architecture
from simpletuner_layerprobe.training.environment import environment

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = {
    "sd35_large": ("sd35-large-probe", SD35_LARGE),
    "sd35_medium": ("sd35-medium-probe", {"image": SD35_LARGE["image"][:24], "text": SD35_LARGE["text"][:23]}),
    "flux_dev": ("flux-dev-probe", FLUX_DEV),
    "wan21_t2v_1_3b": ("wan21-probe", {"image": tuple(f"blocks.{i}" for i in range(30))}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Architecture]:
    """The architecture of each folder's model."""
    names = {"wan21_t2v_1_3b": "wan21-1.3b"}
    return {folder: architecture(names.get(folder, folder.replace("_", "-")), alone=True) for folder in FOLDERS}


def equal_plan(model: Architecture, factor: int) -> Plan:
    """The article's recipe where it gives every block the same factor: 1 at full contribution, 12 at none."""
    contribution = alike(model)
    return make_plan(model, replace(contribution, value_L=contribution.value_L * (12 - factor) / 11))


def test_every_example_and_its_follow_up_are_accepted(
    simpletuner, models: dict[str, Architecture], tmp_path: Path
) -> None:
    names = []
    for folder, (name, _) in FOLDERS.items():
        here = tmp_path / folder
        shutil.copytree(EXAMPLES / folder, here)
        for data in ("photographs", "clips"):
            (here / "datasets" / data).mkdir(parents=True)
        options = json.loads((here / "config" / name / "config.json").read_text())
        before = Path.cwd()
        os.chdir(here)
        try:
            environment("weighted-" + folder, options, equal_plan(models[folder], 4))
        finally:
            os.chdir(before)
        names += [(folder, name), (folder, "weighted-" + folder)]
    (tmp_path / "examples.json").write_text(json.dumps(names))
    result = simpletuner.run(tmp_path, "none", setup="setups.py:parsed_examples")
    assert result.code == 0, result.log[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for folder, name in names:
        options = json.loads((tmp_path / folder / "config" / name / "config.json").read_text())
        parsed = found[name].get("parsed")
        assert parsed is not None, found[name]
        for option, value in options.items():
            if option == "lycoris_config":  # SimpleTuner makes the path absolute
                assert Path(parsed[option]) == tmp_path / folder / value
            elif option == "output_dir":
                assert str(parsed[option]).endswith(str(value))
            else:
                assert str(parsed[option]) == str(value), (name, option)
        probes = not name.startswith("weighted-")
        assert found[name]["probe"] is probes
        pixels = 480 if folder.startswith("wan") else 1024
        sizes = [size for size in found[name]["backends"].values() if size is not None]
        assert sizes and all(size == pytest.approx(pixels**2 / 1e6) for size in sizes)
        assert not probes or any("gradient_checkpointing" in line for line in found[name]["changed"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_says_the_cost_that_the_shapes_give(
    folder: str, models: dict[str, Architecture], tmp_path: Path
) -> None:
    text = (EXAMPLES / folder / "README.md").read_text()
    name, blocks = FOLDERS[folder]
    kilobytes = re.search(r"1,000 samples \| (\d+) kB", text)
    assert kilobytes
    run = write_run(tmp_path / "run", blocks, 1000, files=1, images=100)
    size_bytes = sum(file.path.stat().st_size for file in run.files)
    assert size_bytes / 1000 == pytest.approx(int(kilobytes[1]), rel=0.03)
    model = models[folder]
    assert {stream.name: stream.blocks for stream in model.streams} == blocks
    for stream in model.streams:
        assert f"{stream.name} {len(stream.blocks)}" in text
    options = json.loads((EXAMPLES / folder / "config" / name / "config.json").read_text())
    assert model.family == options["model_family"]
    for word, factor in (("least", 12), ("most", 1)):
        total = equal_plan(model, factor).parameters
        assert re.search(rf"article's recipe, {word} .* \| {total:,} parameters", text), total
    assert f"| {options['layerprobe_samples']:,}: one for each sample" in text
    for command in (f"env={name}", f"output/{name}/layerprobe"):
        assert command in text
