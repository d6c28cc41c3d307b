"""A bundle's layers judged on what flows through them, and the bundle written with fewer bits.

A layer whose rounding error is loud beside its output (measured with the user's own pictures and prompts)
stays in float, as does one whose int4 weight would be stored beside its float self.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vtp.calib.data import Sample
from vtp.calib.quantize.layers import (
    Change,
    DynamicInt8,
    Int4,
    Int8,
    Layer,
    find_layers,
    load_graph,
    read_apart,
    rewrite,
    weight_of,
)
from vtp.calib.quantize.observe import Sights, observe
from vtp.calib.quantize.prompts import prompt_changes, prompt_file, reads_one_row, with_prompt_graphs
from vtp.calib.quantize.rounding import INT8, Range, decibels, int8_channels
from vtp.calib.quantize.weight_store import Store, place_of
from vtp.calib.workers.local import Workers
from vtp.engines import VtpError
from vtp.runtime.bundle.folder import MANIFEST, Bundle, describe_files
from vtp.runtime.bundle.manifest import TOKENIZER, Manifest

INT8_STATIC, INT8_DYNAMIC, INT4_WEIGHTS = "int8", "dynamic int8", "int4"  # what a layer may become
# Below these ratios of signal to rounding noise a layer stays in float. Weights of a normal distribution give
# about 20 dB in int4 and 40 dB in int8; what is 8 or 15 dB worse has outliers that its scale cannot hold.
QUIET = {INT8_STATIC: 25.0, INT8_DYNAMIC: 25.0, INT4_WEIGHTS: 12.0}
_COLUMNS = 512  # of a weight, by which an int4 layer is judged


@dataclass(frozen=True)
class Wish:
    """What to make: int8 (or none) for vision encoder and projector, int4, int8 (or none) for the decoder.

    prompt       "int8": a second decoder graph, by which prompts are read; "decoder": there is none
    block        weights that share a scale, int4
    activations  "int8" or "uint8" (the same numbers around 128); "auto": what the bundle's engine is fast in
    head         "float" leaves a head tied to the embedding alone; "int4" stores it beside the embedding's
                 float rows: a sixth more bytes on the disk, a seventh of the bytes read at every step; "int8"
                 is a quarter, and a quarter
    nearest      int4 by plain rounding (see `nearest_blocks`), for comparisons with others' codes
    """

    vision: str
    decoder: str
    block: int = 32
    activations: str = "auto"
    head: str = "float"
    nearest: bool = False
    prompt: str = "decoder"


@dataclass(frozen=True)
class Judged:
    """A layer, what it would become, its signal-to-noise ratio in dB, and why it stays in float, if so."""

    layer: Layer
    bits: str
    decibels: float
    left: str = ""


class Quantizer:
    """One bundle on its way to fewer bits: observe, judge, then write as often as needed."""

    def __init__(self, bundle: Bundle, wish: Wish) -> None:
        self.bundle, self.wish = bundle, wish
        manifest = bundle.manifest
        self._bits = _bits_of(manifest, wish)
        self._layers = {
            file: find_layers(load_graph(bundle.path(file)), file) if file in self._bits else []
            for file in manifest.graphs
        }
        if not any(self._layers.values()):
            raise VtpError("this bundle has no layer to quantise: its graphs hold no constant matrix")
        self._seen: Sights = {}
        self.judged: list[Judged] = []
        self._in_prompts: dict[str, float] = {}  # label -> dB of layers that prompts may read in int8

    def observe(
        self,
        folder: Path,
        samples: Sequence[Sample],
        engine: str,
        threads: int | None,
        progress: Callable[[str], None],
        workers: Workers | None = None,
    ) -> None:
        """Run the samples and judge every layer by them. `folder` must not exist; it is removed again."""
        full, summed = self._of(INT8_STATIC), [*self._of(INT4_WEIGHTS), *self._of(INT8_DYNAMIC)]
        keep = self.bundle.manifest.visual.default_keep
        try:
            self._seen = observe(
                self.bundle, folder, full, summed, samples, keep, engine, threads, progress, workers
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        progress("judge the layers")
        shared = self._shared_with_float()
        for file, layers in self._layers.items():
            model = load_graph(self.bundle.path(file)) if layers else None
            for layer in layers:
                assert model is not None
                self.judged.append(self._judge(layer, model, shared))
                if self._prompts_apart and self.judged[-1].bits == INT4_WEIGHTS:
                    self._judge_prompt(self.judged[-1], model)

    def worst(self, share: float) -> set[str]:
        """Labels of the noisiest `share` of the layers, those left in float already included."""
        order = sorted(self.judged, key=lambda one: (not one.left, one.decibels))
        return {one.layer.label for one in order[: round(share * len(order))]}

    def write(self, folder: Path, also_left: set[str]) -> Manifest:
        """Write the bundle into `folder`, which must hold none; returns its manifest, still unmeasured.

        also_left  labels of layers that stay in float beside those judged to
        """
        source = self.bundle.folder
        store, plan = Store(source, folder), self._plan(also_left)
        apart = read_apart(plan.values())
        for file in self.bundle.manifest.graphs:
            model = load_graph(self.bundle.path(file))
            rewrite(model, plan.get(file, []), store, file, apart)
            onnx.save(model, folder / file)
        prompts = {file: prompt_file(file) for file in self._decoders} if self._prompts_apart else {}
        for file, made in prompts.items():
            model = load_graph(self.bundle.path(file))
            rewrite(model, self._for_prompts(plan.get(file, [])), store, made, apart)
            onnx.save(model, folder / made)
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
        manifest = dataclasses.replace(
            with_prompt_graphs(self.bundle.manifest, prompts),
            files=describe_files(folder),
            parity={"mode": "not measured"},
            calibration={},  # its times are of the float graphs
            quantization=self.record(also_left),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def record(self, also_left: set[str]) -> dict[str, Any]:
        """What the manifest says of the layers."""
        left = {one.layer.label: one.left for one in self.judged if one.left}
        left |= {label: "accuracy fell with it" for label in also_left if label not in left}
        made = {
            one.layer.label: {"to": one.bits, "db": round(one.decibels, 1)}
            for one in self.judged
            if one.layer.label not in left
        }
        prompts = {}
        if self._prompts_apart:
            prompts = {"prompt": self.wish.prompt, "in_prompts": self._told_prompts(also_left)}
        return {
            "vision": self.wish.vision,
            "decoder": self.wish.decoder,
            **prompts,
            "int8": f"static, symmetric, per output channel; activations {self.activations}",
            "int4": f"weights only, symmetric, blocks of {self.wish.block} inputs",
            "dynamic int8": "symmetric, per output channel; activations per row, while the graph runs",
            "layers": made,
            "left_in_float": left,
        }

    def _for_prompts(self, changes: Sequence[Change]) -> list[Change]:
        return prompt_changes(changes, lambda layer: layer.label in self._in_prompts)

    def _told_prompts(self, also_left: set[str]) -> dict[str, Any]:
        """Label -> what prompts read a layer in, and how loud that is: those in int8 alone."""
        made = [one for changes in self._plan(also_left).values() for one in self._for_prompts(changes)]
        labels = [one.layer.label for one in made if isinstance(one, DynamicInt8)]
        return {label: {"to": INT8_DYNAMIC, "db": round(self._in_prompts[label], 1)} for label in labels}

    @property
    def activations(self) -> str:
        """uint8 around 128 where ONNX Runtime's x86 kernels will run it, else int8, which TensorRT wants."""
        manifest = self.bundle.manifest
        if self.wish.activations != "auto":
            return self.wish.activations
        return "uint8" if (manifest.target, manifest.dtype) == ("ort", "float32") else "int8"

    def _of(self, bits: str) -> list[Layer]:
        return [
            layer for file, group in self._layers.items() if self._bits.get(file) == bits for layer in group
        ]

    def _plan(self, also_left: set[str]) -> dict[str, list[Change]]:
        plan: dict[str, list[Change]] = {}
        for one in self.judged:
            if not one.left and one.layer.label not in also_left:
                plan.setdefault(one.layer.file, []).append(self._change(one))
        return plan

    def _change(self, one: Judged) -> Change:
        layer = one.layer
        if one.bits == INT8_STATIC:
            return Int8(layer, self._range(layer), self.activations, self.bundle.manifest.target)
        return DynamicInt8(layer) if one.bits == INT8_DYNAMIC else self._int4(layer)

    def _int4(self, layer: Layer) -> Int4:
        target = self.bundle.manifest.target
        return Int4(layer, self._energy(layer), self.wish.block, target, self.wish.nearest)

    def _range(self, layer: Layer) -> Range:
        return self._seen[layer.file, layer.source].range

    def _energy(self, layer: Layer) -> np.ndarray:
        """Squares of what meets the weight, wherever it is used: so its codes are the same everywhere."""
        users = [other for other in self._of(INT4_WEIGHTS) if other.place == layer.place]
        seen = [self._seen[other.file, other.source].energy for other in users]
        return np.sum([energy for energy in seen if energy is not None], axis=0)

    def _judge(self, layer: Layer, model: onnx.ModelProto, shared: set[Any]) -> Judged:
        bits = self._bits[layer.file]
        block = self.wish.block
        if layer.place in shared and (bits == INT8_STATIC or self.wish.head == "float"):
            return Judged(
                layer, bits, 0.0, "its weight is also used in float, by which it is not stored twice"
            )
        if bits == INT4_WEIGHTS and self.bundle.manifest.target != "ort" and layer.shape[0] % block:
            return Judged(layer, bits, 0.0, f"its {layer.shape[0]} inputs are not a multiple of {block}")
        if (layer.file, layer.source) not in self._seen:
            return Judged(layer, bits, 0.0, "no prompt ran through it")
        weight = weight_of(layer, model, self.bundle.folder)
        loudness = {
            INT8_STATIC: self._loudness8,
            INT8_DYNAMIC: self._loudness_by_row,
            INT4_WEIGHTS: self._loudness4,
        }
        ratio = loudness[bits](layer, weight)
        loud = f"{ratio:.1f} dB, below {QUIET[bits]:g}" if ratio < QUIET[bits] else ""
        return Judged(layer, bits, ratio, loud)

    def _judge_prompt(self, one: Judged, model: onnx.ModelProto) -> None:
        """Note an int4 layer that prompts may read in int8: no louder than int4 is, or than int8 may be."""
        if one.left or reads_one_row(one.layer, model):
            return
        ratio = self._loudness_by_row(one.layer, weight_of(one.layer, model, self.bundle.folder))
        if ratio >= min(one.decibels, QUIET[INT8_DYNAMIC]):
            self._in_prompts[one.layer.label] = ratio

    def _loudness8(self, layer: Layer, weight: np.ndarray) -> float:
        """Signal to noise of the layer's product, on rows kept from all pictures."""
        seen = self._seen[layer.file, layer.source]
        rows, step = np.concatenate(seen.rows), seen.range.scale(INT8)
        codes, scales = int8_channels(np.asarray(weight, np.float32))
        rounded = np.clip(np.rint(rows / step), -INT8 - 1, INT8) * step
        product = rows @ np.asarray(weight, np.float32)
        noise = product - rounded @ (codes * scales)
        return decibels(float(np.square(product).sum()), float(np.square(noise).sum()))

    def _loudness4(self, layer: Layer, weight: np.ndarray) -> float:
        """The same from sums of squares, taking the inputs as uncorrelated, on some columns."""
        part, times = _some_columns(layer, weight)
        made = self._int4(layer).blocks(part).weight(layer.shape[0])
        return self._decibels(layer, times * self._noise_of(layer, part - made))

    def _loudness_by_row(self, layer: Layer, weight: np.ndarray) -> float:
        """The same of dynamic int8. What rounds to zero is counted like the rest, so it is at least this.

        A row's codes are off by a step of the row's largest magnitude / 127, evenly up to half of one.
        """
        part, times = _some_columns(layer, weight)
        codes, scales = int8_channels(part)
        made = codes * scales
        rounded = self._seen[layer.file, layer.source].peaks / INT8**2 / 12
        of_rows = rounded * float(np.square(made).sum())
        return self._decibels(layer, times * (self._noise_of(layer, part - made) + of_rows))

    def _noise_of(self, layer: Layer, off: np.ndarray) -> float:
        """What an error [K,n] of a weight adds to its product, squared and summed."""
        return float((self._seen[layer.file, layer.source].energy @ np.square(off)).sum())

    def _decibels(self, layer: Layer, noise: float) -> float:
        return decibels(self._seen[layer.file, layer.output].signal, noise)

    @property
    def _decoders(self) -> list[str]:
        """Graphs that take both prompts and steps, on a cache."""
        return [file for file, bits in self._bits.items() if bits == INT4_WEIGHTS]

    @property
    def _prompts_apart(self) -> bool:
        return self.wish.prompt == "int8" and self.wish.decoder == "int4"

    def _shared_with_float(self) -> set[Any]:
        """Places of weights that something else than a layer to be quantised reads as well."""
        uses: Counter[Any] = Counter()
        for file in self.bundle.manifest.graphs:
            for item in load_graph(self.bundle.path(file)).graph.initializer:
                place = place_of(item)
                if place is not None:
                    uses[place] += 1
        ours: Counter[Any] = Counter()
        for layers in self._layers.values():
            ours.update(place for _, place in {(layer.weight, layer.place) for layer in layers})
        return {place for place, count in ours.items() if uses[place] > count}


def _some_columns(layer: Layer, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Evenly spread columns of a weight, float32, and how many times as many it has."""
    part = np.asarray(weight[:, :: -(-layer.shape[1] // _COLUMNS)], np.float32)
    return part, layer.shape[1] / part.shape[1]


def _bits_of(manifest: Manifest, wish: Wish) -> dict[str, str]:
    """Graph file -> what its layers become. Pruners and splices stay as they are."""
    bits: dict[str, str] = {}
    decoder = {"int8": INT8_DYNAMIC, "int4": INT4_WEIGHTS}.get(wish.decoder, "none")
    for stage in manifest.stages:
        if manifest.graphs[stage.file].kv is not None:
            bits[stage.file] = decoder
        elif stage.when == "image" and stage.role != "pruner":
            bits[stage.file] = wish.vision
    return {file: kind for file, kind in bits.items() if kind != "none"}
