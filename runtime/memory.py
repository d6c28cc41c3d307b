"""What a bundle needs in memory, told before anything is loaded: every shape is bounded at export."""

from __future__ import annotations

from dataclasses import dataclass

from vtp.engines.graph_memory import CACHE, graph_memory
from vtp.runtime.bundle import Bundle
from vtp.runtime.manifest import GraphInfo

# Beside a bundle, measured on x86: Python with the runtime and ONNX Runtime; a CUDA context with cuBLAS.
PROCESS = 100_000_000
CUDA_CONTEXT = 500_000_000
# On the CPU, ONNX Runtime widens float16 weights to float32 and keeps the originals (measured: 2.8 times).
_WIDENED = 3
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one graph of a bundle, on the engine asked about; activations are an upper bound.

    `unknown` counts inner tensors of unknown shape, which the bound leaves out.
    """

    file: str
    weights: int
    cache: int
    activations: int
    unknown: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class BundleMemory:
    """Bytes of a bundle with every stage open, one conversation at the full length."""

    engine: str
    stages: list[StageMemory]
    beside: int

    @property
    def total(self) -> int:
        """All stages and what the engine takes beside them."""
        return self.beside + sum(stage.total for stage in self.stages)


def bundle_memory(bundle: Bundle, engine: str) -> BundleMemory:
    """Memory of a bundle on an engine, batch 1, at the longest prompt and answer that it was exported for.

    Every open graph is counted with all it may hold at once: engines do not give memory back between stages.
    """
    on_cpu = engine == "ort-cpu"
    stages = [_stage(bundle, file, graph, on_cpu) for file, graph in bundle.manifest.graphs.items()]
    return BundleMemory(engine, stages, PROCESS if on_cpu else PROCESS + CUDA_CONTEXT)


def _stage(bundle: Bundle, file: str, graph: GraphInfo, on_cpu: bool) -> StageMemory:
    axes = {name: 1 if name == "batch" else sizes[-1] for name, sizes in graph.axes.items()}
    if graph.kv is not None and "sequence" in axes:
        axes["sequence"] = min(axes["sequence"], graph.kv.capacity)
    found = graph_memory(bundle.path(file), axes)
    widened = on_cpu and bundle.manifest.dtype == "float16"
    return StageMemory(
        file,
        found.weights * (_WIDENED if widened else 1),
        _cache(graph),
        found.activations * (2 if widened else 1) + (found.scores if on_cpu else 0),
        found.unknown,
    )


def _cache(graph: GraphInfo) -> int:
    """Keys and values of every layer, one buffer each; past and present share it."""
    kv = graph.kv
    if kv is None:
        return 0
    width = _DTYPE_BYTES.get(kv.dtype, 4)
    return sum(
        kv.heads * kv.capacity * kv.head_dim * width for name in graph.inputs if name.startswith(CACHE[0])
    )
