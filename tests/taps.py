"""The reference for real runs: hidden states taken by hooks on norm layers, distances in float64 numpy.

It shares nothing with the observer: other hooks, on other modules, whole states kept, the article's formula.
The functions run inside the training process (see simpletuner_server.py) and leave `reference.npz` behind, and
`further.npz` with the readings of layerprobe_residual and layerprobe_block_pairs (LONGEST); of several ranks each its
own, `reference0.npz` and so on.
"""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

# One entry a forward: the states of each stream, (B, S, D) float64, before block 0, 1, ... and after the last.
FORWARDS: list[dict[str, list[np.ndarray]]] = []
MASKS: list[np.ndarray | None] = []
LONGEST = 3


def article_distances(states: list[np.ndarray], mask_BS: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(last, mean) angular distances of consecutive states, each (B, L): arccos(cos)/pi in float64, no clamp."""
    return _readings([_angle(before, after) for before, after in itertools.pairwise(states)], mask_BS)


def further_readings(
    states: list[np.ndarray], mask_BS: np.ndarray | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reading -> (last, mean) of consecutive states' updates, and of the angles over 2 .. LONGEST blocks."""
    pairs = list(itertools.pairwise(states))
    norms = [np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1) for before, after in pairs]
    found = {
        "update_norm": _readings(norms, mask_BS),
        "update_cosine": _readings([_cosine(after - before, before) for before, after in pairs], mask_BS),
    }
    for span in range(2, LONGEST + 1):
        angles = [_angle(before, after) for before, after in zip(states, states[span:], strict=False)]
        found[f"pair{span}"] = _readings(angles, mask_BS)
    return found


def _cosine(u_BSD: np.ndarray, v_BSD: np.ndarray) -> np.ndarray:
    return (u_BSD * v_BSD).sum(-1) / (np.linalg.norm(u_BSD, axis=-1) * np.linalg.norm(v_BSD, axis=-1))


def _angle(before_BSD: np.ndarray, after_BSD: np.ndarray) -> np.ndarray:
    return np.arccos(np.clip(_cosine(before_BSD, after_BSD), -1, 1)) / np.pi


def _readings(values: list[np.ndarray], mask_BS: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(last, mean) of each (B, S) array, each (B, L)."""
    last = [value_BS[:, -1] for value_BS in values]
    if mask_BS is None:
        mean = [value_BS.mean(-1) for value_BS in values]
    else:
        mean = [np.array([row[valid].mean() for row, valid in zip(one, mask_BS, strict=True)]) for one in values]
    return np.stack(last, 1), np.stack(mean, 1)


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().clone().double().cpu().numpy()


def _on_input(module: Any, take: Callable[[np.ndarray], None]) -> None:
    module.register_forward_pre_hook(lambda _, args: take(_numpy(args[0])))


def _keep(stream: str) -> Callable[[np.ndarray], None]:
    return lambda state: FORWARDS[-1].setdefault(stream, []).append(state)


def _after_init(model_class: Any, tap: Callable[[Any], None]) -> None:
    original = model_class.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.register_forward_pre_hook(lambda *_: FORWARDS.append({}))
        tap(self)

    __init__.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    __init__.__wrapped__ = original  # type: ignore[attr-defined]
    model_class.__init__ = __init__
    atexit.register(_write)


def _write() -> None:
    out: dict[str, list[np.ndarray]] = {}
    further: dict[str, list[np.ndarray]] = {}
    for number, forward in enumerate(FORWARDS):
        for stream, states in forward.items():
            mask = MASKS[number] if stream == "text" and MASKS else None
            last, mean = article_distances(states, mask)
            out.setdefault(f"{stream}.last", []).append(last)
            out.setdefault(f"{stream}.mean", []).append(mean)
            for reading, (last, mean) in further_readings(states, mask).items():
                further.setdefault(f"{stream}.{reading}_last", []).append(last)
                further.setdefault(f"{stream}.{reading}_mean", []).append(mean)
    rank = os.environ["RANK"] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    for file, found in (("reference", out), ("further", further)):
        np.savez(f"{file}{rank}.npz", **{name: np.concatenate(values) for name, values in found.items()})


def tap_sd3() -> None:
    from simpletuner.helpers.models.sd3.transformer import SD3Transformer2DModel

    def tap(model: Any) -> None:
        for block in model.transformer_blocks:
            _on_input(block.norm1.norm, _keep("image"))
            _on_input(block.norm1_context.norm, _keep("text"))
        _on_input(model.norm_out.norm, _keep("image"))

    _after_init(SD3Transformer2DModel, tap)


def tap_wan() -> None:
    from simpletuner.helpers.models.wan.transformer import WanTransformer3DModel

    def tap(model: Any) -> None:
        for block in model.blocks:
            _on_input(block.norm1, _keep("image"))
        _on_input(model.norm_out, _keep("image"))

    _after_init(WanTransformer3DModel, tap)


def tap_flux() -> None:
    from simpletuner.helpers.models.flux.model import Flux
    from simpletuner.helpers.models.flux.transformer import FluxTransformer2DModel

    text_tokens = [0]

    def keep_joint(state: np.ndarray) -> None:
        _keep("text")(state[:, : text_tokens[0]])
        _keep("image")(state[:, text_tokens[0] :])

    def keep_text(state: np.ndarray) -> None:
        text_tokens[0] = state.shape[1]
        _keep("text")(state)

    def tap(model: Any) -> None:
        for block in model.transformer_blocks:
            _on_input(block.norm1.norm, _keep("image"))
            _on_input(block.norm1_context.norm, keep_text)
        for block in model.single_transformer_blocks:
            _on_input(block.norm.norm, keep_joint)
        # The text part of the last output is dropped right after the block: only the block itself shows it.
        model.single_transformer_blocks[-1].register_forward_hook(lambda _, __, output: keep_joint(_numpy(output)))

    _after_init(FluxTransformer2DModel, tap)
    predict = Flux.model_predict

    def model_predict(self: Any, prepared_batch: dict) -> Any:
        mask = prepared_batch.get("encoder_attention_mask")
        MASKS.append(None if mask is None else mask.float().cpu().numpy().reshape(mask.shape[0], -1) > 0.5)
        return predict(self, prepared_batch)

    Flux.model_predict = model_predict
