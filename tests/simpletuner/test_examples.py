"""The environments in examples/: accepted by SimpleTuner and the probe, and what their READMEs say of the cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
from synthetic_run import FLUX_DEV, SD35_LARGE, write_run

from simpletuner_layerprobe.analyse.heatmap import all_blocks
from simpletuner_layerprobe.lokr.config import article_config, article_plan, environment
from simpletuner_layerprobe.lokr.factors import lokr_parameters
from simpletuner_layerprobe.models import NAMED, Architecture, _architecture, architecture
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.run.manifest import Stream

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = {
    "sd35_large": ("sd35-large-probe", SD35_LARGE),
    "sd35_medium": (
        "sd35-medium-probe",
        {"image": SD35_LARGE["image"][:24], "text": SD35_LARGE["text"][:23]},
    ),
    "flux_dev": ("flux-dev-probe", FLUX_DEV),
    "wan21_t2v_1_3b": ("wan21-probe", {"image": tuple(f"blocks.{i}" for i in range(30))}),
}
# From the transformer/config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def model(folder: str) -> Architecture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = folder.replace("_", "-")
        if name in NAMED:
            return architecture(name)
        one = _architecture("WanTransformer3DModel", WAN, "", "Wan 2.1")
    streams = tuple(Stream(name, blocks) for name, blocks in FOLDERS[folder][1].items())
    return Architecture("wan", "", one.model_class, one.modules, streams)


def test_every_example_and_its_follow_up_are_accepted(simpletuner, tmp_path: Path) -> None:
    names = []
    for folder, (name, blocks) in FOLDERS.items():
        here = tmp_path / folder
        shutil.copytree(EXAMPLES / folder, here)
        for data in ("photographs", "clips"):
            (here / "datasets" / data).mkdir(parents=True)
        options = json.loads((here / "config" / name / "config.json").read_text())
        one = all_blocks(list(blocks.values()))
        config = article_config(one, [4] * len(one), families.family(options["model_family"]).targets)
        before = Path.cwd()
        os.chdir(here)
        try:
            environment("weighted-" + folder, options, config)
        finally:
            os.chdir(before)
        names += [(folder, name), (folder, "weighted-" + folder)]
    wrong = tmp_path / "sd35_large" / "config" / "wrong"
    shutil.copytree(tmp_path / "sd35_large" / "config" / "sd35-large-probe", wrong)
    (wrong / "config.json").write_text(json.dumps(options | {"layerprobe_example": 3}))
    names.append(("sd35_large", "wrong"))
    (tmp_path / "examples.json").write_text(json.dumps(names))
    result = simpletuner.run(tmp_path, "none", setup="setups.py:parsed_examples")
    assert result.code == 0, result.log[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for folder, name in names[:-1]:
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
    assert "unrecognized arguments: --layerprobe_example" in found["wrong"]["error"], found["wrong"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_says_the_cost_that_the_shapes_give(folder: str, tmp_path: Path) -> None:
    text = (EXAMPLES / folder / "README.md").read_text()
    name, blocks = FOLDERS[folder]
    kilobytes = re.search(r"1,000 samples \| (\d+) kB", text)
    assert kilobytes
    run = write_run(tmp_path / "run", blocks, 1000, shards=1)
    assert run.size_bytes() / 1000 == pytest.approx(int(kilobytes[1]), rel=0.03)
    one = model(folder)
    assert {stream.name: tuple(stream.blocks) for stream in one.streams} == blocks
    for stream in one.streams:
        assert f"{stream.name} {len(stream.blocks)}" in text
    options = json.loads((EXAMPLES / folder / "config" / name / "config.json").read_text())
    targets = families.family(options["model_family"], one.model_class).targets
    every = all_blocks(list(blocks.values()))
    for word, factor in (("least", 12), ("most", 1)):
        plan = article_plan(every, [factor] * len(every), targets, one.modules)
        total = sum(lokr_parameters(part.shape, part.factor) for part in plan)
        assert re.search(rf"article's recipe, {word} .* \| {total:,} parameters", text), total
    assert f"| {options['layerprobe_samples']:,}: one for each sample" in text
    for command in (f"env={name}", f"output/{name}/layerprobe"):
        assert command in text
