"""What flows through a bundle's layers on a user's own questions, kept in constant memory.

The bundle is copied beside itself with more outputs: what goes into every layer, or sums of its squares. The
pipeline's own stages then run the prompts, so that every layer sees what it will see in use.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vtp.calib.data import Sample
from vtp.calib.quantize.layers import Layer, load_graph
from vtp.calib.quantize.rounding import Range
from vtp.calib.workers.local import Job, Local, Workers
from vtp.engines import VtpError, open_graph
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import TOKENIZER, StageInfo, TensorInfo
from vtp.runtime.media.images import load_image
from vtp.runtime.media.videos import load_video
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

_ROWS = 256  # rows of a layer's input that are kept to judge it by
_SIGN = "observed:"


@dataclass
class Seen:
    """What went into a layer.

    range   of its magnitudes; rows float32 [R,K], R at most 256, evenly from all pictures (int8 layers)
    energy  sums of squares [K] of what went in; signal: of what came out (int4 layers)
    peaks   sum of the squares of every row's largest magnitude (layers whose rows have a scale of their own)
    """

    range: Range = field(default_factory=Range)
    rows: list[np.ndarray] = field(default_factory=list)
    energy: np.ndarray | None = None
    signal: float = 0.0
    peaks: float = 0.0

    def merge(self, later: Seen) -> None:
        """Add what was seen after this; sums of floats and the rows' order want the data's order."""
        self.range.merge(later.range)
        self.rows.extend(later.rows)
        if later.energy is not None:
            self.energy = later.energy if self.energy is None else self.energy + later.energy
            self.signal = float(self.energy.sum())
        self.peaks += later.peaks


Sights = dict[tuple[str, str], Seen]  # by (graph file, tensor)


@dataclass(frozen=True)
class Tap:
    """An output added to a graph, of a tensor with `columns` K.

    kind  "rows": the tensor itself as [R,K]; "sum": its squares summed over rows [K]; "peaks": the squares of
          its rows' largest magnitudes, summed [1]
    """

    tensor: str
    columns: int
    kind: str

    @property
    def name(self) -> str:
        """Of the output."""
        return f"{_SIGN}{self.kind}:{self.tensor}"

    @property
    def shape(self) -> list[int | str]:
        """Of the output, as the graph declares it."""
        if self.kind == "rows":
            return [f"{self.name} rows", self.columns]
        return [self.columns if self.kind == "sum" else 1]


def taps_of(layer: Layer, summed: bool) -> list[Tap]:
    """What to look at for a layer: its input's rows, or energy of input and output and the rows' peaks."""
    if not summed:
        return [Tap(layer.source, layer.shape[0], "rows")]
    into = [Tap(layer.source, layer.shape[0], kind) for kind in ("sum", "peaks")]
    return [*into, Tap(layer.output, layer.shape[1], "sum")]


@dataclass(frozen=True)
class Watch(Job[tuple[Path, str], Sights]):
    """A probe that runs one question, (picture, prompt), at a time and tells what flowed through its taps."""

    probe: Bundle
    taps: dict[str, list[Tap]]
    keep: int
    rows: int  # of an input that are kept from one question
    engine: str
    threads: int | None
    pictures: tuple[Path, ...]

    def files(self) -> Sequence[Path]:
        """The probe's graphs and weights, and the pictures."""
        return [*(self.probe.path(file) for file in self.probe.manifest.files), *self.pictures]

    @contextmanager
    def open(self) -> Iterator[Callable[[tuple[Path, str]], Sights]]:
        """The pipeline's own stages."""
        prompter = Prompter(self.probe.manifest.text, self.probe.path(TOKENIZER))
        with closing(StageRunner(self.probe, self.engine, self.threads)) as runner:
            yield partial(self._see, runner, prompter)

    def _see(self, runner: StageRunner, prompter: Prompter, question: tuple[Path, str]) -> Sights:
        image, text = question
        prompt = prompter.encode(prompter.messages_for(text))
        spec = self.probe.manifest.image
        looked_at = load_image(image) if spec.frames is None else load_video(image, spec.frames)
        pixels = preprocess(looked_at, spec)
        values = runner.prefill(self.keep, pixels, prompt.ids, prompt.image_start, Timings())
        found: Sights = {}
        for file, taps in self.taps.items():
            for tap in taps:
                value = values.get(f"{file}:{tap.name}")
                if value is not None:
                    seen = _finite(value.numpy(), f"{file} at {shown(tap.tensor)}", image)
                    _note(found.setdefault((file, tap.tensor), Seen()), tap, seen, self.rows)
        return found


def observe(
    bundle: Bundle,
    folder: Path,
    full: Sequence[Layer],
    summed: Sequence[Layer],
    samples: Sequence[Sample],
    keep: int,
    engine: str,
    threads: int | None,
    progress: Callable[[str], None],
    workers: Workers | None = None,
) -> Sights:
    """Run the samples' prompts; returns what was seen by (graph file, tensor).

    full     layers whose inputs are looked at value by value; summed: those of which sums of squares do
    folder   an empty one on the bundle's disk, for the copy with more outputs
    workers  who runs them (default: this process); the result is the same
    """
    taps: dict[str, dict[str, Tap]] = {}
    for layers, is_summed in ((full, False), (summed, True)):
        for layer in layers:
            taps.setdefault(layer.file, {}).update({tap.name: tap for tap in taps_of(layer, is_summed)})
    wanted = {file: list(found.values()) for file, found in taps.items()}
    probe = _probe(bundle, folder.absolute(), wanted, engine, threads)
    questions = [(sample.image.absolute(), sample.prompt) for sample in samples]
    pictures = tuple(image for image, _ in questions)
    watch = Watch(probe, wanted, keep, max(1, _ROWS // len(samples)), engine, threads, pictures)
    progress(f"calibrate on {len(samples)} pictures")
    workers = workers or Local()
    found: Sights = {}
    for sights in workers.run(watch, questions):
        for place, seen in sights.items():
            found.setdefault(place, Seen()).merge(seen)
    workers.release()  # the probe's files go now
    return found


def _finite(values: np.ndarray, place: str, image: Path) -> np.ndarray:
    """What was seen somewhere of one picture; VtpError where it tells nothing, for arithmetic broke."""
    if not np.isfinite(values).all():
        raise VtpError(
            f"{place} gives values that are NaN or infinite for the picture {shown(image)}, and by such "
            "nothing can be rounded; leave the picture out, or export the bundle with --dtype float32"
        )
    return values


def _note(seen: Seen, tap: Tap, values: np.ndarray, rows: int) -> None:
    if tap.kind == "sum":
        seen.energy, seen.signal = values, float(values.sum())
        return
    if tap.kind == "peaks":
        seen.peaks = float(values[0])
        return
    seen.range.add(values)
    seen.rows.append(values[np.linspace(0, len(values) - 1, min(rows, len(values))).astype(int)])


def _probe(
    bundle: Bundle, folder: Path, taps: dict[str, list[Tap]], engine: str, threads: int | None
) -> Bundle:
    """A copy of the bundle, sharing its weights, whose graphs have these outputs as well."""
    folder.mkdir()
    manifest = bundle.manifest
    for name in manifest.files:
        if name not in taps:
            _link(bundle.path(name), folder / name)
    for file, wanted in taps.items():
        model = load_graph(bundle.path(file))
        for tap in wanted:
            _add(model, tap)
        onnx.save(model, folder / file)
    graphs = dict(manifest.graphs)
    for file, wanted in taps.items():
        more = _infos(folder / file, wanted, engine, threads)
        graphs[file] = dataclasses.replace(graphs[file], outputs={**graphs[file].outputs, **more})
    stages = [_named(stage, taps.get(stage.file, [])) for stage in manifest.stages]
    return Bundle(folder, dataclasses.replace(manifest, graphs=graphs, stages=stages))


def _link(source: Path, target: Path) -> None:
    """The same file at another place; a copy where the disk or its rules allow no second name."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _infos(file: Path, taps: Sequence[Tap], engine: str, threads: int | None) -> dict[str, TensorInfo]:
    """What the manifest says of the taps: rows are a number where the engine finds their count fixed."""
    if all(tap.kind != "rows" for tap in taps):
        return {tap.name: TensorInfo("float32", tap.shape) for tap in taps}
    found = open_graph(file, engine, threads).outputs
    return {tap.name: TensorInfo("float32", list(found[tap.name].shape)) for tap in taps}


def _named(stage: StageInfo, taps: Sequence[Tap]) -> StageInfo:
    """A stage that also gives its taps; not at single steps, which calibration does not run."""
    if stage.when == "step":
        return stage
    more = {tap.name: f"{stage.file}:{tap.name}" for tap in taps}
    return dataclasses.replace(stage, outputs={**stage.outputs, **more})


def _add(model: onnx.ModelProto, tap: Tap) -> None:
    """Nodes from a tensor to the tap's output, in float32: squares of float16 would overflow."""
    graph, name = model.graph, tap.name
    shape = numpy_helper.from_array(np.array([-1, tap.columns], np.int64), f"{name}:shape")
    graph.initializer.append(shape)
    wide, rows = f"{name}:float32", name if tap.kind == "rows" else f"{name}:rows"
    graph.node.append(helper.make_node("Cast", [tap.tensor], [wide], wide, to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Reshape", [wide, shape.name], [rows], rows))
    if tap.kind == "peaks":
        graph.initializer.append(numpy_helper.from_array(np.ones(1, np.int64), f"{name}:columns"))
        graph.node.append(helper.make_node("Abs", [rows], [f"{name}:sizes"], f"{name}:sizes"))
        rows, sizes = f"{name}:peaks", [f"{name}:sizes", f"{name}:columns"]
        graph.node.append(helper.make_node("ReduceMax", sizes, [rows], rows, keepdims=1))
    if tap.kind != "rows":
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), f"{name}:axes"))
        graph.node.append(
            helper.make_node("ReduceSumSquare", [rows, f"{name}:axes"], [name], name, keepdims=0)
        )
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tap.shape))
