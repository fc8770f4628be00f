"""How far the angle tells which blocks the loss needs, beside what tells it at no cost.

Shape letters: T bins, L blocks, R replicates, the first of which is the run itself. All draw the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.ranks import Interval, Profile, difference, interval, profile, ranks, reliability

DEPTH, UPDATE_NORM = "depth", "update norm"
_NAMES = {DEPTH: "depth alone", UPDATE_NORM: "the relative update norm"}


@dataclass(frozen=True)
class Order:
    """How far something tells the order of the loss increases: Spearman's rank correlation over the blocks (each the
    mean over its bins), and over the cells (bin and block)."""

    blocks: Interval
    cells: Interval


@dataclass(frozen=True)
class Told:
    """How far one stream's angle tells the loss increases, and whether what costs nothing tells them as well.

    blocks: paths of the L compared, those of the stream. bins: of sigma. angle: the stream's angular distance.
    baselines: DEPTH (distance from the middle of all blocks: the ends count most), and UPDATE_NORM of the same stream
    where it was recorded. better: by how much the angle tells more than each of these, with the interval of the
    difference. profile: whether a block's angle goes over sigma as its loss increase does. reliable: what the loss
    increases of as many other images would tell, over blocks and over cells.
    """

    blocks: tuple[str, ...]
    bins: int
    angle: Order
    baselines: Mapping[str, Order]
    better: Mapping[str, Order]
    profile: Profile
    reliable: tuple[float, float]


def told(
    blocks: tuple[str, ...],
    depth_L: NDArray[np.float64],
    loss_RTL: NDArray[np.float64],
    angle_RTL: NDArray[np.float64],
    norm_RTL: NDArray[np.float64] | None = None,
) -> Told:
    """How far the angles tell the loss increases of these L blocks. depth_L: their distance from the middle."""
    others = {DEPTH: np.broadcast_to(depth_L, (1, *loss_RTL.shape[1:]))}
    if norm_RTL is not None:
        others[UPDATE_NORM] = norm_RTL
    of_loss = _ranked(loss_RTL)
    angle_2R = _orders(_ranked(angle_RTL), of_loss)
    other_2R = {name: _orders(_ranked(value_RTL), of_loss) for name, value_RTL in others.items()}
    return Told(
        blocks=blocks,
        bins=loss_RTL.shape[1],
        angle=Order(*map(interval, angle_2R)),
        baselines={name: Order(*map(interval, part_2R)) for name, part_2R in other_2R.items()},
        better={
            name: Order(*(difference(better_R) for better_R in angle_2R - part_2R))
            for name, part_2R in other_2R.items()
        },
        profile=profile(angle_RTL, loss_RTL),
        reliable=(reliability(loss_RTL.mean(axis=1)), reliability(_cells(loss_RTL))),
    )


def _ranked(value_RTL: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ranks of the blocks, and of the cells."""
    return ranks(value_RTL.mean(axis=1)), ranks(_cells(value_RTL))


def _orders(a: tuple[NDArray[np.float64], ...], b: tuple[NDArray[np.float64], ...]) -> NDArray[np.float64]:
    """(2, R) the rank correlation over blocks, and over cells."""
    return np.stack([np.clip((a_RD * b_RD).sum(axis=1), -1, 1) for a_RD, b_RD in zip(a, b, strict=True)])


def _cells(value_RTL: NDArray[np.float64]) -> NDArray[np.float64]:
    return value_RTL.reshape(len(value_RTL), -1)


def order_text(part: Told, stream: str) -> str:
    """How far the angle tells the order, and how far depth alone does: the half of it that the story has."""
    said = f"the {stream} angle tells this order to {part.angle.blocks}; depth alone to {part.baselines[DEPTH].blocks}"
    if UPDATE_NORM in part.baselines:
        said += f", the relative update norm to {part.baselines[UPDATE_NORM].blocks}"
    return said


def told_notes(part: Told) -> tuple[str, ...]:
    """What else is to be said of it: over cells, against the baselines, over sigma within a block, and chance."""
    L = len(part.blocks)
    notes = [f"over {L} blocks; over {L * part.bins} cells of block and sigma the angle tells it to {part.angle.cells}"]
    for name, order in part.better.items():
        notes.append(f"better than {_NAMES[name]} by {order.blocks} over blocks, by {order.cells} over cells")
    if UPDATE_NORM not in part.baselines:
        notes.append("the relative update norm was not recorded (layerprobe_residual)")
    shuffled = "" if np.isnan(part.profile.p) else f"; shuffled blocks reach {part.profile.limit:.2f} in 2.5% of cases"
    notes.append(f"over sigma, within a block, the angle goes with the loss increase to {part.profile.mean}{shuffled}")
    blocks, cells = part.reliable
    notes.append(f"the loss increases of as many other images would tell it to {blocks:.2f}, over cells to {cells:.2f}")
    return tuple(notes)
