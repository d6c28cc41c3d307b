"""What runs once a picture: tower and projector, with the pruner that follows one of them."""

from __future__ import annotations

from collections.abc import Iterator

from vtp.export.graphs.pruner import FeaturePruner
from vtp.export.onnx.emit import GraphInput, GraphSpec
from vtp.export.plan import examples
from vtp.export.plan.bundle_layout import BundleLayout
from vtp.export.plan.names import axes, pruner_name, stage
from vtp.export.plan.schedule import keep_of
from vtp.export.tower_cues import TOWER_CUES
from vtp.export.towers.stc import recomputed_names, state_names
from vtp.runtime.bundle.manifest import TILE_TOKENS, StageInfo
from vtp.runtime.bundle.stream_info import COSINE, STREAM

LATER = "vision_encoder_later"  # a camera's later picture


def image_stages(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    """Graphs and stages: vision_encoder [-> pruner] -> projector [-> pruner]."""
    yield from _vision_encoder(layout)
    if layout.kind == "vision":
        yield from feature_pruners(layout, "image", "image_features", "kept_features")
    yield from _projector(layout)
    if layout.kind == "projector" and not layout.reads_text:
        yield from feature_pruners(layout, "image", "image_embeds", "kept_embeds")


def _vision_encoder(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    family = layout.family
    cues = [name for name in TOWER_CUES if name in layout.needs] if layout.on_features else []
    blocks = family.tower_shape.blocks if family.stream_reuse else 0
    state = state_names(blocks)
    outputs = ["image_features", *cues, *state]
    encoder = family.vision_encoder(cues) if layout.on_features else family.whole_encoder()
    joined = {name: {1: TILE_TOKENS} for name in outputs} if family.apart else {}
    yield GraphSpec("vision_encoder", encoder, [examples.pixels(layout)], outputs, joined)
    yield stage("vision_encoder", "image", ["pixel_values"], outputs, role="encoder")
    if state:
        inputs = [examples.pixels(layout), *examples.tower_state(layout, state)]
        outputs = ["image_features", *cues, *recomputed_names(blocks), COSINE]
        yield GraphSpec(LATER, family.later_encoder(cues), inputs, outputs)
        yield stage(LATER, STREAM, ["pixel_values", *state], outputs, role="encoder")


def _projector(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    projector = layout.family.projector(whole=not layout.on_features)
    yield GraphSpec("projector", projector, [examples.features(layout)], ["image_embeds"])
    source = "kept_features" if layout.kind == "vision" else "image_features"
    yield stage("projector", "image", {"image_features": source}, ["image_embeds"])


def feature_pruners(layout: BundleLayout, when: str, rows: str, kept: str) -> Iterator[GraphSpec | StageInfo]:
    """The pruner of every keep-count, which turns `rows` into `kept`."""
    cues = [rows, *(name for name in layout.needs if name != rows)]
    tensors = examples.feature_cues(layout)
    outputs = ["keep_indices", kept]
    for schedule in layout.schedules:
        file, family = layout.pruner_file(schedule, 0), layout.family
        module = FeaturePruner(schedule[0], cues, family.places(), family.widths)
        inputs = [GraphInput(cue, tensors[cue], axes(cue)) for cue in cues]
        yield GraphSpec(file, module, inputs, outputs, rewrite=False)
        reads = {cue: "pixel_values" if cue == "picture" else cue for cue in cues}
        name, keep = pruner_name(0, len(schedule), None), keep_of(schedule)
        yield stage(name, when, reads, outputs, file=file, keep=keep, role="pruner")
