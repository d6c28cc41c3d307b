"""Walks a bundle's stages with one dictionary of named tensors. Names no family and no method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtp.engines import Binding, Engine, Held, Value, VtpError
from vtp.engines.tensorrt.library import LIBRARIES
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import GraphInfo, KvInfo, StageInfo, TensorInfo
from vtp.runtime.opening import Opening, open_stage
from vtp.runtime.result import Timings
from vtp.runtime.stages.prefix_cache import Prefix, Seen, StageKey, note, recall, rest_of, rows_of


def _go_on() -> None:
    """The check of work that nothing ends early."""


_PADDING = 0  # an id that stands where a row has no token: what is there is never looked at


class KvCache:
    """One decoder stage's cache: a fixed buffer per layer, bound as past and as present.

    Nothing is copied or reallocated between steps; of every row, `lengths` int32 [B] tokens of `capacity`
    are filled, `length` of the longest. `resize` makes it one of another batch.
    """

    feeds: dict[str, Value]
    into: dict[str, Value]
    _held: Held | None

    def __init__(self, engine: Engine, info: KvInfo, batch: int = 1) -> None:
        if info.lengths != "seqlens_k":
            raise VtpError(
                f"the cache convention '{info.lengths}' is unknown to this runtime; update vtp-edge"
            )
        self.capacity = info.capacity
        self._engine = engine
        self._info = info
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Empty buffers for a batch of so many rows, in the place of those before."""
        self._held = None  # before new buffers are made: two sets may be too much
        self.feeds, self.into = {}, {}
        info, zeros = self._info, self._engine.zeros
        shape = (batch, info.heads, info.capacity, info.head_dim)
        slots = [f"{layer}.{part}" for layer in info.layers for part in ("key", "value")]
        buffers = {slot: zeros(shape, info.dtype) for slot in slots}
        self._seqlens = zeros((batch,), "int32")
        self._total = zeros((), "int32")
        self.feeds = {
            **{f"past_key_values.{slot}": buffer for slot, buffer in buffers.items()},
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
        }
        self.into = {f"present.{slot}": buffer for slot, buffer in buffers.items()}
        self._held = self._engine.hold(self.feeds, self.into)
        self.reset()

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run the engine on the cache, with what else it reads; `advance` comes first."""
        assert self._held is not None  # held since the last `resize`
        return self._held.run(feeds)

    def reset(self) -> None:
        """Forget every token; the buffers stay as they are, for lengths bound what is read."""
        self.lengths = np.zeros(self._seqlens.shape, np.int32)
        self.length = 0

    def go_on(self, tokens: int) -> None:
        """Count only the first `tokens` of every row as filled."""
        self.lengths, self.length = np.full_like(self.lengths, tokens), tokens

    def advance(self, tokens: int | np.ndarray) -> None:
        """Make room for `tokens` more, or int32 [B] for every row its own.

        A row with 0 stays as long as it is, and its next token takes the place of its last. Raises VtpError
        past the capacity, before anything is written.
        """
        lengths = self.lengths + tokens
        longest = int(lengths.max())
        if longest > self.capacity:
            raise VtpError(
                f"{longest} tokens exceed this bundle's cache of {self.capacity}; "
                "shorten the prompt, or export with a larger --max-length"
            )
        self.lengths, self.length = lengths, longest
        self._seqlens.update(lengths - 1)
        self._total.update(np.array(longest, np.int32))


@dataclass
class Stage:
    """A stage ready to run: its declaration, its opened graph and, for decoders, its cache.

    `prefix` knows what fills the cache, where prompts are read on from what they share with the last one.
    """

    info: StageInfo
    graph: GraphInfo
    engine: Engine
    cache: KvCache | None
    prefix: Prefix | None = None

    def run(self, values: dict[str, Value], padding: int | np.ndarray = 0) -> None:
        """Run once, reading and writing `values` under the pipeline's names.

        Of every row [B] the last `padding` tokens are none.
        """
        feeds = self.feeds(values)
        if self.cache is None:
            outputs = self.engine.run(feeds)
        else:
            if self.prefix is not None:
                self.cache.go_on(known := self.prefix.begin(feeds))
                feeds = rest_of(feeds, known, self.engine)
            self.cache.advance(self._sequence(feeds) - padding)
            outputs = self.cache.run(feeds)
            self.note(feeds)
        for name, target in self.info.outputs.items():
            values[target] = outputs[name]

    def note(self, feeds: Mapping[str, Value]) -> None:
        """Tell the prefix, if there is one, what has joined the cache."""
        if self.prefix is not None:
            self.prefix.add(feeds)

    def bind(self, values: dict[str, Value], batch: int = 1) -> Binding:
        """Fix the stage for single steps of one token a row; its outputs join `values`."""
        into: dict[str, Value] = dict(self.cache.into) if self.cache else {}
        for name, target in self.info.outputs.items():
            tensor = self.graph.outputs[name]
            into[name] = values[target] = self.engine.zeros(_single(tensor, batch), tensor.dtype)
        for name in self.graph.outputs:
            if name not in into:  # a cue that only prefill reads
                tensor = self.graph.outputs[name]
                into[name] = self.engine.zeros(_single(tensor, batch), tensor.dtype)
        feeds = {**self.feeds(values), **(self.cache.feeds if self.cache else {})}
        return self.engine.bind(feeds, into)

    def bind_whole(self, feeds: Mapping[str, Value]) -> Binding | None:
        """Fix the stage for runs on these very inputs; None where theirs do not tell its outputs' sizes."""
        sizes = {
            axis: size
            for name, value in feeds.items()
            for axis, size in zip(self.graph.inputs[name].shape, value.shape, strict=True)
        }
        into = {}
        for name, tensor in self.graph.outputs.items():
            shape = [axis if isinstance(axis, int) else sizes.get(axis) for axis in tensor.shape]
            if None in shape:
                return None
            into[name] = self.engine.zeros([size for size in shape if size is not None], tensor.dtype)
        return self.engine.bind(feeds, into)

    def feeds(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What the graph takes beside its cache, by its own names."""
        return {name: values[source] for name, source in self.info.inputs.items()}

    def _sequence(self, feeds: Mapping[str, Value]) -> int:
        """Tokens of this run: axis 1 of the stage's position_ids."""
        return feeds["position_ids"].shape[1]


def _single(tensor: TensorInfo, batch: int) -> list[int]:
    """Shape of a step's output: the batch comes first, and every other named axis has length 1."""
    first, *rest = [size if isinstance(size, int) else 1 for size in tensor.shape]
    return [first if isinstance(tensor.shape[0], int) else batch, *rest]


@dataclass(frozen=True)
class Row:
    """One prompt of a batch: its ids [T], and where in them its pictures' places begin, ascending."""

    ids: Sequence[int]
    image_starts: Sequence[int]


class StageRunner:
    """All stages of an opened bundle: graphs opened once, one cache per decoder graph, bindings per keep."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        threads: int | None,
        opening: Opening | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self._bundle = bundle
        self._prefix = prefix
        self._engine = engine
        self._threads = threads
        self._opening = opening or Opening()
        self._engines: dict[str, Engine] = {}
        self._caches: dict[str, KvCache] = {}
        self._batch = 1
        self._closed = False
        self._steps: dict[int, tuple[dict[str, Value], list[tuple[Stage, Binding]]]] = {}
        # Of image stages that are replayed: pixel_values by shape; bindings by graph and inputs.
        self._pixels: dict[tuple[int, ...], Value] = {}
        self._whole: dict[tuple[str, tuple[int, ...]], Binding | None] = {}
        image = self._opening.image
        stages = [stage for stage in bundle.manifest.stages if image is None or stage.when != "image"]
        for file in sorted(dict.fromkeys(stage.file for stage in stages), key=self._bytes, reverse=True):
            self._open(file)

    @property
    def any_engine(self) -> Engine:
        """An engine that can make values for any stage: all of a bundle run on one device."""
        return next(iter(self._engines.values()))

    @property
    def notes(self) -> list[str]:
        """What engines could not do as asked, a line each."""
        return [note for engine in self._engines.values() for note in engine.notes]

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
        self,
        when: str,
        keep: int,
        values: dict[str, Value],
        timings: Timings,
        seen: Sequence[Seen] | None = None,
        padding: int | np.ndarray = 0,
        check: Callable[[], None] = _go_on,
    ) -> None:
        """Run the stages of one moment in order, timing each under its name.

        Where `seen`, an entry for each picture, holds what a stage gave before, it is taken from there; else
        it is put there. `padding` [B] is how many tokens at the end of every row are none. `check` is called
        before each stage, and may raise to end the run there.
        """
        owner = None  # from a stage of one keep-count on, everything belongs to that keep-count
        for stage in self._stages(when, keep):
            check()
            owner = owner or stage.info.keep
            name, key, put = stage.info.name, (stage.info.file, owner), self.any_engine.put
            with timings.measure(name):
                known = None if seen is None else recall(seen, key, put)
                if known is not None:
                    values.update(known)
                    timings.reused_stages += [name] if name not in timings.reused_stages else []
                    continue
                stage.run(values, padding)
                if seen is not None:
                    note(seen, key, {to: values[to] for to in stage.info.outputs.values()}, put)

    def prefill(
        self,
        keep: int,
        pixels: np.ndarray,
        ids: Sequence[int],
        image_start: int,
        timings: Timings,
    ) -> dict[str, Value]:
        """Start a new conversation about one picture: see `prefill_rows`."""
        return self.prefill_rows(keep, [pixels], [Row(ids, [image_start])], timings)

    def prefill_rows(
        self,
        keep: int,
        pictures: Sequence[np.ndarray],
        rows: Sequence[Row],
        timings: Timings,
        seen: Sequence[Seen] | None = None,
        check: Callable[[], None] = _go_on,
    ) -> dict[str, Value]:
        """Start new conversations: image stages on every picture, then prompt stages on all rows together.

        pictures  pixel_values of one picture each, in the order of the rows and of the places within them;
                  every row has the same number of them
        seen      for the image stages, as in `run`; what it holds is of these very pictures
        check     as in `run`

        Rows of unequal length are padded on the right. Returns every tensor that flowed, by the pipeline's
        names: logits [B,1,V] and next_position [B] among them.
        """
        self._hold(len(rows))
        lengths = np.array([len(row.ids) for row in rows], np.int32)
        padding = lengths.max() - lengths
        ids = [[*row.ids, *[_PADDING] * int(short)] for row, short in zip(rows, padding, strict=True)]
        values = self._see(keep, pictures, timings, seen, check)
        put = self.any_engine.put
        values["input_ids"] = put(np.array(ids, np.int64))
        values["image_start"] = put(np.array([row.image_starts for row in rows], np.int64))
        values["text_length"] = put(lengths.astype(np.int64))
        self.run("prefill", keep, values, timings, padding=padding, check=check)
        timings.reused_tokens = self._prefix.reused if self._prefix else 0
        if padding.any():  # graphs count it
            values["next_position"] = put(values["next_position"].numpy() - padding)
        return values

    def step(self, keep: int, token: int, position: int) -> np.ndarray:
        """Feed one token at its position; returns the next logits float32 [V]: see `step_rows`."""
        return self.step_rows(keep, [token], [position])[0]

    def step_rows(
        self,
        keep: int,
        tokens: Sequence[int],
        positions: Sequence[int] | np.ndarray,
        going: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feed one token a row at its position; returns the next logits float32 [B,V], which the step after
        that may overwrite.

        going  bool [B]: rows that go on; the others take up no more room, and their logits mean nothing
        """
        values, bindings = self._step_bindings(keep)
        values["input_ids"].update(np.array(tokens, np.int64)[:, None])
        numbers = np.empty(values["position_ids"].shape, np.int64)
        numbers.T[...] = positions  # a new token's position is the same number on every axis
        values["position_ids"].update(numbers)
        more = 1 if going is None else going.astype(np.int32)
        for stage, binding in bindings:
            if stage.cache is not None:
                stage.cache.advance(more)
            binding.run()
            if stage.cache is not None:
                stage.note(stage.feeds(values))
        return values["logits"].view()[:, 0]

    def room(self) -> int:
        """Tokens that still fit every cache, of the longest row; 0 without any."""
        return min((cache.capacity - cache.length for cache in self._caches.values()), default=0)

    def rooms(self) -> np.ndarray:
        """Tokens that still fit every cache, [B]; 0 without any."""
        left = [cache.capacity - cache.lengths for cache in self._caches.values()]
        return np.min(left, axis=0) if left else np.zeros(self._batch, np.int64)

    @property
    def pictures_together(self) -> int:
        """Most pictures that go through the image stages in one run; 1 where one makes up a whole batch."""
        stage = next(stage for stage in self._bundle.manifest.stages if stage.when == "image")
        return self._together(
            stage, [name for name, source in stage.inputs.items() if source == "pixel_values"]
        )

    @property
    def rows_together(self) -> int:
        """Most prompts that go through the prompt stages in one run."""
        stages = [stage for stage in self._bundle.manifest.stages if stage.when == "prefill"]
        return min(self._together(stage, stage.inputs) for stage in stages)

    def _together(self, stage: StageInfo, names: Iterable[str]) -> int:
        """How long the first axis of some inputs may be; TensorRT's engines are built for one."""
        graph = self._bundle.manifest.graphs[stage.file]
        axes = [graph.inputs[name].shape[0] for name in names]
        fixed = self._engine in LIBRARIES or not all(isinstance(axis, str) for axis in axes)
        return 1 if fixed else min(graph.axes[str(axis)][-1] for axis in axes)

    def check_open(self) -> None:
        """VtpError after `close`."""
        if self._closed:
            raise VtpError("this pipeline is closed; load the bundle again")

    def close(self) -> None:
        """Free every graph and cache."""
        self._closed = True
        self._steps.clear()
        self._whole.clear()
        self._pixels.clear()
        self._caches.clear()
        for engine in self._engines.values():
            engine.close()

    def _hold(self, batch: int) -> None:
        """Have empty caches for a batch of so many rows."""
        if batch != self._batch:
            self._steps.clear()  # bound to the buffers that go
            self._batch = 0  # of no size, should memory run out on the way
            for cache in self._caches.values():
                cache.resize(batch)
            self._batch = batch
        self.reset()

    def _see(
        self,
        keep: int,
        pictures: Sequence[np.ndarray],
        timings: Timings,
        seen: Sequence[Seen] | None,
        check: Callable[[], None],
    ) -> dict[str, Value]:
        """Run the image stages, on as many pictures at a time as they take."""
        put, dtype, most = self.any_engine.put, self.dtype_of("pixel_values"), self.pictures_together
        runs: list[tuple[list[int], dict[str, Value]]] = []
        for places in _together(len(pictures), most, seen):
            some = [pictures[place] for place in places]
            pixels = (some[0] if len(some) == 1 else np.concatenate(some)).astype(dtype, copy=False)
            check()
            if self._replaying and seen is None and len(pictures) <= most:
                return self._replay(keep, pixels, timings, check)
            values = {"pixel_values": put(pixels)}
            if self._opening.image is None:
                known = None if seen is None else [seen[place] for place in places]
                self.run("image", keep, values, timings, known, check=check)
            else:
                with timings.measure("image"):
                    given = self._opening.image(keep, values["pixel_values"].numpy())
                values.update({name: put(array) for name, array in given.items()})
            runs.append((places, values))
        return runs[0][1] if len(runs) == 1 else _in_order(runs, put)

    @property
    def _replaying(self) -> bool:
        """Whether image stages run at fixed places. What they give is overwritten by the next picture."""
        how = self._opening
        return how.cuda_graph and how.image is None and self._engine not in LIBRARIES

    def _replay(
        self, keep: int, pixels: np.ndarray, timings: Timings, check: Callable[[], None]
    ) -> dict[str, Value]:
        """Run the image stages on buffers that stay, each recorded at its first run (on CUDA)."""
        if pixels.shape not in self._pixels:
            self._pixels[pixels.shape] = self.any_engine.zeros(pixels.shape, str(pixels.dtype))
        values = {"pixel_values": self._pixels[pixels.shape]}
        values["pixel_values"].update(pixels)
        staying = True
        for stage in self._stages("image", keep):
            check()
            with timings.measure(stage.info.name):
                binding = self._bound(stage, values) if staying else None
                if binding is None:
                    staying = False  # nor do the inputs of those that follow
                    stage.run(values)
                    continue
                binding.run()
                values |= {target: binding.outputs[name] for name, target in stage.info.outputs.items()}
        return values

    def _bound(self, stage: Stage, values: Mapping[str, Value]) -> Binding | None:
        """The binding of a stage to inputs that stay: one for each graph and set of inputs."""
        feeds = stage.feeds(values)
        place = stage.info.file, tuple(map(id, feeds.values()))
        if place not in self._whole:
            self._whole[place] = stage.bind_whole(feeds)
        return self._whole[place]

    def _stages(self, when: str, keep: int) -> list[Stage]:
        manifest = self._bundle.manifest
        return [
            Stage(
                info,
                manifest.graphs[info.file],
                self._engines[info.file],
                self._caches.get(info.file),
                self._prefix if info.file in self._caches else None,
            )
            for info in manifest.stages_for(when, keep)
        ]

    def _step_bindings(self, keep: int) -> tuple[dict[str, Value], list[tuple[Stage, Binding]]]:
        if keep not in self._steps:
            engine = self.any_engine
            values: dict[str, Value] = {
                "input_ids": engine.zeros((self._batch, 1), "int64"),
                "position_ids": engine.zeros(self._numbers_shape(keep), "int64"),
            }
            self._steps[keep] = (
                values,
                [(stage, stage.bind(values, self._batch)) for stage in self._stages("step", keep)],
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
        """Shape of a step's position_ids: [B,1], or [B,1,A] for decoders that count along A axes."""
        for info in self._bundle.manifest.stages_for("step", keep):
            for name, source in info.inputs.items():
                if source == "position_ids":
                    return _single(self._bundle.manifest.graphs[info.file].inputs[name], self._batch)
        raise VtpError("no step of this bundle reads 'position_ids'; export the bundle again")

    def open_engine(self, file: str) -> Engine:
        """Open the graph of one stage."""
        return open_stage(self._bundle, file, self._engine, self._threads, self._opening)

    def _open(self, file: str) -> None:
        engine = self.open_engine(file)
        graph = self._bundle.manifest.graphs[file]
        _compare(file, "input", graph.inputs, engine.inputs)
        _compare(file, "output", graph.outputs, engine.outputs)
        self._engines[file] = engine
        if graph.kv is not None:
            self._caches[file] = KvCache(engine, graph.kv)


def _together(count: int, most: int, seen: Sequence[Seen] | None) -> list[list[int]]:
    """Which of `count` pictures go through the image stages in one run: at most `most`, and only those of
    which the same stages are known."""
    groups: dict[frozenset[StageKey], list[int]] = {}
    for place in range(count):
        groups.setdefault(frozenset(seen[place] if seen else ()), []).append(place)
    return [places[i : i + most] for places in groups.values() for i in range(0, len(places), most)]


def _in_order(
    runs: Sequence[tuple[list[int], dict[str, Value]]], put: Callable[[np.ndarray], Value]
) -> dict[str, Value]:
    """What several runs gave, as one: picture by picture."""
    joined = {}
    for name in runs[0][1]:
        if name != "pixel_values":
            rows: dict[int, np.ndarray] = {}
            for places, values in runs:
                rows.update(zip(places, rows_of(values[name], len(places)), strict=True))
            joined[name] = put(np.concatenate([rows[place] for place in sorted(rows)]))
    return joined


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
