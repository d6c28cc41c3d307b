"""A bundle as a model repository of NVIDIA's Triton server: image graphs, an ensemble of them, and a front.

    DIR/<name>                 Python backend: picture and prompt in, answer out (runtime/triton/model.py)
    DIR/<name>_image_<K>       ensemble of the image stages for one keep-count: pixel_values -> image tensors
    DIR/<name>_<graph>         ONNX Runtime backend: one graph of those stages

The front calls the ensemble (BLS), so that encoders scale apart from decoders; prompt and steps run in the
front's own process, where the cache lies. The weights of both are hard links to the bundle's, where one disk
holds them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_folder
from vtp.engines.graph.file import read_graph
from vtp.runtime.bundle.folder import MANIFEST, Bundle, check_outside
from vtp.runtime.bundle.manifest import StageInfo, TensorInfo
from vtp.runtime.bundle.stream_info import uses_earlier

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
# What a client sends to the front and gets: name, type, dims, whether it may be left out.
ASKED = (
    ("IMAGE", "TYPE_UINT8", [-1], False),
    ("PROMPT", "TYPE_STRING", [1], False),
    ("MAX_NEW_TOKENS", "TYPE_INT32", [1], True),
    ("KEEP_TOKENS", "TYPE_INT32", [1], True),
)
ANSWERED = (
    ("TEXT", "TYPE_STRING", [1]),
    ("TOKEN_IDS", "TYPE_INT64", [-1]),
    ("VISUAL_TOKENS", "TYPE_INT32", [2]),
    ("KEPT", "TYPE_INT64", [-1]),
)
_FRONT = "from vtp.runtime.triton.model import TritonPythonModel  # noqa: F401\n"


def write_repository(bundle: Bundle, folder: Path, name: str = "vtp", engine: str = "auto") -> list[str]:
    """Write a model repository to a folder that is not there yet; returns the names of its models.

    Raises UsageError for a name or folder that cannot be used, VtpError when writing fails; nothing is left
    behind then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UsageError(f"'{name}' is not a valid name for a Triton model; use letters, digits, - and _")
    if uses_earlier(bundle.manifest):
        made = "--method change" if bundle.manifest.stream is None else "--tower stc"
        raise UsageError(
            f"{bundle.folder} was made for a camera's pictures ({made}), and Triton's requests do not follow "
            f"one another; export it without {made}"
        )
    with whole_folder(folder, lambda: _check_free(folder)) as aside:
        return _write(bundle, aside, name, engine)


def _check_free(folder: Path) -> None:
    check_outside(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists; choose a folder that does not exist for the model repository")


def image_outputs(bundle: Bundle, keep: int) -> dict[str, TensorInfo]:
    """What the image stages give to later ones, and the indices that were kept, by the pipeline's names."""
    manifest = bundle.manifest
    later = [stage for when in ("prefill", "step") for stage in manifest.stages_for(when, keep)]
    read = {source for stage in later for source in stage.inputs.values()} | {"keep_indices"}
    found = {}
    for stage in manifest.stages_for("image", keep):
        for name, target in stage.outputs.items():
            if target in read:
                found[target] = manifest.graphs[stage.file].outputs[name]
    return found


def image_model(name: str, keep: int) -> str:
    """The ensemble of one keep-count."""
    return f"{name}_image_{keep}"


def _write(bundle: Bundle, root: Path, name: str, engine: str) -> list[str]:
    manifest = bundle.manifest
    stages = {keep: manifest.stages_for("image", keep) for keep in manifest.visual.keep}
    for file in dict.fromkeys(stage.file for some in stages.values() for stage in some):
        _write_graph(bundle, root, name, file)
    for keep, some in stages.items():
        text = _ensemble(bundle, name, keep, some)
        _model(root, image_model(name, keep), text)
    version = _model(root, name, _front(bundle, name, engine))
    (version / "model.py").write_text(_FRONT, encoding="utf-8")
    (version / "bundle").mkdir()
    for file in (MANIFEST, *manifest.files):
        _link(bundle.path(file), version / "bundle" / file)
    return sorted(path.name for path in root.iterdir())


def _model(root: Path, name: str, config: str) -> Path:
    """A model's folder with its config; returns the folder of its only version."""
    version = root / name / "1"
    version.mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config, encoding="utf-8")
    return version


def _write_graph(bundle: Bundle, root: Path, name: str, file: str) -> None:
    graph = bundle.manifest.graphs[file]
    config = [
        _text("name", _graph_model(name, file)),
        _text("platform", "onnxruntime_onnx"),
        "max_batch_size: 0",
        *_tensors("input", graph.inputs),
        *_tensors("output", graph.outputs),
    ]
    version = _model(root, _graph_model(name, file), _lines(config))
    _link(bundle.path(file), version / "model.onnx")
    for weights in {one.place[0] for one in read_graph(bundle.path(file)).weights.values() if one.place}:
        _link(bundle.path(weights), version / weights)


def _graph_model(name: str, file: str) -> str:
    return f"{name}_{Path(file).stem}"


def _ensemble(bundle: Bundle, name: str, keep: int, stages: Sequence[StageInfo]) -> str:
    """config.pbtxt of the image stages in a row; a name that several stages write gets the stage's name."""
    manifest = bundle.manifest
    pixels = manifest.graphs[stages[0].file].inputs
    entry = next(tensor for tensor, source in stages[0].inputs.items() if source == "pixel_values")
    steps, last = [], {target: stage.name for stage in stages for target in stage.outputs.values()}
    now = {"pixel_values": "pixel_values"}  # the pipeline's name -> what the ensemble calls it so far
    for stage in stages:
        fed = {tensor: now[source] for tensor, source in stage.inputs.items()}
        made = {
            target: target if last[target] == stage.name else f"{target}.{stage.name}"
            for target in stage.outputs.values()
        }
        now |= made
        steps.append(
            _block(
                "",
                [
                    _text("model_name", _graph_model(name, stage.file)),
                    "model_version: -1",
                    *_map("input_map", fed),
                    *_map("output_map", {tensor: made[target] for tensor, target in stage.outputs.items()}),
                ],
            )
        )
    return _lines(
        [
            _text("name", image_model(name, keep)),
            _text("platform", "ensemble"),
            "max_batch_size: 0",
            *_tensors("input", {"pixel_values": pixels[entry]}),
            *_tensors("output", image_outputs(bundle, keep)),
            "ensemble_scheduling {",
            *(f"  step {step.strip()}" for step in steps),
            "}",
        ]
    )


def _front(bundle: Bundle, name: str, engine: str) -> str:
    asked = [
        _block(
            "input",
            [_text("name", tensor), f"data_type: {kind}", f"dims: {dims}"] + ["optional: true"] * free,
        )
        for tensor, kind, dims, free in ASKED
    ]
    answered = [
        _block("output", [_text("name", tensor), f"data_type: {kind}", f"dims: {dims}"])
        for tensor, kind, dims in ANSWERED
    ]
    parameters = {"engine": engine, "image_stages": "ensemble"}
    said = [
        _block("parameters", [_text("key", key), _block("value", [_text("string_value", value)])])
        for key, value in parameters.items()
    ]
    group = "instance_group [ { count: 1 kind: KIND_CPU } ]"  # the process; its engine chooses the device
    head = [_text("name", name), _text("backend", "python"), "max_batch_size: 0"]
    return _lines([*head, *asked, *answered, *said, group])


def _tensors(kind: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [
        _block(
            kind,
            [
                _text("name", name),
                f"data_type: {_type(tensor.dtype)}",
                f"dims: {[axis if isinstance(axis, int) else -1 for axis in tensor.shape]}",
            ],
        )
        for name, tensor in tensors.items()
    ]


def _type(dtype: str) -> str:
    if dtype not in _TYPES:
        raise VtpError(f"Triton takes no tensors of dtype '{dtype}'; it takes {', '.join(_TYPES)}")
    return _TYPES[dtype]


def _map(kind: str, pairs: Mapping[str, str]) -> list[str]:
    return [_block(kind, [_text("key", key), _text("value", value)]) for key, value in pairs.items()]


def _block(name: str, lines: Sequence[str]) -> str:
    return f"{name} {{ {' '.join(lines)} }}"


def _text(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}: "{escaped}"'


def _lines(lines: Sequence[Any]) -> str:
    return "\n".join(lines) + "\n"


def _link(source: Path, target: Path) -> None:
    """A hard link, so that weights take no room twice; a copy where the disk has none.

    What is there is never written to: it may be a hard link to another file of the bundle.
    """
    try:
        os.link(source.resolve(), target)
    except FileExistsError as error:
        raise VtpError(f"two files of the bundle would both be {target.name}; export it again") from error
    except OSError:
        with source.open("rb") as file, target.open("xb") as copy:
            shutil.copyfileobj(file, copy)
