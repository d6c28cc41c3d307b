"""The whole folder: exported, checked and put in its place as one, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_folder
from vtp.engines.errors import shown
from vtp.engines.strict_json import read_json
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.exporter import export
from vtp.export.layouts.transformers_js import note as notes
from vtp.export.layouts.transformers_js import processor, settings, weights, words
from vtp.export.layouts.transformers_js.clients import CLIENTS, Client
from vtp.export.layouts.transformers_js.fidelity import hold_against
from vtp.export.layouts.transformers_js.growing import decoder_model_merged
from vtp.export.layouts.transformers_js.joining import computes_in_float64, embed_tokens, vision_encoder
from vtp.export.layouts.transformers_js.rehearsal import SUFFIXES
from vtp.export.layouts.transformers_js.served import check_manifest, check_request, check_verify, settle
from vtp.export.request import Request
from vtp.runtime.bundle.folder import Bundle, check_output, check_outside, open_bundle
from vtp.runtime.bundle.manifest import Manifest

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A folder that stands in its place, and the manifest of the bundle that it was made of."""

    folder: Path
    manifest: Manifest
    dtypes: Mapping[str, str]
    checked: Mapping[str, Any]
    browsers: bool


def export_folder(
    request: Request, progress: Progress = lambda _: None, note: Callable[[str], None] = lambda _: None
) -> Written:
    """Export a model, and lay the verified bundle out in `request.output`.

    Raises as `vtp.export.exporter.export` does, and UsageError or VtpError for what the layout does not
    serve; in every such case the output folder is as it was.
    """
    check_request(request)
    output = request.output
    check_place(output, request.overwrite)
    with whole_folder(output, lambda: check_place(output, request.overwrite)) as aside:
        inner = replace(request, output=aside.parent / "bundle", overwrite=False)
        bundle = export(inner, progress, note=note, settle=settle)
        model = checkpoint.resolve(request.model)
        written = write(bundle, model, aside, progress, request.verify)
    return replace(written, folder=output)


def lay_out(
    source: Path,
    model: str | None,
    output: Path,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    verify: str = "full",
) -> Written:
    """Lay out a bundle that exists, such as one that vtp-calib quantised; `model` is what it was made from.

    Raises UsageError or VtpError, in one line, for what the layout does not serve, for a bundle of another
    model, and for an output that may not be written.
    """
    check_verify(verify)
    bundle = open_bundle(source)
    check_manifest(bundle.manifest, source)
    folder = checkpoint.resolve(model)
    if checkpoint.model_name(folder) != bundle.manifest.model.name:
        raise UsageError(
            f"the bundle {source} was made from the model {shown(bundle.manifest.model.name)}, not from "
            f"{folder}; give that one with --model"
        )
    check_place(output, overwrite)
    with whole_folder(output, lambda: check_place(output, overwrite)) as aside:
        written = write(bundle, folder, aside, progress, verify)
    return replace(written, folder=output)


def write(
    bundle: Bundle, model: Path, folder: Path, progress: Progress = lambda _: None, verify: str = "full"
) -> Written:
    """Write a verified bundle into the empty `folder`, and hold the result against the bundle.

    That loads both whole, so it is done for `verify` "full" alone.
    """
    manifest = bundle.manifest
    client = CLIENTS[manifest.model.family]
    progress("lay out for transformers.js")
    graphs = {
        "vision_encoder": vision_encoder(bundle, client),
        "embed_tokens": embed_tokens(bundle),
        "decoder_model_merged": decoder_model_merged(bundle, client),
    }
    dtypes = {name: dtype_of(graph) for name, graph in graphs.items()}
    (folder / "onnx").mkdir()
    named = {f"{name}{SUFFIXES[dtypes[name]]}": graph for name, graph in graphs.items()}
    counts = weights.save(named, folder / "onnx")
    tokenizer = words.tokenizer_json(bundle)
    ids = words.check_ids(bundle, client, tokenizer)
    browsers = not any(map(computes_in_float64, graphs.values()))
    texts = _texts(bundle, model, client, dtypes, counts)
    texts["README.md"] = notes.readme(bundle, client, dtypes, browsers)
    for name, text in {**texts, "tokenizer.json": tokenizer}.items():
        (folder / name).write_text(text, encoding="utf-8")
    checked: dict[str, Any] = {"mode": "none"}
    if verify == "full":
        progress("compare with the bundle")
        checked = hold_against(bundle, folder, ids)
    (folder / notes.RECORD).write_text(notes.record(bundle, dtypes, checked, folder), encoding="utf-8")
    return Written(folder, manifest, dtypes, checked, browsers)


def _texts(
    bundle: Bundle, model: Path, client: Client, dtypes: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, str]:
    """Every file but the graphs, the tokenizer and the record, by name."""
    manifest = bundle.manifest
    values = {
        "config.json": settings.config(bundle, model, dtypes, counts),
        "generation_config.json": settings.generation_config(bundle),
        "preprocessor_config.json": processor.preprocessor_config(manifest, client),
        "processor_config.json": processor.processor_config(manifest, client),
        "tokenizer_config.json": words.tokenizer_config(bundle, client),
    }
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in values.items()}
    return {**texts, "chat_template.jinja": words.chat_template(bundle)} if client.chat else texts


def dtype_of(model: ir.Model) -> str:
    """transformers.js' word for how a graph's weights are stored and computed with."""
    kinds = {node.op_type for node in model.graph}
    weights = [value.const_value for value in model.graph.initializers.values()]
    half = any(tensor is not None and tensor.dtype == ir.DataType.FLOAT16 for tensor in weights)
    if "MatMulNBits" in kinds:
        return "q4f16" if half else "q4"
    if kinds & {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"}:
        return "int8"
    return "fp16" if half else "fp32"


def check_place(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists without --overwrite, or that is neither such a folder nor a bundle."""
    if not (overwrite and _is_ours(output)):
        check_output(output, overwrite)
        return
    check_outside(output)
    if Path.cwd().is_relative_to(output.resolve()):
        raise UsageError(f"output {output} holds the folder you are in; choose another one")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is one that was laid out, with nobody else's file in it."""
    try:
        data = read_json(folder / notes.RECORD)
    except VtpError:
        return False
    own = data.get("files") if isinstance(data, dict) and data.get("layout") == notes.LAYOUT else None
    if not isinstance(own, dict):
        return False
    known = {notes.RECORD, *own}
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path.relative_to(folder).as_posix() for path in paths} <= known
