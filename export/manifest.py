"""The manifest of a bundle that was just written: read off its graphs, its plan and its model."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import onnx

from vtp.export.families.base import Family
from vtp.export.graphs.decoder import DecoderPart
from vtp.export.graphs.frames import Frames
from vtp.export.graphs.pruner import DecoderPruner
from vtp.export.onnx.emit import GraphSpec
from vtp.export.plan.plan import Plan
from vtp.export.plan.schedule import cuts_of, site_of
from vtp.export.pruners import NONE
from vtp.export.request import Job
from vtp.runtime.bundle.folder import describe_files
from vtp.runtime.bundle.manifest import (
    TILE_TOKENS,
    TILES,
    FrameInfo,
    GraphInfo,
    Manifest,
    MethodInfo,
    ModelInfo,
    StreamInfo,
    TensorInfo,
    ThenInfo,
    TowerInfo,
    VisualInfo,
)

BATCH = 8  # prompts that run together, or pictures, at most
TYPICAL_TEXT = 64  # tokens of a usual prompt: what engines should be tuned for


def describe(folder: Path, job: Job, plan: Plan) -> Manifest:
    """The manifest of the graphs that stand in `folder`; its parity report is still empty."""
    model, family = job.model, job.model.family
    config = family.decoder.model.config
    return Manifest(
        model=ModelInfo(
            name=model.name,
            architecture=type(family.model).__name__,
            family=family.name,
            hidden_size=family.decoder.width,
            vocab_size=config.vocab_size,
            max_length=job.max_length,
        ),
        method=_method_info(job),
        target=job.target.name,
        dtype=job.dtype,
        visual=VisualInfo(
            job.count, list(family.grid), job.keep, _default_keep(job), _frame_info(family.layout)
        ),
        image=model.image,
        text=model.text,
        graphs={f"{spec.name}.onnx": _graph_info(spec, plan, folder, job) for spec in plan.graphs},
        stages=plan.stages,
        files=describe_files(folder),
        versions=_versions(),
        generation=model.generation.info,
        tower=_tower_info(family),
        stream=_stream_info(family),
    )


def _tower_info(family: Family) -> TowerInfo | None:
    reduced = family.reduced
    if reduced is None:
        return None
    kind = reduced.reduction
    return TowerInfo(kind.name, reduced.rows, reduced.of, dict(kind.settings), kind.paper)


def _stream_info(family: Family) -> StreamInfo | None:
    reuse, rows = family.stream_reuse, family.reduced.of if family.reduced else 0
    if reuse is None:
        return None
    settings = reuse.settings
    return StreamInfo(reuse.recomputed(rows), rows, float(settings["alike"]), settings["every"])


def _frame_info(frames: Frames | None) -> FrameInfo | None:
    return None if frames is None else FrameInfo(list(frames.grid), frames.before, frames.step)


def _default_keep(job: Job) -> int:
    """The method's own default where the bundle holds it, else the largest."""
    usual = job.schedules[0][0].default_keep(job.count) if job.schedules else job.count
    return usual if usual in job.keep else max(job.keep)


def _method_info(job: Job) -> MethodInfo:
    if not job.schedules:
        return MethodInfo(NONE, NONE, {}, job.positions, "")
    first = job.schedules[0][0]
    site = str(site_of(job.schedules[0]))
    return MethodInfo(
        first.name,
        site,
        dict(first.settings),
        job.positions,
        first.paper,
        job.restore,
        job.share,
        _then_info(job),
    )


def _then_info(job: Job) -> ThenInfo | None:
    if job.then is None:
        return None
    one, (layer,) = job.schedules[0][-1], cuts_of(job.schedules[0])
    keeps = [schedule[-1].keep for schedule in job.schedules]
    return ThenInfo(one.name, layer, job.then.share, keeps, dict(one.settings), one.paper)


def _graph_info(spec: GraphSpec, plan: Plan, folder: Path, job: Job) -> GraphInfo:
    """A graph's inputs, outputs and [least, usual, most] of every dynamic axis."""
    max_length, keep, count = job.max_length, job.keep[-1], job.count
    graph = onnx.load(folder / f"{spec.name}.onnx", load_external_data=False).graph
    inputs = {value.name: _tensor_info(value) for value in graph.input}
    outputs = {value.name: _tensor_info(value) for value in graph.output}
    named = {
        axis for info in [*inputs.values(), *outputs.values()] for axis in info.shape if isinstance(axis, str)
    }
    cache = plan.caches.get(spec.name)
    least, arriving = _visual_tokens(spec, job)
    text, kept, prompt = (min(size, max_length) for size in (TYPICAL_TEXT, keep, arriving + TYPICAL_TEXT))
    images, tiles = max(1, max_length // count), _tiles(spec)
    ranges = {
        "batch": [1, 1, BATCH],
        "images": [1, 1, images],
        "pictures": [1, 1, max(BATCH, images)],
        TILES: [1, tiles, tiles],
        TILE_TOKENS: [count // tiles, count, count],
        "text": [1, text, max_length],
        "text_rows": [1, text, max_length],
        "visual": [1, kept, max_length],
        "sequence": [least, prompt, max_length],
        "kept_sequence": [1, min(keep + TYPICAL_TEXT, max_length), max_length],
        "capacity": [1, max_length, max_length] if cache is None else [1, cache.capacity, cache.capacity],
    }
    ranges = {name: ranges[name] for name in sorted(named)}
    return GraphInfo(inputs, outputs, ranges, cache, plan.states.get(spec.name, []))


def _tiles(spec: GraphSpec) -> int:
    """How many tiles a picture has, if the graph takes any number of them; else 1."""
    named = [(item.example.shape[axis], name) for item in spec.inputs for axis, name in item.dynamic.items()]
    return next((size for size, name in named if name == TILES), 1)


def _visual_tokens(spec: GraphSpec, job: Job) -> tuple[int, int]:
    """How many visual tokens a graph's prompts hold: at least, and usually, before the text is added."""
    if isinstance(spec.module, DecoderPruner):
        return spec.module.pruner.count, spec.module.pruner.count
    if isinstance(spec.module, DecoderPart) and job.schedules:
        head = job.keep[-1] if job.layout.on_features else job.count
        return 1, job.schedules[-1][-1].keep if spec.module.final else head  # later parts of a head see fewer
    return 1, job.keep[-1]  # a single step has one token


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorInfo(dtype, [axis.dim_param or axis.dim_value for axis in tensor.shape.dim])


def _versions() -> dict[str, str]:
    names = ("vtp-edge", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
