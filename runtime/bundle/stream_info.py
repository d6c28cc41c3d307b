"""What a bundle says of a vision tower that reuses a reference picture for the next ones of a camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REUSES = "stc"  # the reduction whose tower has such a stage
STREAM = "stream"  # the moment of the stage that stands for the encoder on a later picture
RECOMPUTED = "recomputed."  # the outputs that say which rows a block recomputed, before its number
PICTURE = "reference_picture"  # what a method reads that compares a picture with the one before
COSINE = "reference_cosine"  # what it gives beside the encoder's outputs, float32 [B]


@dataclass(frozen=True)
class StreamInfo:
    """A later picture's stage recomputes `rows` of the tower's `of` rows in each block.

    least_cosine  a picture whose COSINE is below it is computed whole, and is the next reference
    pictures      after how many pictures, the reference among them, the next one is computed whole
    """

    rows: int
    of: int
    least_cosine: float
    pictures: int


def stream_problem(info: StreamInfo | None, stages: Sequence[Any]) -> str:
    """What does not fit between `info` and a manifest's stages (each a StageInfo); "" if all does."""
    later = [stage for stage in stages if stage.when == STREAM]
    if info is None or not later:
        return "" if info is None and not later else "manifest.stream and the stages differ"
    if not (0 < info.rows <= info.of and -1 <= info.least_cosine <= 1 and info.pictures >= 1):
        return "manifest.stream is out of range"
    whole = [stage for stage in stages if stage.when == "image" and stage.role == "encoder"]
    if len(later) > 1 or len(whole) != 1 or later[0].role != "encoder" or later[0].keep is not None:
        return "the stages do not hold one encoder, and one for later pictures"
    state, given = state_of(later[0]), set(later[0].outputs.values())
    lacking = state - set(whole[0].outputs.values())
    if lacking:
        return f"stage {later[0].name} reads {sorted(lacking)}, which {whole[0].name} does not give"
    lacking = {COSINE, *whole[0].outputs.values()} - state - given
    return f"stage {later[0].name} does not give {sorted(lacking)}" if lacking else ""


def tower_problem(tower: Any, stream: StreamInfo | None, stages: Sequence[Any], graphs: Any) -> str:
    """What does not fit between a manifest's tower (a TowerInfo, or None), its stream and the graphs of its
    stages; "" if all does."""
    if tower is not None and not (0 < tower.rows <= tower.of):
        return "manifest.tower.rows is out of range"
    if tower is not None and not (tower.name and tower.name.isprintable()):
        return "manifest.tower.name is not a name"
    reuses = tower is not None and tower.name == REUSES
    if stream is None or tower is None or not reuses:
        return "" if reuses == (stream is not None) else "manifest.tower and manifest.stream differ"
    later = next(stage for stage in stages if stage.when == STREAM)
    graph = graphs.get(later.file)  # whether there is one, and takes what the stage says, is asked elsewhere
    state = {name for name, source in later.inputs.items() if source in state_of(later)}
    counted = {
        **dict.fromkeys(state, stream.of),
        **{name: stream.rows for name in later.outputs if name.startswith(RECOMPUTED)},
    }
    shapes = {} if graph is None else {**graph.inputs, **graph.outputs}
    fits = tower.rows == tower.of == stream.of and all(
        shapes[name].shape[1:2] == [count] for name, count in counted.items() if name in shapes
    )
    return "" if fits else "manifest.tower, manifest.stream and the rows of the graphs differ"


def compares(stages: Sequence[Any]) -> bool:
    """Whether a method compares a picture with the one before."""
    return any(PICTURE in stage.inputs.values() for stage in stages)


def grey_line(stages: Sequence[Any], option: str) -> str:
    """What a user who did not set `option` is told of a method that compares; "" of other bundles."""
    told = f"the bundle's method keeps what changed; without {option} that is what differs from grey"
    return told if compares(stages) else ""


def uses_earlier(manifest: Any) -> bool:
    """Whether a bundle makes use of a camera's earlier pictures, if it is asked to."""
    return manifest.stream is not None or compares(manifest.stages)


def stream_state(stages: Sequence[Any]) -> set[str]:
    """Names in the pipeline of what an encoder gives for a camera's later pictures alone."""
    return {name for stage in stages if stage.when == STREAM for name in state_of(stage)}


def state_of(later: Any) -> set[str]:
    """Names in the pipeline of what the stage of later pictures needs of the reference picture's."""
    return set(later.inputs.values()) - {"pixel_values"}
