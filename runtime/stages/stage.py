"""One stage of a bundle, ready to run: what goes into its graph, and where its outputs go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vtp.engines import Binding, Engine, Value
from vtp.runtime.bundle.manifest import TILE_TOKENS, TILES, GraphInfo, StageInfo, TensorInfo
from vtp.runtime.result import Timings
from vtp.runtime.stages.kv_cache import KvCache
from vtp.runtime.stages.prefix_cache import Prefix, rest_of

Check = Callable[[], None]


def never_interrupt() -> None:
    """The check of work that nothing ends early."""


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

        padding  of every row [B]: how many of its last tokens are padding
        """
        feeds = self.feeds(values)
        if self.cache is None:
            outputs = self.engine.run(feeds)
        else:
            if self.prefix is not None:
                self.cache.keep_first(known := self.prefix.begin(feeds))
                feeds = rest_of(feeds, known, self.engine)
            self.cache.advance(self._sequence(feeds) - padding)
            outputs = self.cache.run(self.engine, feeds)
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
            into[name] = values[target] = self.engine.zeros(single_step_shape(tensor, batch), tensor.dtype)
        for name in self.graph.outputs:
            if name not in into:  # a cue that only prefill reads
                tensor = self.graph.outputs[name]
                into[name] = self.engine.zeros(single_step_shape(tensor, batch), tensor.dtype)
        feeds = {**self.feeds(values), **(self.cache.feeds if self.cache else {})}
        return self.engine.bind(feeds, into)

    def bind_whole(self, feeds: Mapping[str, Value]) -> Binding | None:
        """Fix the stage for runs on these very inputs; None where theirs do not tell its outputs' sizes."""
        sizes = {
            axis: size
            for name, value in feeds.items()
            for axis, size in zip(self.graph.inputs[name].shape, value.shape, strict=True)
        }
        if TILES in sizes:
            most = self.graph.axes
            sizes[TILE_TOKENS] = sizes[TILES] * most[TILE_TOKENS][-1] // most[TILES][-1]
        into = {}
        for name, tensor in self.graph.outputs.items():
            shape = [axis if isinstance(axis, int) else sizes.get(axis) for axis in tensor.shape]
            if None in shape:
                return None
            into[name] = self.engine.zeros([size for size in shape if size is not None], tensor.dtype)
        return self.engine.bind(feeds, into)

    def feeds(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What the graph takes beside its cache, by its own names."""
        return {name: self.engine.adopt(values[source]) for name, source in self.info.inputs.items()}

    def _sequence(self, feeds: Mapping[str, Value]) -> int:
        """Tokens of this run: axis 1 of the stage's position_ids."""
        return feeds["position_ids"].shape[1]


def single_step_shape(tensor: TensorInfo, batch: int) -> list[int]:
    """Shape of a step's output: the batch comes first, and every other named axis has length 1."""
    first, *rest = [size if isinstance(size, int) else 1 for size in tensor.shape]
    return [first if isinstance(tensor.shape[0], int) else batch, *rest]


def run_stages(
    stages: Iterable[Stage],
    values: dict[str, Value],
    timings: Timings,
    padding: int | np.ndarray = 0,
    check: Check = never_interrupt,
) -> None:
    """Run stages in order, timing each under its name.

    `check` is called before each stage, and may raise to end the run there; `padding` as in `Stage.run`.
    """
    for stage in stages:
        check()
        with timings.measure(stage.info.name):
            stage.run(values, padding)
