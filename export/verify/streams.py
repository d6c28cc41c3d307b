"""Fidelity of a tower that reuses a camera's earlier pictures (`--tower stc`), on a second picture.

Which rows are recomputed is taken from the bundle, as with what a pruner keeps; that they are the least alike
is checked apart, since near-ties are decided by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vtp.engines import Value, VtpError
from vtp.export.checkpoint.loading import Checkpoint
from vtp.export.tower_cues import TOWER_CUES
from vtp.export.towers.stc import recomputed_names
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.stream_info import COSINE, STREAM, state_of
from vtp.runtime.compare import Comparison, compare
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

# How far cosines of a graph and of torch may be apart, of keys in this dtype.
_NEAR = {"float32": 1e-4, "float16": 1e-2}


def check_stream(
    bundle: Bundle, model: Checkpoint, runner: StageRunner, values: Mapping[str, Value], pixels: np.ndarray
) -> list[Comparison]:
    """Hold the stage of later pictures against transformers' own layers in the long form.

    `values` are what flowed for the reference picture `pixels`; the later one is the same with a quarter of
    it replaced by noise. Raises VtpError for what differs.
    """
    later = changed(pixels)
    stage = bundle.manifest.stages_for(STREAM, 0)[0]
    given = {name: values[name] for name in state_of(stage)}
    given["pixel_values"] = runner.any_engine.put(later)
    runner.run(STREAM, 0, given, Timings())
    answer = {name: given[name].numpy() for name in stage.outputs.values()}
    rows = [answer[name][0] for name in recomputed_names(model.family.tower_shape.blocks)]
    wanted, cosines = _long_form(model, pixels, later, rows, set(TOWER_CUES) & set(answer))
    dtype = bundle.manifest.dtype
    for number, (chosen, alike) in enumerate(zip(rows, cosines, strict=True)):
        _check_choice(number, chosen, alike, _NEAR[dtype])
    if abs(float(answer[COSINE][0]) - float(cosines[0].mean())) > _NEAR[dtype]:
        raise VtpError(f"fidelity check failed: {COSINE} of {stage.name} is not torch's")
    return [_compared(stage.name, name, answer[name], tensor, dtype) for name, tensor in wanted.items()]


def changed(pixels: np.ndarray) -> np.ndarray:
    """Pixel values [B,3,H,W] with noise in their upper left quarter, and a little of it everywhere."""
    rng, later = np.random.default_rng(0), pixels.copy()
    height, width = pixels.shape[2] // 2, pixels.shape[3] // 2
    later += 0.01 * rng.standard_normal(pixels.shape).astype(pixels.dtype)
    later[:, :, :height, :width] = rng.standard_normal((*pixels.shape[:2], height, width))
    return later


def _long_form(
    model: Checkpoint, first: np.ndarray, later: np.ndarray, rows: list[np.ndarray], cues: set[str]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """image_features and the cues of the later picture, and every block's cosines float64 [N]."""
    reuse = model.family.stream_reuse
    assert reuse is not None  # or the bundle had no such stage
    parts = model.family.reference(model.family.model)
    chosen = [torch.from_numpy(one.copy()) for one in rows]
    with torch.no_grad(), parts.eager(), reuse.reference(parts.blocks, chosen) as cosines:
        parts.vision(torch.from_numpy(first).float(), cues)
        wanted = parts.vision(torch.from_numpy(later).float(), cues)
    return wanted, list(cosines)


def _check_choice(number: int, chosen: np.ndarray, alike: Tensor, near: float) -> None:
    """Raise VtpError unless every row that is left out is at least as much alike as those chosen."""
    left_out = np.setdiff1d(np.arange(len(alike)), chosen)
    values = alike.numpy()
    if left_out.size and values[left_out].min() < values[chosen].max() - near:
        raise VtpError(
            f"fidelity check failed: block {number} of vision_encoder_later recomputes rows that are more "
            f"like the reference than some that it reuses"
        )


def _compared(stage: str, name: str, found: np.ndarray, wanted: Tensor, dtype: str) -> Comparison:
    one = compare(found, wanted.float().numpy(), dtype)
    if not one.ok:
        raise VtpError(f"fidelity check failed: {name} of {stage} is not torch's: {one.why}")
    return one
