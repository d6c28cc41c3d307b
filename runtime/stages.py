"""Walks a bundle's stages with one dictionary of named tensors. Names no family and no method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtp.engines import Binding, Engine, Value, VtpError
from vtp.runtime.bundle import Bundle
from vtp.runtime.manifest import GraphInfo, KvInfo, StageInfo, TensorInfo
from vtp.runtime.opening import Opening, open_stage
from vtp.runtime.result import Timings

# What image stages gave for one picture: (file, keep-count or None) -> pipeline name -> value.
Seen = dict[tuple[str, int | None], dict[str, Value]]


class KvCache:
    """One decoder stage's cache: a fixed buffer per layer, bound as past and as present.

    Nothing is copied or reallocated between steps; `length` tokens of `capacity` are filled.
    """

    def __init__(self, engine: Engine, info: KvInfo) -> None:
        if info.lengths != "seqlens_k":
            raise VtpError(
                f"the cache convention '{info.lengths}' is unknown to this runtime; update vtp-edge"
            )
        self.capacity = info.capacity
        self.length = 0
        shape = (1, info.heads, info.capacity, info.head_dim)
        slots = [f"{layer}.{part}" for layer in info.layers for part in ("key", "value")]
        buffers = {slot: engine.zeros(shape, info.dtype) for slot in slots}
        self._seqlens = engine.zeros((1,), "int32")
        self._total = engine.zeros((), "int32")
        self.feeds: dict[str, Value] = {
            **{f"past_key_values.{slot}": buffer for slot, buffer in buffers.items()},
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
        }
        self.into: dict[str, Value] = {f"present.{slot}": buffer for slot, buffer in buffers.items()}

    def reset(self) -> None:
        """Forget every token; the buffers stay as they are, for lengths bound what is read."""
        self.length = 0

    def advance(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises VtpError past the capacity, before anything is written."""
        if self.length + tokens > self.capacity:
            raise VtpError(
                f"{self.length + tokens} tokens exceed this bundle's cache of {self.capacity}; "
                "shorten the prompt, or export with a larger --max-length"
            )
        self.length += tokens
        self._seqlens.update(np.array([self.length - 1], np.int32))
        self._total.update(np.array(self.length, np.int32))


@dataclass
class Stage:
    """A stage ready to run: its declaration, its opened graph and, for decoders, its cache."""

    info: StageInfo
    graph: GraphInfo
    engine: Engine
    cache: KvCache | None

    def run(self, values: dict[str, Value]) -> None:
        """Run once, reading and writing `values` under the pipeline's names."""
        feeds, into = self._feeds(values), {}
        if self.cache is not None:
            self.cache.advance(self._sequence(feeds))
            feeds, into = {**feeds, **self.cache.feeds}, self.cache.into
        outputs = self.engine.run(feeds, into)
        for name, target in self.info.outputs.items():
            values[target] = outputs[name]

    def bind(self, values: dict[str, Value]) -> Binding:
        """Fix the stage for single steps: batch 1, one token; its outputs join `values`."""
        into: dict[str, Value] = dict(self.cache.into) if self.cache else {}
        for name, target in self.info.outputs.items():
            tensor = self.graph.outputs[name]
            into[name] = values[target] = self.engine.zeros(_single(tensor), tensor.dtype)
        for name in self.graph.outputs:
            if name not in into:  # a cue that only prefill reads
                tensor = self.graph.outputs[name]
                into[name] = self.engine.zeros(_single(tensor), tensor.dtype)
        feeds = {**self._feeds(values), **(self.cache.feeds if self.cache else {})}
        return self.engine.bind(feeds, into)

    def _feeds(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return {name: values[source] for name, source in self.info.inputs.items()}

    def _sequence(self, feeds: Mapping[str, Value]) -> int:
        """Tokens of this run: axis 1 of the stage's position_ids."""
        return feeds["position_ids"].shape[1]


def _single(tensor: TensorInfo) -> list[int]:
    """Shape of a tensor when every named axis (batch, sequence) has length 1."""
    return [size if isinstance(size, int) else 1 for size in tensor.shape]


class StageRunner:
    """All stages of an opened bundle: graphs opened once, one cache per decoder graph, bindings per keep."""

    def __init__(
        self, bundle: Bundle, engine: str, threads: int | None, opening: Opening | None = None
    ) -> None:
        self._bundle = bundle
        self._engine = engine
        self._threads = threads
        self._opening = opening
        self._engines: dict[str, Engine] = {}
        self._caches: dict[str, KvCache] = {}
        self._steps: dict[int, tuple[dict[str, Value], list[tuple[Stage, Binding]]]] = {}
        for file in sorted(bundle.manifest.graphs, key=self._bytes, reverse=True):
            self._open(file)

    @property
    def any_engine(self) -> Engine:
        """An engine that can make values for any stage: all of a bundle run on one device."""
        return next(iter(self._engines.values()))

    def dtype_of(self, name: str) -> str:
        """The dtype in which the first stage that reads a pipeline tensor wants it."""
        manifest = self._bundle.manifest
        for stage in manifest.stages:
            for tensor, source in stage.inputs.items():
                if source == name:
                    return manifest.graphs[stage.file].inputs[tensor].dtype
        raise VtpError(f"no stage of this bundle reads '{name}'; export the bundle again")

    def reset(self) -> None:
        """Start a new conversation."""
        for cache in self._caches.values():
            cache.reset()

    def run(
        self, when: str, keep: int, values: dict[str, Value], timings: Timings, seen: Seen | None = None
    ) -> None:
        """Run the stages of one moment in order, timing each under its name.

        Where `seen` holds what a stage gave before, it is taken from there; else it is put there.
        """
        owner = None  # from a stage of one keep-count on, everything belongs to that keep-count
        for stage in self._stages(when, keep):
            owner = owner or stage.info.keep
            known = seen.get((stage.info.file, owner)) if seen is not None else None
            with timings.measure(stage.info.name):
                if known is None:
                    stage.run(values)
                else:
                    values.update(known)
            if seen is not None:
                seen[stage.info.file, owner] = {name: values[name] for name in stage.info.outputs.values()}

    def prefill(
        self,
        keep: int,
        pixels: np.ndarray,
        ids: Sequence[int],
        image_start: int,
        timings: Timings,
        seen: Seen | None = None,
    ) -> dict[str, Value]:
        """Start a new conversation: image stages on pixel_values [1,3,H,W], then prompt stages on the ids.

        Returns every tensor that flowed, by the pipeline's names: logits and next_position among them. `seen`
        is for the image stages, as in `run`.
        """
        self.reset()
        put, dtype = self.any_engine.put, self.dtype_of("pixel_values")
        values: dict[str, Value] = {"pixel_values": put(pixels.astype(dtype, copy=False))}
        self.run("image", keep, values, timings, seen)
        values["input_ids"] = put(np.array([ids], np.int64))
        values["image_start"] = put(np.array([image_start], np.int64))
        self.run("prefill", keep, values, timings)
        return values

    def step(self, keep: int, token: int, position: int) -> np.ndarray:
        """Feed one token at its position; returns the next logits float32 [V]."""
        values, bindings = self._step_bindings(keep)
        values["input_ids"].update(np.array([[token]], np.int64))
        numbers = values["position_ids"]  # a new token's position is the same number on every axis
        numbers.update(np.full(numbers.shape, position, np.int64))
        for stage, binding in bindings:
            if stage.cache is not None:
                stage.cache.advance(1)
            binding.run()
        return values["logits"].numpy()[0, 0]

    def room(self) -> int:
        """Tokens that still fit every cache."""
        return min((cache.capacity - cache.length for cache in self._caches.values()), default=0)

    def close(self) -> None:
        """Free every graph and cache."""
        self._steps.clear()
        self._caches.clear()
        for engine in self._engines.values():
            engine.close()

    def _stages(self, when: str, keep: int) -> list[Stage]:
        manifest = self._bundle.manifest
        return [
            Stage(info, manifest.graphs[info.file], self._engines[info.file], self._caches.get(info.file))
            for info in manifest.stages_for(when, keep)
        ]

    def _step_bindings(self, keep: int) -> tuple[dict[str, Value], list[tuple[Stage, Binding]]]:
        if keep not in self._steps:
            engine = self.any_engine
            values: dict[str, Value] = {
                "input_ids": engine.zeros((1, 1), "int64"),
                "position_ids": engine.zeros(self._numbers_shape(keep), "int64"),
            }
            self._steps[keep] = (
                values,
                [(stage, stage.bind(values)) for stage in self._stages("step", keep)],
            )
        return self._steps[keep]

    def _bytes(self, file: str) -> int:
        """Size of a graph's own weights. The largest is opened first, with nothing else in memory yet.

        While an engine packs a weight, it holds it twice: of a graph opened last, the largest weight (the
        embeddings, often a sixth of a model) would come on top of everything else.
        """
        data = self._bundle.manifest.files.get(f"{file}.data")
        return data.bytes if data else 0

    def _numbers_shape(self, keep: int) -> list[int]:
        """Shape of a step's position_ids: [1,1], or [1,1,A] for decoders that count along A axes."""
        for info in self._bundle.manifest.stages_for("step", keep):
            for name, source in info.inputs.items():
                if source == "position_ids":
                    return _single(self._bundle.manifest.graphs[info.file].inputs[name])
        raise VtpError("no step of this bundle reads 'position_ids'; export the bundle again")

    def _open(self, file: str) -> None:
        engine = open_stage(self._bundle, file, self._engine, self._threads, self._opening)
        graph = self._bundle.manifest.graphs[file]
        _compare(file, "input", graph.inputs, engine.inputs)
        _compare(file, "output", graph.outputs, engine.outputs)
        self._engines[file] = engine
        if graph.kv is not None:
            self._caches[file] = KvCache(engine, graph.kv)


def _compare(file: str, kind: str, said: Mapping[str, TensorInfo], found: Mapping[str, object]) -> None:
    """Hold a graph's tensors against the manifest's words about them."""
    if set(said) != set(found):
        odd = sorted(set(said) ^ set(found))[0]
        raise VtpError(f"{file} and the manifest disagree about {kind} '{odd}'; export the bundle again")
    for name, info in said.items():
        spec = found[name]
        if spec.dtype != info.dtype or list(spec.shape) != list(info.shape):  # type: ignore[attr-defined]
            raise VtpError(
                f"{file}: {kind} '{name}' is {spec.dtype}{list(spec.shape)}, "  # type: ignore[attr-defined]
                f"the manifest says {info.dtype}{info.shape}; export the bundle again"
            )
