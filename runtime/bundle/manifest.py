"""The bundle contract: `manifest.json` as dataclasses, read strictly.

The manifest is all that export and runtime share. Unknown keys, missing keys and unknown schema versions are
refused, so that a bundle never runs with half of what it asked for.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from vtp.engines import VtpError
from vtp.engines.errors import quoted
from vtp.engines.strict_json import parse_json
from vtp.runtime.bundle.caches import (
    LENGTHS,
    StateTensors,
    cache_problem,
    kv_pairs,
    sharing_problem,
    unused_cache,
)
from vtp.runtime.bundle.caches import KvInfo as KvInfo
from vtp.runtime.bundle.generation_info import GenerationInfo as GenerationInfo
from vtp.runtime.bundle.generation_info import generation_problem
from vtp.runtime.bundle.stream_info import STREAM, stream_problem, tower_problem
from vtp.runtime.bundle.stream_info import StreamInfo as StreamInfo
from vtp.runtime.bundle.then_info import ThenInfo as ThenInfo
from vtp.runtime.bundle.then_info import then_problem
from vtp.runtime.bundle.typed_json import built
from vtp.runtime.preprocess import ImageSpec, spec_to_json
from vtp.runtime.prompt.prompter import TextSpec

SCHEMA = 2  # what export writes; 1, whose stages have no role, is read as well
OLDEST = 1
WHEN = ("image", "prefill", "step", STREAM)
# What a stage does: "text_cues" is what a method reads of the question; "decoder_head" is any part of the
# decoder that a pruner follows, "decoder" the last part (or all of it), which gives the logits.
ROLES = ("encoder", "projector", "pruner", "embed", "text_cues", "splice", "decoder_head", "decoder")
PICTURE, TILE, FRAME = "picture", "tile", "frame"
SHARES = (PICTURE, TILE, FRAME)  # whose budget a keep-count is
TOKENIZER = "tokenizer.json"
# Axes of an encoder that takes any number of one picture's tiles: those, and the tokens of all in a row.
TILES, TILE_TOKENS = "tiles", "tile_tokens"
SINGLE = ("batch", "images", "pictures")  # axes that are 1 for one prompt about one picture


@dataclass(frozen=True)
class TensorInfo:
    """dtype (numpy's name) and shape of a graph's input or output; a dynamic axis is named."""

    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class StageInfo:
    """One run of one graph. A graph that serves prefill and step is listed once for each.

    role      what it does, one of `ROLES`.
    when      "image" (once a picture), "prefill" (once a prompt), "step" (once a new token) or "stream" (a
              camera's later picture, instead of the encoder: see `StreamInfo`).
    keep      the keep-count this stage belongs to; None: any.
    inputs    graph's tensor name -> pipeline's name. Caches, states and lengths come from `kv` and
              `states` instead.
    outputs   graph's tensor name -> pipeline's name.
    """

    name: str
    role: str
    file: str
    when: str
    keep: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class GraphInfo:
    """What a graph file takes and gives, the ranges of its named axes, and its cache if it has one.

    states    what its layers carry beside the cache, or in place of it; only graphs with a cache have any
    cache_of  the graph whose cache and states this one works on; null: its own. The same layers in other
              bits, by which prompts are read
    """

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    axes: dict[str, list[int]]  # name -> [min, opt, max]
    kv: KvInfo | None
    states: list[StateTensors] = field(default_factory=list)
    cache_of: str | None = None

    @property
    def carried(self) -> dict[str, str]:
        """Input -> output of every tensor that goes from run to run."""
        pairs = kv_pairs(self.kv.layers) if self.kv else {}
        return pairs | {name: to for state in self.states for name, to in state.pairs.items()}


@dataclass(frozen=True)
class MethodInfo:
    """How tokens are dropped: the method, its site and the options it was exported with.

    restore  whether log(N/K) is added to the attention logits of kept visual tokens
    share    whose budget a keep-count is: "picture" (or a whole video), "tile" or "frame" (dealt to these)
    then     what is dropped of the kept ones inside the decoder; null: nothing
    """

    name: str
    site: str
    options: dict[str, Any]
    positions: str
    paper: str
    restore: bool = False
    share: str = PICTURE
    then: ThenInfo | None = None


@dataclass(frozen=True)
class TowerInfo:
    """A vision tower with a reduction: its last block works on `rows` of the `of` rows that it would have."""

    name: str
    rows: int
    of: int
    options: dict[str, Any]
    paper: str

    def to_json(self) -> dict[str, Any]:
        """What results say of it."""
        return {"name": self.name, "rows": self.rows, "of": self.of}


@dataclass(frozen=True)
class FrameInfo:
    """The visual tokens of a video: patch i of frame f is number first + f * step + i of them.

    grid  (rows, columns) of the patches of a frame, in whose order i counts
    """

    grid: list[int]
    first: int
    step: int


@dataclass(frozen=True)
class VisualInfo:
    """N = rows x columns visual tokens before pruning; the keep-counts this bundle holds, and its default.

    `frame` says where the frames of a video lie; null for pictures.
    """

    count: int
    grid: list[int]
    keep: list[int]
    default_keep: int
    frame: FrameInfo | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Where the bundle comes from. `max_length` bounds text + N visual + new tokens of one conversation."""

    name: str
    architecture: str
    family: str
    hidden_size: int
    vocab_size: int
    max_length: int


@dataclass(frozen=True)
class FileInfo:
    """Identity of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know about a bundle; see the classes of its fields."""

    model: ModelInfo
    method: MethodInfo
    target: str
    dtype: str
    visual: VisualInfo
    image: ImageSpec
    text: TextSpec
    graphs: dict[str, GraphInfo]
    stages: list[StageInfo]
    files: dict[str, FileInfo]
    versions: dict[str, str]
    parity: dict[str, Any] = field(default_factory=dict)
    # What vtp-calib measured on its user's data and machine: keep-count -> {"score", "share", "ttft_ms"}
    # under "tried", beside the goal, the metric and the engine.
    calibration: dict[str, Any] = field(default_factory=dict)
    # What vtp-calib quantize made of the bundle's graphs, layer by layer, and what it cost; {}: nothing.
    quantization: dict[str, Any] = field(default_factory=dict)
    generation: GenerationInfo = field(default_factory=GenerationInfo)
    tower: TowerInfo | None = None  # null: the vision tower works on all its rows
    stream: StreamInfo | None = None  # of a tower that reuses a camera's earlier pictures
    schema: int = SCHEMA

    def stages_for(self, when: str, keep: int) -> list[StageInfo]:
        """The stages of one moment for one keep-count, in order."""
        return [stage for stage in self.stages if stage.when == when and stage.keep in (None, keep)]

    def stages_of(self, role: str) -> list[StageInfo]:
        """The stages of one role, of all moments and keep-counts."""
        return [stage for stage in self.stages if stage.role == role]

    @property
    def single_picture_stages(self) -> list[StageInfo]:
        """Stages whose graph knows where one picture of a prompt begins, and not where further ones do."""
        return [
            stage
            for stage in self.stages
            for name, source in stage.inputs.items()
            if source == "image_start" and isinstance(self.graphs[stage.file].inputs[name].shape[1], int)
        ]

    @property
    def runs(self) -> tuple[int, ...]:
        """Visual tokens of every run (tile) of a picture, for each of which its ids hold one image token."""
        runs = self.text.placeholder_ids.count(self.text.image_token_id)
        return self.image.view_tokens or (self.visual.count // runs,) * runs

    def to_json(self) -> str:
        """The text of manifest.json."""
        data = {**dataclasses.asdict(self), "image": spec_to_json(self.image)}
        # What most bundles have not is left out, so that versions that do not know it read them.
        if self.stream is None:
            del data["stream"]
        if not self.method.restore:
            del data["method"]["restore"]
        if self.method.share == PICTURE:
            del data["method"]["share"]
        if self.method.then is None:
            del data["method"]["then"]
        for graph in data["graphs"].values():
            if not graph["states"]:
                del graph["states"]
            if graph["cache_of"] is None:
                del graph["cache_of"]
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """Read manifest.json. Raises VtpError, in one line, for what is not a manifest of this schema."""
    data = parse_json(text, "manifest.json", cure="export the bundle again")
    if not isinstance(data, dict) or "schema" not in data:
        raise VtpError("manifest.json has no schema version; this is not a vtp bundle")
    if type(data["schema"]) is not int or not OLDEST <= data["schema"] <= SCHEMA:
        raise VtpError(
            f"this bundle has schema version {quoted(data['schema'])}; this vtp reads versions {OLDEST} to "
            f"{SCHEMA}: export the bundle again, or install the vtp that made it"
        )
    if data["schema"] == OLDEST:
        data = _with_roles(data)
    manifest = built(Manifest, data, "manifest")
    _check(manifest)
    return manifest


def _with_roles(data: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1 as one of schema 2: its stages' names tell their roles."""
    stages = data.get("stages")
    if not isinstance(stages, list):
        return {**data, "schema": SCHEMA}  # refused where the stages are read
    named = []
    for place, stage in enumerate(stages):
        if isinstance(stage, dict) and isinstance(stage.get("name"), str):
            if "role" in stage:
                raise VtpError(
                    f"manifest.stages[{place}] has the unknown key 'role'; this bundle was made by another "
                    "vtp"
                )
            stage = {**stage, "role": role_of(stage["name"])}
        named.append(stage)
    return {**data, "schema": SCHEMA, "stages": named}


def role_of(name: str) -> str:
    """The role of a stage of schema 1: decoder_head, decoder_1 … run before the last part, decoder."""
    given = {"vision_encoder": "encoder", "embed_tokens": "embed"}
    role = given.get(name, name if name in ROLES else name.rpartition("_")[0])
    role = "decoder_head" if role == "decoder" and name != "decoder" else role
    if role not in ROLES:
        raise VtpError(f"the name of stage {quoted(name)} tells no role; export the bundle again")
    return role


def _check(manifest: Manifest) -> None:
    """Hold the parts against each other, so that a stage never meets a name or a number it cannot use."""
    visual, longest = manifest.visual, manifest.model.max_length
    share = manifest.method.share
    _agree(share in SHARES, f"manifest.method.share is {quoted(share)}, not one of {', '.join(SHARES)}")
    _agree(len(visual.grid) == 2 and min(visual.grid) > 0, "manifest.visual.grid is not (rows, columns)")
    _agree(visual.count == visual.grid[0] * visual.grid[1], "manifest.visual.count is not rows x columns")
    _agree(all(1 <= keep <= visual.count for keep in visual.keep), "manifest.visual.keep is out of range")
    _agree(visual.default_keep in visual.keep, "manifest.visual.default_keep is not one of keep")
    clips = manifest.image.frames is not None
    _agree(clips == (manifest.text.media == "video"), "manifest.text.media and manifest.image.frames differ")
    _agree(clips == (visual.frame is not None), "manifest.visual.frame and manifest.image.frames differ")
    _agree(clips or share != FRAME, "manifest.method.share is 'frame', and the bundle is for pictures")
    _check_frame(visual, manifest.image.frames or 0)
    found = visual.count, manifest.text.placeholder_ids.count(manifest.text.image_token_id)
    _agree(found == (sum(manifest.runs), len(manifest.runs)), "manifest.visual.count does not fit the image")
    for problem in (
        generation_problem(manifest.generation, manifest.model.vocab_size),
        stream_problem(manifest.stream, manifest.stages)
        or tower_problem(manifest.tower, manifest.stream, manifest.stages, manifest.graphs),
        then_problem(manifest.method.then, visual.keep),
    ):
        _agree(not problem, problem)
    _check_ids(manifest)
    _agree(TOKENIZER in manifest.files, f"manifest.files lacks {TOKENIZER}")
    for file, graph in manifest.graphs.items():
        _agree(file in manifest.files, f"graph {file} is not one of manifest.files")
        problem = cache_problem(file, graph, longest) or sharing_problem(file, manifest)
        _agree(not problem, problem)
    for stage in manifest.stages:
        _check_stage(stage, manifest)
    for keep in visual.keep:
        _check_flow(manifest, keep)


def _check_ids(manifest: Manifest) -> None:
    """Negative ids would count from the end of the embedding table; without an end, no answer ends."""
    text = manifest.text
    ids = [*text.placeholder_ids, *text.eos_token_ids, text.image_token_id]
    _agree(all(one >= 0 for one in ids), "manifest.text names a token by a negative id")
    _agree(bool(text.eos_token_ids), "manifest.text.eos_token_ids is empty, so that no answer would end")


def _check_frame(visual: VisualInfo, frames: int) -> None:
    if visual.frame is None:
        return
    grid, first, step = visual.frame.grid, visual.frame.first, visual.frame.step
    _agree(len(grid) == 2 and min(grid) > 0, "manifest.visual.frame.grid is not (rows, columns)")
    patches = grid[0] * grid[1]
    fits = first >= 0 and step >= patches and first + (frames - 1) * step + patches <= visual.count
    _agree(fits, "manifest.visual.frame does not fit the visual tokens")


def _check_stage(stage: StageInfo, manifest: Manifest) -> None:
    if stage.when not in WHEN:
        raise VtpError(f"stage {stage.name} runs at unknown moment '{stage.when}'; known: {', '.join(WHEN)}")
    if stage.role not in ROLES:
        raise VtpError(f"stage {stage.name} has the unknown role '{stage.role}'; known: {', '.join(ROLES)}")
    if stage.file not in manifest.graphs:
        raise VtpError(f"stage {stage.name} names '{stage.file}', which the manifest does not describe")
    _agree(
        stage.keep in (None, *manifest.visual.keep), f"stage {stage.name} has the unknown keep {stage.keep}"
    )
    graph = manifest.graphs[stage.file]
    cached = {*graph.carried, *LENGTHS} if graph.kv else set()
    missing = sorted(set(graph.inputs) - set(stage.inputs) - cached)
    _agree(not missing, f"stage {stage.name} feeds nothing to input {missing}")
    for name in stage.inputs:
        _agree(name in graph.inputs, f"stage {stage.name} feeds '{name}', which {stage.file} does not take")
    for name in stage.outputs:
        _agree(name in graph.outputs, f"stage {stage.name} reads '{name}', which {stage.file} does not give")
    _agree(graph.kv is None or "position_ids" in stage.inputs, f"stage {stage.name} has no position_ids")
    for name, source in stage.inputs.items():
        fits = source != "image_start" or len(graph.inputs[name].shape) == 2
        _agree(fits, f"image_start of {stage.file} is not [batch, images]")
    _check_role(stage)


def _check_role(stage: StageInfo) -> None:
    """Hold a role against what such a stage takes or gives; estimates and reports go by the role."""
    signs = {
        "encoder": "pixel_values" in stage.inputs,
        "embed": "input_ids" in stage.inputs,
        "pruner": "keep_indices" in stage.outputs,
        "decoder": "logits" in stage.outputs,
    }
    for role, has in signs.items():
        _agree(has == (stage.role == role), f"stage {stage.name} does not do what its role {stage.role} says")


def _check_flow(manifest: Manifest, keep: int) -> None:
    """Every pipeline tensor is there before a stage reads it, and what the pipeline reads comes out."""
    known: set[str] = set()
    for when, given, wanted in (
        ("image", {"pixel_values", "reference_picture"}, set()),
        ("prefill", {"input_ids", "image_start", "text_length"}, {"logits", "next_position"}),
        ("step", {"input_ids", "position_ids"}, {"logits"}),
    ):
        known = given if when == "step" else known | given
        for stage in manifest.stages_for(when, keep):
            lacking = sorted(set(stage.inputs.values()) - known)
            _agree(not lacking, f"stage {stage.name} ({when}) reads {lacking} before any stage gives it")
            known = known | set(stage.outputs.values())
        _agree(wanted <= known, f"the {when} stages do not give {sorted(wanted)}")
    _agree(not (problem := unused_cache(manifest, keep)), problem)


def _agree(fits: bool, problem: str) -> None:
    if not fits:
        raise VtpError(f"manifest.json contradicts itself: {problem}; export the bundle again")
