"""A bundle's graphs, each opened once, and the stages that run on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import replace

import numpy as np

from vtp.engines import Engine, Value, VtpError, capabilities
from vtp.engines.errors import quoted
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import TILES, Manifest, StageInfo, TensorInfo
from vtp.runtime.bundle.stream_info import STREAM, compares, stream_state
from vtp.runtime.stages.kv_cache import KvCache
from vtp.runtime.stages.prefix_cache import Prefix
from vtp.runtime.stages.stage import Stage


class OpenedStages:
    """The opened graphs of a bundle, with one cache for each decoder graph, and the stages made of them.

    skip  the moments whose graphs are not opened here: "image" if something else runs them, "stream" if
          pictures are not a camera's
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        open_engine: Callable[[str], Engine],
        prefix: Prefix | None = None,
        skip: Collection[str] = (STREAM,),
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.caches: dict[str, KvCache] = {}
        self._engine = engine
        self._prefix = prefix
        self._engines: dict[str, Engine] = {}
        self.compares = compares(self.manifest.stages)
        self._unread = stream_state(self.manifest.stages) if STREAM in skip else set[str]()
        files = dict.fromkeys(stage.file for stage in self.manifest.stages if stage.when not in skip)
        for file in sorted(files, key=self._bytes, reverse=True):
            self._open(file, open_engine)
        self._make_caches()

    def stages(self, when: str, keep: int) -> list[Stage]:
        """The stages of one moment for one keep-count, in order."""
        return [self._stage(self._read(info)) for info in self.manifest.stages_for(when, keep)]

    def reading(self, stage: Stage) -> Stage:
        """A step's stage on the graph by which prompts are read, where that is another one."""
        graphs = self.manifest.graphs
        prompts = (file for file in self._engines if graphs[file].cache_of == stage.info.file)
        return self._stage(replace(stage.info, file=next(prompts, stage.info.file)))

    def _stage(self, info: StageInfo) -> Stage:
        graph = self.manifest.graphs[info.file]
        cache = self.caches.get(graph.cache_of or info.file)
        prefix = None if cache is None else self._prefix
        return Stage(info, graph, self._engines[info.file], cache, prefix)

    def on_rows(self, first: int, count: int, prefix: Prefix | None) -> OpenedStages:
        """The same graphs on some rows of the caches; see `KvCache.rows`."""
        part = copy(self)
        part.caches = {file: cache.rows(first, count) for file, cache in self.caches.items()}
        part._prefix = prefix
        return part

    @property
    def shares_rows(self) -> bool:
        """Whether every cache can be used row by row."""
        return all(self._engines[file].shares_rows for file in self.caches)

    @property
    def any_engine(self) -> Engine:
        """An engine that can make values for any stage: all of a bundle run on one device."""
        return next(iter(self._engines.values()))

    def put(self, array: np.ndarray) -> Value:
        """Copy a host array to the device of the stages."""
        return self.any_engine.put(array)

    @property
    def notes(self) -> list[str]:
        """What engines could not do as asked, a line each."""
        return [note for engine in self._engines.values() for note in engine.notes]

    def dtype_of(self, name: str) -> str:
        """The dtype in which the first stage that reads a pipeline tensor wants it."""
        for stage in self.manifest.stages:
            for tensor, source in stage.inputs.items():
                if source == name:
                    return self.manifest.graphs[stage.file].inputs[tensor].dtype
        raise VtpError(f"no stage of this bundle reads '{name}'; export the bundle again")

    @property
    def pictures_together(self) -> int:
        """Most pictures that go through the image stages in one run; 1 where one makes up a whole batch."""
        stage = next(stage for stage in self.manifest.stages if stage.when == "image")
        return self._together(
            stage, [name for name, source in stage.inputs.items() if source == "pixel_values"]
        )

    @property
    def in_pieces(self) -> bool:
        """Whether the pictures of one prompt go through the image stages one by one, tile by tile: where a
        run of several is no faster than several runs."""
        return capabilities(self._engine).on_cpu

    @property
    def rows_together(self) -> int:
        """Most prompts that go through the prompt stages in one run."""
        stages = [stage for stage in self.manifest.stages if stage.when == "prefill"]
        return min(self._together(stage, stage.inputs) for stage in stages)

    def close(self) -> None:
        """Free every graph and cache."""
        self.caches.clear()
        for engine in self._engines.values():
            engine.close()

    def _read(self, info: StageInfo) -> StageInfo:
        """A stage without the outputs that only graphs read which are not open."""
        if not self._unread.intersection(info.outputs.values()):
            return info
        read = {name: to for name, to in info.outputs.items() if to not in self._unread}
        return replace(info, outputs=read)

    def _together(self, stage: StageInfo, names: Iterable[str]) -> int:
        """How long the first axis of some inputs may be, in the graph and on the engine."""
        graph = self.manifest.graphs[stage.file]
        axes = [graph.inputs[name].shape[0] for name in names]
        most = capabilities(self._engine).largest_batch
        if not all(isinstance(axis, str) for axis in axes) or TILES in axes:
            return 1
        if unknown := next((str(axis) for axis in axes if axis not in graph.axes), None):
            raise VtpError(
                f"the manifest gives the axis {quoted(unknown)} of {stage.file} no range; export the bundle "
                "again"
            )
        longest = min(graph.axes[str(axis)][-1] for axis in axes)
        return longest if most is None else min(most, longest)

    def _bytes(self, file: str) -> int:
        """Size of a graph's own weights. The largest is opened first, with nothing else in memory yet.

        While an engine packs a weight, it holds it twice: of a graph opened last, the largest weight (the
        embeddings, often a sixth of a model) would come on top of everything else.
        """
        data = self.manifest.files.get(f"{file}.data")
        return data.bytes if data else 0

    def _open(self, file: str, open_engine: Callable[[str], Engine]) -> None:
        engine = open_engine(file)
        graph = self.manifest.graphs[file]
        _compare(file, "input", graph.inputs, engine.inputs)
        _compare(file, "output", graph.outputs, engine.outputs)
        self._engines[file] = engine

    def _make_caches(self) -> None:
        """One for each decoder graph, or for all those that work on one."""
        graphs = {file: self.manifest.graphs[file] for file in self._engines}
        for file, graph in graphs.items():
            if graph.kv is not None and graph.cache_of is None:
                others = [self._engines[name] for name, other in graphs.items() if other.cache_of == file]
                engine = self._engines[file]
                self.caches[file] = KvCache(engine, graph.kv, states=graph.states, others=others)


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
