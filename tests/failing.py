"""How the tests say that an error for the user is the expected one."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from simpletuner_layerprobe.errors import ProbeError


def fails(text: str) -> Any:
    """A context whose block raises a ProbeError of one line that holds `text`."""
    return pytest.raises(ProbeError, match=re.escape(text), check=lambda error: "\n" not in str(error))


@contextmanager
def no_file_can_be_opened() -> Iterator[None]:
    """The system refuses to open anything inside: a real OSError, also where tests run as root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
