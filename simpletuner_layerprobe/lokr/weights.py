"""The weights of a denoiser in a diffusers folder, read one by one: the whole model is never in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ConfigError, ModelError
from simpletuner_layerprobe.files import read_object

SUBFOLDERS = ("transformer", "unet")
STANDARD_NAME = "diffusion_pytorch_model.safetensors"
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def open_tensors(path: Path, what: str) -> Any:
    """A safetensors file whose tensors are read when they are asked for. Raises ConfigError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a safetensors file ({said}); expected {what}") from None
    except OSError as error:
        said = error.strerror or " ".join(str(error).split())
        raise ConfigError(f"cannot read {path}: {said}; expected {what}") from None


def read_tensor(file: Any, key: str) -> NDArray[np.float64]:
    """One tensor of an open file in float64. Raises ConfigError for one that is quantised."""
    kind = stored(file, key).get_dtype()
    if kind not in _PLAIN_TYPES:
        raise ConfigError(f"{key} is of the type {kind}; expected one of {', '.join(_PLAIN_TYPES)}, not quantised")
    tensor: NDArray[np.float64] = file.get_tensor(key).double().numpy()
    return tensor


def stored(file: Any, key: str) -> Any:
    """Shape and type of a tensor that is not read yet. Raises ConfigError if the file that an index names lacks it."""
    from safetensors import SafetensorError

    try:
        return file.get_slice(key)
    except SafetensorError as error:
        raise ConfigError(f"{key} is missing: {' '.join(str(error).split())}; the model is incomplete") from None


def weights_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder with the denoiser's safetensors: the transformer or unet in `path`, itself, or that of a config.json.

    None if there are none. A pipeline's folder may hold the model once more in a file of another format.
    """
    given = Path(path)
    given = given.parent if given.is_file() and given.suffix == ".json" else given
    folders = [*(given / name for name in SUBFOLDERS), given]
    return next((folder for folder in folders if _files(folder)), None)


def _files(folder: Path) -> list[Path]:
    """An index, or the only file: what the weights of a folder are read from; the standard name comes first."""
    for ending in (".safetensors.index.json", ".safetensors"):
        files = sorted(folder.glob(f"*{ending}"), key=lambda path: (not path.name.startswith(STANDARD_NAME), path.name))
        if files:
            return files
    return []


@dataclass(frozen=True)
class Weights:
    """The weights in `folder`, by the names of their modules. Raises ConfigError for files that cannot be read."""

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def file_of(self) -> Mapping[str, str]:
        """Module -> the name of the file that has its weight, in the order of the files."""
        files = _files(self.folder)
        if not files:
            raise ModelError(f"{self.folder} has no safetensors; expected a diffusers transformer")
        first = files[0]
        if first.suffix == ".json":
            value = read_object(first, "an index of safetensors").get("weight_map")
            if not isinstance(value, dict) or not all(type(name) is str for name in value.values()):
                raise ConfigError(f"{first} has no weight_map; expected an index of safetensors")
            odd = next((name for name in value.values() if Path(name).name != name), None)
            if odd is not None:
                raise ConfigError(f"{first} names the file {odd!r:.80}; expected files beside it")
            file_of = value
        elif len(files) > 1 and first.name != STANDARD_NAME:
            raise ConfigError(f"{self.folder} has {len(files)} safetensors and no index; expected {STANDARD_NAME}")
        else:
            file_of = dict.fromkeys(self._file(first.name).keys(), first.name)
        return {key.removesuffix(".weight"): name for key, name in file_of.items() if key.endswith(".weight")}

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's weight, (out, in, *kernel)."""
        return tuple(stored(self._file(self.file_of[module]), f"{module}.weight").get_shape())

    def norm(self, module: str) -> float:
        """The Frobenius norm of a module's weight."""
        return float(np.linalg.norm(read_tensor(self._file(self.file_of[module]), f"{module}.weight")))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = open_tensors(self.folder / name, "weights of a model")
        return self._open[name]
