"""Graphs by which prompts are read: the decoder's layers in int8, beside int4 ones that take the steps.

A step reads every weight once for one token, so that the fewest bytes win. A prompt reads them once for
hundreds of tokens, and then products in int8 take less time than unpacking int4. Both graphs work on one
cache, and what is the same in both lies in the bundle once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx

from vtp.calib.quantize.layers import Change, DynamicInt8, Int4, Layer
from vtp.runtime.bundle.manifest import SINGLE, Manifest


def prompt_file(decoder: str) -> str:
    """The name of the graph that reads prompts for a decoder graph."""
    return f"{Path(decoder).stem}_prompt.onnx"


def prompt_changes(changes: Sequence[Change], fits: Callable[[Layer], bool]) -> list[Change]:
    """The changes of a decoder graph with int8 in place of int4, where all layers that read the same fit.

    Those that share an input stay together: what remains in int4 is then the other graph's product, whose
    bytes serve both.
    """
    loud = {one.layer.source for one in changes if isinstance(one, Int4) and not fits(one.layer)}
    return [
        DynamicInt8(one.layer) if isinstance(one, Int4) and one.layer.source not in loud else one
        for one in changes
    ]


def reads_one_row(layer: Layer, model: onnx.ModelProto) -> bool:
    """Whether a layer sees one row of a whole prompt, as a head does that gives the last logits alone."""
    for info in (*model.graph.value_info, *model.graph.input):
        if info.name == layer.source:
            before = info.type.tensor_type.shape.dim[:-1]
            return all(axis.dim_value == 1 or axis.dim_param in SINGLE for axis in before)
    return False


def with_prompt_graphs(manifest: Manifest, files: Mapping[str, str]) -> Manifest:
    """A manifest whose prompts are read by other graphs: decoder graph -> the one that stands in for it."""
    graphs = dict(manifest.graphs)
    graphs |= {to: dataclasses.replace(graphs[file], cache_of=file) for file, to in files.items()}
    stages = [
        dataclasses.replace(stage, file=files[stage.file])
        if stage.when == "prefill" and stage.file in files
        else stage
        for stage in manifest.stages
    ]
    return dataclasses.replace(manifest, graphs=graphs, stages=stages)
