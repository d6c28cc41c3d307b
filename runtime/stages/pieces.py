"""The image stages' work in pieces: an encoder's runs, between which other prompts may take their steps.

A piece is one run of the vision encoder: of one picture, or of one tile where the graph takes any number of
a picture's tiles (its first axis is `TILES`). Generators yield between two pieces, and return what was made.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

from vtp.engines import Value
from vtp.runtime.bundle.manifest import TILE_TOKENS, TILES
from vtp.runtime.result import Timings
from vtp.runtime.stages.stage import Check, Stage

_Made = TypeVar("_Made")
Pieces: TypeAlias = "Generator[None, None, _Made]"
Values: TypeAlias = "dict[str, Value]"


def whole(pieces: Pieces[_Made]) -> _Made:
    """Do all of the work at once."""
    while True:
        try:
            next(pieces)
        except StopIteration as done:
            made: _Made = done.value
            return made


@dataclass
class Pace:
    """How far one prompt's pictures are.

    timings, check  as for `run_stages`
    worked          whether an encoder has run, so that others are to have a turn before more is done
    """

    timings: Timings
    check: Check
    worked: bool = False

    def pause(self) -> Pieces[None]:
        """Give others a turn, if they have not had one since an encoder ran."""
        if self.worked:
            yield
        self.worked = False


def run_in_pieces(stage: Stage, values: Values, pace: Pace, by_tiles: bool) -> Pieces[None]:
    """Run an image stage as `Stage.run` does, and pause before a piece of an encoder.

    by_tiles  cut a picture into its tiles, if the graph allows
    """
    if stage.info.role != "encoder":
        _run(stage, values, pace)
        return
    name = tiles_of(stage) if by_tiles else None
    if name is None:
        yield from pace.pause()
        _run(stage, values, pace)
        pace.worked = True
        return
    source = stage.info.inputs[name]
    pixels, found = values[source].numpy(), list[Values]()
    for tile in range(len(pixels)):
        yield from pace.pause()
        one = {**values, source: stage.engine.put(pixels[tile : tile + 1])}
        _run(stage, one, pace)
        found.append({to: one[to] for to in stage.info.outputs.values()})
        pace.worked = True
    with pace.timings.measure(stage.info.name):
        values.update(_joined(stage, found))


def tiles_of(stage: Stage) -> str | None:
    """The graph's input whose first axis counts a picture's tiles; None: it takes pictures whole, or gives
    something of all tiles together, as calibration's probes do."""
    if any(TILE_TOKENS not in stage.graph.outputs[name].shape for name in stage.info.outputs):
        return None
    return next((name for name, info in stage.graph.inputs.items() if info.shape[0] == TILES), None)


def _run(stage: Stage, values: Values, pace: Pace) -> None:
    pace.check()
    with pace.timings.measure(stage.info.name):
        stage.run(values)


def _joined(stage: Stage, found: list[Values]) -> Values:
    """The tiles' outputs, one after the other along the axis that grows with their number."""
    if len(found) == 1:
        return found[0]
    joined = {}
    for name, to in stage.info.outputs.items():
        axis = stage.graph.outputs[name].shape.index(TILE_TOKENS)
        joined[to] = stage.engine.put(np.concatenate([one[to].numpy() for one in found], axis))
    return joined
