"""Where a bundle's image stages can be entered, and the tensors that are needed there, by their names."""

from __future__ import annotations

from dataclasses import dataclass

from vtp.engines import UsageError
from vtp.runtime.bundle.manifest import Manifest, StageInfo, TensorInfo
from vtp.runtime.bundle.stream_info import PICTURE, stream_state

FEATURES, EMBEDS = "image_features", "image_embeds"
_OF_PROMPTS = ("input_ids", "text_length", "image_start")  # what the runner itself feeds


@dataclass(frozen=True)
class Boundary:
    """After a stage: `after` is how many image stages lie before it.

    needs  what later stages read, with the shape of one picture's, whose first axis is 1
    known  what earlier stages would give, `needs` among it
    """

    name: str
    after: int
    needs: dict[str, TensorInfo]
    known: dict[str, TensorInfo]


def find_boundary(manifest: Manifest, keep: int, name: str) -> Boundary:
    """The boundary behind the vision encoder (FEATURES) or behind the projector (EMBEDS), for a keep-count.

    UsageError where no stage of the bundle gives a tensor of that name.
    """
    stages = manifest.stages_for("image", keep)
    givers = [place for place, stage in enumerate(stages) if name in stage.outputs.values()]
    if not givers:
        raise UsageError(f"no image stage of this bundle gives {name}; give the picture itself")
    after = givers[-1] + 1
    pruned = any(stage.role == "pruner" for stage in stages[:after])
    rows = keep if pruned else manifest.visual.count
    known = {
        to: _of_one(manifest, stage, own, rows)
        for stage in stages[:after]
        for own, to in stage.outputs.items()
        if to not in stream_state(manifest.stages)
    }
    needed = _read(stages[after:] + manifest.stages_for("prefill", keep))
    if PICTURE in needed:
        raise UsageError(
            f"method {manifest.method.name} compares pictures, so {name} alone is not enough; give the "
            "picture itself"
        )
    return Boundary(name, after, {one: known[one] for one in needed if one in known}, known)


def _of_one(manifest: Manifest, stage: StageInfo, own: str, rows: int) -> TensorInfo:
    """A stage's output for one picture; the axis that is not fixed counts visual tokens."""
    info = manifest.graphs[stage.file].outputs[own]
    return TensorInfo(info.dtype, [1, *(rows if isinstance(axis, str) else axis for axis in info.shape[1:])])


def _read(stages: list[StageInfo]) -> list[str]:
    """What stages read that none of them gives before."""
    given, read = set(_OF_PROMPTS), dict[str, None]()
    for stage in stages:
        read |= dict.fromkeys(one for one in stage.inputs.values() if one not in given)
        given |= set(stage.outputs.values())
    return list(read)
