"""The page about SimpleTuner's own configs is what its tool makes: the part that needs no SimpleTuner."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


def test_the_defaults_on_the_zoo_are_as_the_page_says(monkeypatch):
    page = (ROOT / "docs" / "example-configs.md").read_text(encoding="utf-8")
    if f"SimpleTuner {version('simpletuner')} and" not in page:
        pytest.skip("the page is about another version of SimpleTuner")
    spec = importlib.util.spec_from_file_location("example_configs", ROOT / "tools" / "example_configs.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "example_configs", tool)
    spec.loader.exec_module(tool)
    assert tool.defaults_section() in page, "run python tools/example_configs.py"
    assert "## SimpleTuner's examples" in page
