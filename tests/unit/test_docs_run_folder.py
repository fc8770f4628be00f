"""docs/run-folder.md: its code runs as it stands, and says the same as the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import SD35_LARGE, write_run

from simpletuner_layerprobe.run.rows import FACTS

PAGE = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text()


def test_the_examples_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "output" / "sd35-probe" / "layerprobe"
    facts = {"dropped": np.arange(3000) % 2}
    run = write_run(folder, SD35_LARGE, 3000, images=100, facts=facts)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    values: dict[str, object] = {}
    exec(code, values)
    assert "3000 100" in (printed := capsys.readouterr().out)
    assert len(re.findall(r"^image\.last\.transformer_blocks\.\d+ +", printed, re.M)) == 5
    np.testing.assert_array_equal(values["image"], run.distances("image"))
    assert len(values["frames"]) == 3000  # type: ignore[arg-type]
    assert "block_31" in printed
    # pyarrow alone reads what a killed process left
    torn = folder / run.files[0].path.name.replace("rank-0000", "rank-0007")
    shutil.copy(run.files[0].path, torn)
    torn.write_bytes(torn.read_bytes()[:-200])
    whole_batches = values["whole_batches"]
    assert sum(len(batch) for batch in whole_batches(torn)) == 0  # type: ignore[operator]
    assert sum(len(batch) for batch in whole_batches(run.files[0].path)) == 1000  # type: ignore[operator]


def test_every_column_is_in_the_table() -> None:
    named = re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\| `.*", PAGE, re.M)))
    assert [name for name in named if name in FACTS] == list(FACTS)
